"""Rows to global batches: reading, preparation, packing and the feed."""

"""Batches to weights: freezing, the engine, the loop, checkpoints, evaluation, export."""

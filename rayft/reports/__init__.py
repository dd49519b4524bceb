"""What runs have left behind, as pages: read, put together, served."""

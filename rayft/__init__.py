"""rayft: fine-tune pretrained models across many machines, from one recipe."""

__version__ = "0.1.0"

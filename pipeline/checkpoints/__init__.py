"""Checkpoints: written behind the training, published whole or not at all, and read at any world size."""

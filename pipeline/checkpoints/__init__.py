"""Checkpoints: written in the background of training, published whole or not at all, readable at any world size."""

"""Images: their formats, decoding, and the transforms of training and evaluation."""

"""CoAtNet as a PyTorch module: blocks, relative attention and the table of variants; depends on torch alone."""

"""CoAtNet as a PyTorch module: blocks, relative attention, the variant table. Knows no device, rank or file."""

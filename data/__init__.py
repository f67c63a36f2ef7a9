"""WebDataset shards: build, index, order, read, decode, augment. Knows no model and no trainer."""

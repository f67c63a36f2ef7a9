"""Indexing, verifying and summarising existing WebDataset shards, which are only ever read and never modified."""

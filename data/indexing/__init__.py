"""Shards that others built: index, verify and show them as they are."""

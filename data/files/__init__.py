"""Files that survive kills and strangers: atomic, locked, checked and parsed ones, and their digests."""

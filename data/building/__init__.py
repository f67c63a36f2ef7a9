"""Images to shards: read, check, convert, shuffle, split, write, in parts and again after a kill."""

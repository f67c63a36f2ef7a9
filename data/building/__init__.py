"""Building shards from images, resumable and in parts: `build.py` is the entry point, all else is internal."""

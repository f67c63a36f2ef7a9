"""Images to classify: files, folders, globs, web addresses, and samples of shards."""

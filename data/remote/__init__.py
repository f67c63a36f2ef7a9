"""Access to storages of all kinds, and the cache of remote shards on a node."""

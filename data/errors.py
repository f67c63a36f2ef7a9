"""What is wrong with data."""


class DataError(ValueError):
    """Images, shards or an index that cannot be used; the message names the thing, what is wrong and the fix."""


class StorageRefused(DataError):
    """A place that refuses access."""


class StorageDown(Exception):
    """A place that has not answered for long; what it is asked for may be had later."""

"""What is wrong with data."""


class DataError(ValueError):
    """Images, shards or an index that cannot be used; the message names the thing, what is wrong and the mend."""


class StorageError(DataError):
    """A place that refuses access, or does not answer."""

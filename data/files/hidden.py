"""Hidden files and folders, which are no part of a dataset."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name, without its path, is hidden, such as `._n01.jpg` and `__MACOSX`."""
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"

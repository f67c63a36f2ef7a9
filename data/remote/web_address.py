"""Web addresses with a query, which is a signature or token where files are not public."""


def split_query(location: str) -> tuple[str, str]:
    """The path of a location, and the query of a web address with its question mark, such as a signature."""
    if not location.startswith(("http://", "https://")):
        return location, ""
    path, mark, query = location.partition("?")
    return path, mark + query


def without_signature(location: str) -> str:
    """A location for messages: the query of a web address, which may be a signature, is left out."""
    path, query = split_query(location)
    return f"{path}?..." if query else path

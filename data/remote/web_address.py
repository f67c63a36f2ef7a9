"""Web addresses with a query, which is a signature or token where files are not public."""

import re

# Of an address, or of a file that is named without its folder. The message may continue after it with punctuation.
_QUERY = re.compile(
    r"(https?://[^\s?\"'<>\\]+|\.(?:tar|tgz|json|npy|txt|[ct]sv|ya?ml))\?[^\s\"'<>\\]*[^\s\"'<>\\.,:;!)\]}?]",
    re.IGNORECASE,
)
# Libraries name the path of an address without its server.
_SIGNATURE = re.compile(
    r"\b((?:X-(?:Amz|Goog|Oss|Obs)-(?:Signature|Credential|Security-Token)|(?:OSS|AWS)?AccessKeyId|Signature|sig"
    r"|Key-Pair-Id|access_token|token)=)[^\s\"'<>\\&,;)]+",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/?#@\"'<>]*:[^\s/?#@\"'<>]*@", re.IGNORECASE)


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


def without_secrets(text: str) -> str:
    """`text` without the queries of web addresses and without the logins of any: `?...` and `...@` take their place."""
    if not any(mark in text for mark in ("?", "=", "@")):
        return text
    text = _LOGIN.sub(r"\1...@", _QUERY.sub(r"\1?...", text))
    return _SIGNATURE.sub(r"\1...", text)

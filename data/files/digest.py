"""sha256 of files, of remote objects, and of plain values."""

import hashlib
import json
from pathlib import Path
from typing import Any

from data.files.regular_file import open_regular
from data.remote.storage import Storage, is_remote, pieces


def file_sha256(path: str | Path) -> str:
    """sha256 of a local file, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def location_sha256(location: str, size: int, storage: Storage) -> str:
    """sha256 of the `size` bytes at a path or URL, in hex.

    Raises:
        OSError, StorageDown, StorageRefused: it cannot be read.
    """
    if not is_remote(location):
        return file_sha256(location)
    digest = hashlib.sha256()
    for piece in pieces(location, size, storage):
        digest.update(piece)
    return digest.hexdigest()


def json_sha256(content: Any) -> str:
    """sha256 of a value as JSON with sorted keys, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""The bytes of a remote file in order, as they arrive.

They are received into one buffer that is used again: the kernel clears every page of memory that is new, which takes
about as long as receiving what is written there.
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

from data.remote.deadlines import completed, transfer_seconds
from data.remote.retries import Storage, with_retries
from data.remote.storage import checked, open_filesystem, pieces

BUFFER = 2 * 2**20
"""Bytes of a view. To hand over half as many takes a tenth more processor time, and twice as many saves 2 %."""


class ObjectReplaced(Exception):
    """The object is no longer the one that the earlier bytes are from."""


class ObjectVersion:
    """The one object of an S3 address whose bytes several streams read: that of the first answer.

    Only the event loop uses it.
    """

    def __init__(self) -> None:
        self._tag: str | None = None

    def condition(self) -> dict[str, str]:
        """Of a request for more of it; a server that does not know the condition ignores it."""
        return {} if self._tag is None else {"IfMatch": self._tag}

    def check(self, tag: str | None) -> None:
        """Compare the ETag of an answer.

        Raises:
            ObjectReplaced: it is of another object.
        """
        if self._tag is None:
            self._tag = tag
        elif tag is not None and tag != self._tag:
            raise ObjectReplaced


def byte_stream(
    location: str, start: int, stop: int, storage: Storage, version: ObjectVersion | None = None
) -> Iterator[memoryview]:
    """The bytes `start` .. `stop` of the remote file at `location`, in views that are valid until the next one.

    They take one request. If it fails, the next one begins at the byte where it ended. Storages other than S3 and web
    servers take a request for each `PIECE`, as `pieces` does.

    Raises:
        ObjectReplaced: the object has been replaced, on S3, since the first answer that `version` has seen.
        FileNotFoundError, StorageRefused, StorageDown, DataError: as for `read_bytes`.
    """
    location = checked(location)
    files, path = open_filesystem(location, storage)
    if not (hasattr(files, "call_s3") or hasattr(files, "open_range")):
        for piece in pieces(location, stop, storage, start):
            yield memoryview(piece)
        return
    buffer = memoryview(bytearray(min(BUFFER, stop - start)))
    reception = _Reception(files, path, start, stop, storage.read_timeout, version or ObjectVersion())
    try:
        while reception.position < stop:
            view = buffer[: stop - reception.position]
            with_retries(partial(reception.fill, view), location, storage)
            yield view
    finally:
        reception.end()


class _Reception:
    """A range of a file, received by one request after the other until it is complete."""

    def __init__(
        self, files: Any, path: str, start: int, stop: int, read_timeout: float, version: ObjectVersion
    ) -> None:
        self.position = start
        """Of the next byte to be received."""
        self._files, self._path, self._stop = files, path, stop
        self._read_timeout = read_timeout
        self._version = version
        self._filled = 0
        """Bytes of the view that an earlier request has left in it."""
        # Of the present request:
        self._response: Any = None
        self._asked_from = start
        self._waited = 0.0
        self._rest = memoryview(b"")
        """What was received with the last bytes of the previous view."""
        self._skipped = 0
        """Bytes to come that are known already, from a server that has no ranges and begins anew."""

    def fill(self, view: memoryview) -> None:
        """Receive until `view` is full. After an error, call it again with the same view for what is missing.

        Raises:
            ConnectionError: the server was too slow, or has sent fewer bytes than it was asked for.
            ObjectReplaced, Exception: those of the client.
        """
        loop = self._files.loop
        expected = self.position - self._asked_from + len(view) - self._filled
        seconds = transfer_seconds(self._read_timeout, expected) - self._waited
        try:
            self._waited += completed(loop, partial(self._fill, view), seconds)
        except BaseException:
            self.end()
            raise
        self._filled = 0

    def end(self) -> None:
        """Give up the present request, if there is one that is not complete."""
        if self._response is not None:
            self._files.loop.call_soon_threadsafe(self._response.close)
        self._response = None
        self._asked_from, self._waited, self._rest = self.position, 0.0, memoryview(b"")

    async def _fill(self, view: memoryview) -> float:
        """`fill`; returns the seconds that it took. The time between two views is not the server's."""
        began = asyncio.get_running_loop().time()
        if self._response is None:
            if hasattr(self._files, "call_s3"):
                self._response = await _open_s3_range(self._files, self._path, self.position, self._stop, self._version)
            else:
                self._response = await self._files.open_range(self._path, self.position, self._stop, or_whole=True)
                self._skipped = 0 if self._response.status == 206 else self.position
        while self._filled < len(view):
            piece = self._rest or memoryview(await self._response.content.readany())
            if not piece:
                received, asked = self.position - self._asked_from, self._stop - self._asked_from
                raise ConnectionError(f"{received:,} of {asked:,} bytes received")
            skipped = min(self._skipped, len(piece))
            self._skipped, piece = self._skipped - skipped, piece[skipped:]
            count = min(len(piece), len(view) - self._filled)
            view[self._filled : self._filled + count] = piece[:count]
            self._rest = piece[count:]
            self._filled += count
            self.position += count
        return asyncio.get_running_loop().time() - began


async def _open_s3_range(files: Any, path: str, start: int, stop: int, version: ObjectVersion) -> Any:
    """The answer to a request for the bytes `start` .. `stop` of an object, its body not yet received."""
    bucket, key, version_id = files.split_path(path)
    options = version.condition() | ({"VersionId": version_id} if version_id else {})
    try:
        found = await files._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **options)
    except OSError as error:
        if "IfMatch" in options and _code(error.__cause__) in ("PreconditionFailed", "412"):
            raise ObjectReplaced from error
        raise
    response = getattr(found["Body"], "raw_stream", found["Body"])  # aiobotocore 2 passes it on as it is
    try:
        version.check(found.get("ETag"))
        if start > 0 and not found.get("ContentRange", "").startswith(f"bytes {start}-"):
            raise ConnectionError(f"asked for the bytes from {start:,}, and received the file from its beginning")
    except BaseException:
        response.close()
        raise
    return response


def _code(error: BaseException | None) -> str | None:
    """The code of an error of S3."""
    response = getattr(error, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code

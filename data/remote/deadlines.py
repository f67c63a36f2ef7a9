"""Requests to remote storages with deadlines: a server that sends a byte now and then, of an answer's head or of its
body, would be waited for without end."""

import asyncio
from typing import Any

LEAST_RATE = 1e5
"""Bytes per second below which a server counts as not answering."""
_ROUND_TRIPS = 4
"""Of a question such as that for a file's size: a few requests, each within the time for connecting and answering."""
_CONNECT_SECONDS = 10.0
LISTING_SECONDS = 3600.0
"""A listing has as many requests as it has thousands of files."""


def answer(files: Any, method: str, *arguments: Any, seconds: float, **options: Any) -> Any:
    """What the `method` of a file system of fsspec returns.

    Raises:
        ConnectionError: it has not returned within `seconds`. File systems that are not asynchronous, such as FTP, have
            no deadline.
    """
    if not getattr(files, "async_impl", False):
        return getattr(files, method)(*arguments, **options)
    from fsspec.asyn import sync

    async def within() -> Any:
        return await asyncio.wait_for(getattr(files, f"_{method}")(*arguments, **options), seconds)

    try:
        return sync(files.loop, within)
    except TimeoutError as error:
        reason = str(error) or str(error.__cause__ or "") or f"no complete answer in {seconds:.3g} s"
        raise ConnectionError(reason) from error


def question_seconds(read_timeout: float) -> float:
    """Seconds for a request whose answer is short, with a timeout of so many seconds for each byte of it."""
    return _ROUND_TRIPS * (_CONNECT_SECONDS + read_timeout)


def transfer_seconds(read_timeout: float, size: int) -> float:
    """Seconds for `size` bytes."""
    return read_timeout + size / LEAST_RATE

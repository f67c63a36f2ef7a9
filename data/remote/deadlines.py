"""Requests to remote storages with deadlines: a server that sends a byte now and then, of an answer's head or of its
body, would be waited for without end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

Result = TypeVar("Result")

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
    return completed(files.loop, lambda: getattr(files, f"_{method}")(*arguments, **options), seconds)


def completed(loop: asyncio.AbstractEventLoop, work: Callable[[], Awaitable[Result]], seconds: float) -> Result:
    """What `work` returns in the event loop of fsspec, which runs in another thread.

    Raises:
        ConnectionError: it has not returned within `seconds`.
    """
    from fsspec.asyn import sync

    async def within() -> Result:
        return await asyncio.wait_for(work(), seconds)

    try:
        return cast(Result, sync(loop, within))
    except TimeoutError as error:
        reason = str(error) or str(error.__cause__ or "") or f"no complete answer in {seconds:.3g} s"
        raise ConnectionError(reason) from error


def question_seconds(read_timeout: float) -> float:
    """Seconds for a request whose answer is short, with a timeout of so many seconds for each byte of it."""
    return _ROUND_TRIPS * (_CONNECT_SECONDS + read_timeout)


def transfer_seconds(read_timeout: float, size: int) -> float:
    """Seconds for `size` bytes."""
    return read_timeout + size / LEAST_RATE

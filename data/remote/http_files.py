"""Files on web servers: fsspec's client, with sizes and refusals that can be relied upon."""

import asyncio
import html
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast
from urllib.parse import urljoin

import aiohttp
import yarl
from fsspec.implementations.http import HTTPFileSystem

from data.errors import StorageRefused
from data.limits import LISTING_BYTES, RECORD_BYTES
from data.remote.deadlines import question_seconds, transfer_seconds
from data.remote.storage_errors import MISSING_STATUSES, REFUSED_STATUSES, passes
from data.remote.web_address import without_signature

_CONNECT_TIMEOUT = 10.0  # seconds
_VERBATIM = {"Accept-Encoding": "identity"}  # the length of a compressed answer is not that of the file
_SIZE = re.compile("[0-9]{1,18}")
_TOTAL = re.compile(r"bytes (?:[0-9]+-[0-9]+|\*)/([0-9]{1,18})$")
# Every attempt ends at the next tag: fsspec's own expression takes quadratic time, and more, on pages made for that.
_LINK = re.compile(r"""<a\s(?:[^<>]*?\s)?href=["']([^"'<>]+)""", re.IGNORECASE)


def http_files(read_timeout: float) -> "HttpFiles":
    """A client of web servers. Proxies come from the usual variables, logins from `~/.netrc`.

    Args:
        read_timeout: seconds without receiving a byte after which a request counts as failed.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=read_timeout)
    files = HttpFiles(
        skip_instance_cache=True, use_listings_cache=False, client_kwargs={"timeout": timeout, "trust_env": True}
    )
    files.read_timeout = read_timeout
    return files


class HttpFiles(HTTPFileSystem):  # type: ignore[misc]
    """Files below http:// and https://.

    Raises, from all methods:
        FileNotFoundError: 404 or 410.
        PermissionError: a login is needed or refused.
        ConnectionError: a status that passes.
        StorageRefused: another error status, a server without byte ranges, or one that does not tell a file's size.
    """

    read_timeout: float

    def encode_url(self, url: str) -> yarl.URL:
        """The address as it is sent. One with a query is sent unchanged: signatures depend on every character."""
        try:
            return yarl.URL(url, encoded="?" in url)
        except ValueError as error:
            raise StorageRefused(f"{without_signature(url)}: not a web address ({error}); correct it") from None

    def _raise_not_found_for_status(self, response: aiohttp.ClientResponse, url: str) -> None:
        status, what = response.status, f"HTTP {response.status} {response.reason}"
        if status < 400:
            return
        if status in MISSING_STATUSES:
            raise FileNotFoundError(url)
        if status in REFUSED_STATUSES:
            raise PermissionError(what)
        if passes(status):
            raise ConnectionError(what)
        raise StorageRefused(
            f"{without_signature(url)}: the server refuses to read it ({what}); check the address, and whether the "
            "server offers files for download there"
        )

    async def _info(self, url: str, **options: Any) -> dict[str, Any]:
        return {"name": url, "size": await self._size(url), "type": "file"}

    async def _size(self, url: str) -> int:
        session = await self.set_session()
        async with session.head(self.encode_url(url), allow_redirects=True, headers=_VERBATIM) as response:
            if response.status < 300 and (size := _content_length(response.headers)) is not None:
                return size
            if response.status in MISSING_STATUSES:
                raise FileNotFoundError(url)
        # Some servers refuse HEAD, and a signature for GET is not valid for it.
        async with session.get(self.encode_url(url), headers=_VERBATIM | {"Range": "bytes=0-0"}) as response:
            total = _TOTAL.match(response.headers.get("Content-Range", ""))
            if response.status in (206, 416) and total:  # 416 for an empty file
                return int(total[1])
            self._raise_not_found_for_status(response, url)
            length = _content_length(response.headers) if response.status == 200 else None
        if length is None:
            raise StorageRefused(
                f"{without_signature(url)}: the server does not tell its size, neither for HEAD nor for a range; copy "
                "the files to a disk or an object store"
            )
        return length

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        first = start or 0
        if end is None:
            return (await self._whole_file(url, RECORD_BYTES))[first:]
        async with await self.open_range(url, first, end) as response:
            return await _received(response, end - first)

    async def open_range(self, url: str, start: int, end: int, *, or_whole: bool = False) -> aiohttp.ClientResponse:
        """The answer to a request for the bytes `start` .. `end`, its body not yet received.

        With `or_whole` it may be the whole file, which ends at `end`; its status is then not 206.
        """
        session = await self.set_session()
        headers = _VERBATIM | {"Range": f"bytes={start}-{end - 1}"}
        response = await session.get(self.encode_url(url), headers=headers)
        try:
            self._raise_not_found_for_status(response, url)
            # A range that covers the file may be answered by the file.
            is_whole = response.status != 206 and _content_length(response.headers) == end
            if response.status == 206 or (is_whole and (start == 0 or or_whole)):
                return cast(aiohttp.ClientResponse, response)
            raise StorageRefused(
                f"{without_signature(url)}: the server ignores byte ranges (HTTP {response.status} instead of 206), "
                "which reading shards needs; use a server that has them, such as nginx, or copy the files to a disk or "
                "an object store"
            )
        except BaseException:
            response.release()
            raise

    async def _whole_file(self, url: str, most: int) -> bytes:
        """The content of a file of at most `most` bytes.

        Raises:
            StorageRefused: it has more.
            TimeoutError: it comes more slowly than `LEAST_RATE`.
        """
        session = await self.set_session()
        async with asyncio.timeout(question_seconds(self.read_timeout)) as deadline:
            async with session.get(self.encode_url(url), headers=_VERBATIM) as response:
                self._raise_not_found_for_status(response, url)
                size = _content_length(response.headers)
                seconds = transfer_seconds(self.read_timeout, most if size is None else min(size, most))
                deadline.reschedule(asyncio.get_running_loop().time() + seconds)
                content = b"" if size is not None and size > most else await _received(response, most)
        if len(content) > most or (size is not None and size > most):
            raise StorageRefused(
                f"{without_signature(url)}: has more than {most:,} bytes, which is far more than such a file needs"
            )
        return content

    async def _ls_real(self, url: str, detail: bool = True, **options: Any) -> list[Any]:
        folder = url.partition("?")[0].rstrip("/") + "/"
        session = await self.set_session()
        async with session.get(self.encode_url(url), headers=_VERBATIM) as response:
            self._raise_not_found_for_status(response, url)
            is_page = response.headers.get("Content-Type", "text/html").partition(";")[0] == "text/html"
            page = await _received(response, LISTING_BYTES) if is_page else b""
        if len(page) > LISTING_BYTES:
            raise StorageRefused(
                f"{without_signature(url)}: its list of files has more than {LISTING_BYTES:,} bytes; divide the folder"
            )
        names = set() if "?" in url else set(_links(page.decode("utf-8", "ignore"), folder))
        if not detail:
            return sorted(names)
        return [
            {"name": name, "size": None, "type": "directory" if name.endswith("/") else "file"}
            for name in sorted(names)
        ]


async def _received(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The content of an answer; one byte more than `most` if it is longer."""
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece[: most + 1 - len(content)]
        if len(content) > most:
            break
    return bytes(content)


def _links(page: str, folder: str) -> Iterator[str]:
    """The addresses below `folder` that a page links to."""
    for link in _LINK.findall(page):
        try:
            name = urljoin(folder, html.unescape(link))
        except ValueError:
            continue
        # Pages link to themselves in other orders, to parts of themselves, and to folders above.
        if name.startswith(folder) and name != folder and not {"?", "#"} & set(name):
            yield name


def _content_length(headers: Mapping[str, str]) -> int | None:
    if headers.get("Content-Encoding", "identity") not in ("identity", ""):
        return None
    length = headers.get("Content-Length", "")
    return int(length) if _SIZE.fullmatch(length) else None

"""A web server on loopback that offers the files of a folder as servers and CDNs do: with or without HEAD, ranges,
lists of files, logins and signatures.
"""

import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote


@dataclass
class WebServer:
    """Serves `folder`; what it offers may be changed while it runs."""

    folder: Path
    head: int = 200
    """Status of HEAD requests for files that exist."""
    ranges: bool = True
    listings: bool = False
    length: bool = True
    """Whether answers tell the length of a file."""
    status: int = 200
    """Of all requests if it is not 200."""
    failures: int = 0
    """Number of requests that fail with `status` before it is 200 again; 0 for all."""
    authorization: str | None = None
    """Required value of this header."""
    query: str | None = None
    """Required query."""
    payer: str | None = None
    """Required value of S3's header for whoever pays for a request."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path with the query of every request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"options": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: WebServer

    def do_GET(self) -> None:
        options = self.options
        options.requests.append((self.command, self.path))
        path, _, query = self.path.partition("?")
        file = options.folder / unquote(path).lstrip("/")
        if options.status != 200:
            status = options.status
            options.failures -= 1
            if options.failures == 0:
                options.status = 200
            return self._answer(status)
        if options.authorization is not None and self.headers.get("Authorization") != options.authorization:
            return self._answer(401)
        unpaid = options.payer is not None and self.headers.get("x-amz-request-payer") != options.payer
        if unpaid or (options.query is not None and query != options.query):
            return self._answer(403)
        if file.is_dir() and options.listings:
            links = "".join(f'<a href="{name.name}">{name.name}</a>' for name in sorted(file.iterdir()))
            return self._answer(200, f'<a href="?C=N">Name</a><a href="../">up</a>{links}'.encode(), html=True)
        if not file.is_file():
            return self._answer(404)
        if self.command == "HEAD" and options.head != 200:
            return self._answer(options.head)
        content = file.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if options.ranges else None
        if asked is None:
            return self._answer(200, content)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        total = len(content) if options.length else "*"
        if first > last:
            return self._answer(416, content_range=f"bytes */{total}")
        return self._answer(206, content[first : last + 1], content_range=f"bytes {first}-{last}/{total}")

    do_HEAD = do_GET  # noqa: N815 (the base class names it)

    def _answer(self, status: int, body: bytes = b"", *, html: bool = False, content_range: str | None = None) -> None:
        self.send_response(status)
        if html:
            self.send_header("Content-Type", "text/html")
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        if self.options.length or status != 200:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

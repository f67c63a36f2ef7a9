"""Every request to a storage has a deadline: servers that send a byte now and then are not waited for."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from data.errors import StorageDown
from data.remote.byte_stream import byte_stream
from data.remote.storage import (
    Storage,
    file_size,
    list_files,
    read_bytes,
    remove,
    write_bytes,
)

HASTY = Storage(give_up_after=0.2, greatest_delay=0.02)
NAMES = "train-{000000..000006}.tar"


@contextlib.contextmanager
def dripping(head: bytes, body: bytes) -> Iterator[str]:
    """The address of a server that sends the head of its answer at once and then `body`, without end, byte by byte."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.sendall(head)
                for byte in itertools.cycle(body):
                    connection.sendall(bytes([byte]))
                    time.sleep(0.01)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=drip, args=[server.accept()[0]], daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


BODY = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1000000\r\nContent-Range: bytes 0-999999/1000000\r\n\r\n", b"x"
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"
HEAD = b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize(
    ("answer", "request_"),
    [
        (BODY, lambda place, storage: read_bytes(place, storage, 0, 1_000_000)),
        (WHOLE, lambda place, storage: read_bytes(place, storage)),
        (HEAD, lambda place, storage: read_bytes(place, storage, 0, 1_000_000)),
        (HEAD, lambda place, storage: read_bytes(place, storage)),
        (BODY, lambda place, storage: list(byte_stream(place, 0, 1_000_000, storage))),
        (HEAD, lambda place, storage: list(byte_stream(place, 0, 1_000_000, storage))),
        (HEAD, lambda place, storage: file_size(place, storage)),
        (HEAD, lambda place, storage: list_files(place, storage)),
        (HEAD, lambda place, storage: write_bytes(place, b"x" * 1000, storage)),
        (HEAD, lambda place, storage: remove(place, storage)),
    ],
    ids=[
        "body of a range",
        "body",
        "head of a range",
        "head",
        "body of a stream",
        "head of a stream",
        "size",
        "list",
        "write",
        "remove",
    ],
)
def test_a_server_that_sends_a_byte_now_and_then_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, scheme: str, answer: tuple[bytes, bytes],
    request_: Callable[[str, Storage], object],
) -> None:  # fmt: skip
    """Each byte comes in time for `read_timeout`."""
    monkeypatch.setattr("data.remote.deadlines.LEAST_RATE", 1e7)
    monkeypatch.setattr("data.remote.deadlines._CONNECT_SECONDS", 0.0)
    monkeypatch.setattr("data.remote.storage.LISTING_SECONDS", 0.5)
    monkeypatch.setattr("data.limits.RECORD_BYTES", 10**6)
    with dripping(*answer) as url:
        endpoint = url if scheme == "s3" else None
        storage = Storage(endpoint, anonymous=True, give_up_after=0.1, greatest_delay=0.01, read_timeout=0.15)
        began = time.monotonic()
        with pytest.raises((StorageDown, NotImplementedError)):
            request_("s3://bucket/x.tar" if scheme == "s3" else f"{url}/x.tar", storage)
        assert time.monotonic() - began < 60


def test_a_slow_server_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.remote.deadlines.LEAST_RATE", 1e7)
    with dripping(*BODY) as url:
        storage = Storage(give_up_after=0.1, greatest_delay=0.01, read_timeout=0.2)
        message = r"x\.tar: no answer in 0 s \(last: ConnectionError: no complete answer in 0\.3 s"
        with pytest.raises(StorageDown, match=message):
            read_bytes(f"{url}/x.tar", storage, 0, 1_000_000)

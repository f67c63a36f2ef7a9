"""An HTTP/1.1 proxy on loopback that injects faults into chosen exchanges between a client and a server.

Requests pass unchanged, so that signatures remain valid.
"""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Self

_ERROR = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>%s</Code><Message>injected</Message></Error>'


@dataclass
class Fault:
    """What happens to some requests.

    status      an error response with `status` and `code`; the server does not see the request
    reset       the connection is reset after `after` bytes of the response body
    truncate    the connection is closed after `after` bytes, though more were promised
    stall       nothing more is sent after `after` bytes
    flip        byte `after` of the body is inverted
    cut         the connection is reset after `after` bytes of the request body; the server does not see the request
    hang        nothing more of the request body is read after `after` bytes
    slow        the server sees the request `seconds` later
    lost        the server does what the request asks, and the connection is reset before the answer
    """

    action: Literal["status", "reset", "truncate", "stall", "flip", "cut", "hang", "slow", "lost"]
    path: str = ".tar"
    """Applies only to requests whose path contains this."""
    method: str = "GET"
    share: float = 1.0
    """Share of those requests that fail, evenly spread."""
    times: int | None = None
    """Maximum number of faults."""
    after: int = 1000
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.5
    fired: int = 0
    _seen: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Whether the fault applies to this request."""
        if method != self.method or self.path not in path or (self.times is not None and self.fired >= self.times):
            return False
        self._seen += 1
        strikes = int(self._seen * self.share) > int((self._seen - 1) * self.share)
        self.fired += strikes
        return strikes


class FaultProxy:
    """Forwards everything to `port` of this machine, except for `faults`; runs in a thread of its own."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request."""
        self.fields: list[dict[str, str]] = []
        """The header of every request, its names in lower case."""
        self._under_way = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"

    def wait_idle(self) -> None:
        """Wait until the server has answered everything that has been passed on, also for clients that are gone."""
        deadline = time.monotonic() + 60
        while self._under_way:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.005)

    def __enter__(self) -> Self:
        self._thread.start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result(10)
        return self

    def __exit__(self, *exception: object) -> None:
        async def end() -> None:
            self._server.close()
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            while True:
                head, fields = await _head(client)
                method, path, _ = head.split(" ", 2)
                self.requests.append((method, path))
                self.fields.append({name.lower(): value for name, value in fields})
                if any(name.lower() == "expect" for name, _ in fields):  # not part of the signature
                    await _send(answer, b"HTTP/1.1 100 Continue\r\n\r\n")
                    fields = [(name, value) for name, value in fields if name.lower() != "expect"]
                fault = next((f for f in self.faults if f.strikes(method, path)), None)
                if fault and fault.action in ("cut", "hang"):
                    await client.readexactly(fault.after)
                    await _end(answer, fault)
                    return
                if fault and fault.action == "status":
                    await _read_body(client, fields)
                    await _send(answer, _refusal(fault))
                    continue
                if upstream is None:
                    server, upstream = await asyncio.open_connection("127.0.0.1", self._upstream, limit=2**20)
                body = await _read_body(client, fields)
                self._under_way += 1
                try:
                    if fault and fault.action == "slow":
                        await asyncio.sleep(fault.seconds)
                    await _send(upstream, _joined(head, fields), *body)
                    status, answer_fields = await _head(server)
                    while status.split(" ")[1] == "100":
                        status, answer_fields = await _head(server)
                finally:
                    self._under_way -= 1
                if fault and fault.action == "lost":
                    await _end(answer, fault)
                    return
                await _send(answer, _joined(status, answer_fields))
                if method == "HEAD" or status.split(" ")[1] in ("204", "304"):
                    continue
                async for block in _spoiled(_body(server, answer_fields), fault):
                    if block is None:
                        await _end(answer, fault)
                        return
                    await _send(answer, block)
        except (asyncio.IncompleteReadError, ConnectionError, OSError, asyncio.CancelledError):
            pass
        finally:
            for writer in (answer, upstream):
                if writer is not None:
                    writer.close()


async def _spoiled(body: AsyncIterator[bytes], fault: Fault | None) -> AsyncIterator[bytes | None]:
    """The body as the fault changes it; None where the connection ends."""
    sent = 0
    async for block in body:
        if fault is None or fault.action == "slow":
            yield block
        elif fault.action == "flip":
            if sent <= fault.after < sent + len(block):
                changed = bytearray(block)
                changed[fault.after - sent] ^= 0xFF
                block = bytes(changed)
            yield block
        elif sent + len(block) > fault.after:
            yield block[: max(0, fault.after - sent)]
            yield None
        else:
            yield block
        sent += len(block)


async def _end(answer: asyncio.StreamWriter, fault: Fault | None) -> None:
    assert fault is not None
    if fault.action in ("stall", "hang"):
        await asyncio.sleep(3600)
    if fault.action in ("reset", "cut", "lost"):
        await asyncio.sleep(0.05)
        # Closing with a linger time of zero sends a reset.
        answer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        answer.transport.abort()


def _refusal(fault: Fault) -> bytes:
    body = _ERROR % fault.code.encode()
    head = f"HTTP/1.1 {fault.status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _send(writer: asyncio.StreamWriter, *blocks: bytes) -> None:
    for block in blocks:
        writer.write(block)
    await writer.drain()


async def _head(reader: asyncio.StreamReader) -> tuple[str, list[tuple[str, str]]]:
    first, *rest = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin1").split("\r\n")
    return first, [(name, value.strip()) for name, _, value in (line.partition(":") for line in rest)]


def _joined(first: str, fields: list[tuple[str, str]]) -> bytes:
    return (first + "\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n").encode("latin1")


async def _read_body(reader: asyncio.StreamReader, fields: list[tuple[str, str]]) -> list[bytes]:
    return [block async for block in _body(reader, fields)]


async def _body(reader: asyncio.StreamReader, fields: list[tuple[str, str]]) -> AsyncIterator[bytes]:
    headers: dict[str, Any] = {name.lower(): value for name, value in fields}
    if "chunked" in headers.get("transfer-encoding", ""):  # forwarded as it is, framing included
        while True:
            size = await reader.readuntil(b"\r\n")
            yield size
            yield await reader.readexactly(int(size.split(b";")[0], 16) + 2)
            if int(size.split(b";")[0], 16) == 0:
                return
    left = int(headers.get("content-length", 0))
    while left:
        block = await reader.readexactly(min(left, 2**16))
        left -= len(block)
        yield block

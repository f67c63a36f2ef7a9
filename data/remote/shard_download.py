"""Downloading one shard: in one request, or, if it is large and on S3, in several ranges at a time.

S3 sends 50 to 100 MB/s through one connection, so that a shard of several gigabytes would take a minute by itself.
"""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.files.atomic_file import open_no_link
from data.remote.byte_stream import BUFFER, ObjectVersion, byte_stream
from data.remote.cache import RequestedShard

RANGE = 64 * 2**20
"""Bytes. A range takes about a second, so that the time until its first byte does not count."""
_CONNECTIONS = 4
"""Of one shard, beside those of other shards that are downloaded at the same time. Each has one buffer of memory."""


def shard_requests(size: int) -> int:
    """The number of requests for a shard of `size` bytes on S3."""
    return 1 if size <= 2 * RANGE else -(-size // RANGE)


def download(shard: RequestedShard, part: Path) -> bool:
    """Download the shard to `part` and flush it to the disk; False if its sha256 differs from the requested one.

    Raises:
        ObjectReplaced: it has been replaced meanwhile.
        FileNotFoundError, StorageRefused, StorageDown, DataError: as for `read_bytes`.
        OSError: `part` cannot be written.
    """
    with open_no_link(part, "wb+") as file:
        if shard.location.startswith(("s3://", "s3a://")) and shard_requests(shard.bytes) > 1:
            sha256 = _download_ranges(shard, file.fileno())
        else:
            digest = hashlib.sha256()
            for view in byte_stream(shard.location, 0, shard.bytes, shard.storage):
                digest.update(view)
                file.write(view)
            file.flush()
            sha256 = digest.hexdigest()
        os.fsync(file.fileno())
    return sha256 == shard.sha256


def _download_ranges(shard: RequestedShard, descriptor: int) -> str:
    """Write each range to its place in the open file as it arrives; returns the sha256 of what is then in the file.

    What is hashed is read back, since keeping what arrives before its turn would take memory without limit.
    """
    version, given_up = ObjectVersion(), threading.Event()

    def receive(start: int) -> None:
        position = start
        if given_up.is_set():
            return
        for view in byte_stream(shard.location, start, min(start + RANGE, shard.bytes), shard.storage, version):
            while view:
                written = os.pwrite(descriptor, view, position)
                position, view = position + written, view[written:]
            if given_up.is_set():
                return

    digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER))
    with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="range") as pool:
        received = [pool.submit(receive, start) for start in range(0, shard.bytes, RANGE)]
        for future in received:
            future.add_done_callback(lambda done: given_up.set() if done.exception() else None)
        try:
            for number, future in enumerate(received):
                future.result()
                position, stop = number * RANGE, min((number + 1) * RANGE, shard.bytes)
                while count := os.preadv(descriptor, [buffer[: stop - position]], position):
                    digest.update(buffer[:count])
                    position += count
        finally:
            given_up.set()
    return digest.hexdigest()

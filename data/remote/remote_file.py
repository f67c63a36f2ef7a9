"""Seekable files, local or remote."""

import io
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.remote.storage import PIECE, Storage, checked, file_size, is_remote, read_bytes

_FIRST_LENGTH = 2**16  # bytes


def open_file(location: str | Path, storage: Storage) -> BinaryIO:
    """The file at `location`, open for reading and seeking; a remote one is prefetched.

    Raises:
        FileNotFoundError, StorageRefused, StorageDown, DataError: as for `read_bytes`; also from reads.
    """
    location = checked(location)
    if not is_remote(location):
        return open(location, "rb")
    return io.BufferedReader(cast(io.RawIOBase, _RemoteFile(location, storage)), _FIRST_LENGTH)


class _RemoteFile(io.RawIOBase):
    """A remote file, read in ranges that grow while reading is sequential, so that a seek is cheap."""

    def __init__(self, location: str, storage: Storage) -> None:
        self._location, self._storage = location, storage
        self._size = file_size(location, storage)
        self._position = 0
        self._piece, self._piece_start = b"", 0
        self._next_length = _FIRST_LENGTH
        self._prefetched: tuple[int, Future[bytes]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= self._size:
            return 0
        inside = self._position - self._piece_start
        if not 0 <= inside < len(self._piece):
            self._read_piece()
            inside = 0
        count = min(len(view), len(self._piece) - inside)
        view[:count] = self._piece[inside : inside + count]
        self._position += count
        return count

    def _read_piece(self) -> None:
        """Make the piece at the position the current one, and prefetch the next."""
        sequential = self._position == self._piece_start + len(self._piece) and self._piece
        if self._prefetched and self._prefetched[0] == self._position:
            self._piece = self._prefetched[1].result()
        else:
            self._next_length = self._next_length if sequential else _FIRST_LENGTH
            stop = min(self._position + self._next_length, self._size)
            self._piece = read_bytes(self._location, self._storage, self._position, stop)
        self._piece_start = self._position
        self._prefetched = None
        if sequential:
            self._next_length = min(4 * self._next_length, PIECE)
            start = self._position + len(self._piece)
            if start < self._size:
                stop = min(start + self._next_length, self._size)
                self._prefetched = (
                    start,
                    self._reader.submit(read_bytes, self._location, self._storage, start, stop),
                )

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)
        super().close()

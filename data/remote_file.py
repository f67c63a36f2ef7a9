"""Files to read and seek in, wherever they lie."""

import io
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.storage import PIECE, Storage, checked, file_size, is_remote, read_bytes


def open_file(location: str | Path, storage: Storage) -> BinaryIO:
    """The file at `location` for reading and seeking; a remote one is read ahead of the reader.

    Raises:
        FileNotFoundError, StorageRefused, StorageDown, DataError: as for `read_bytes`; also from reads.
    """
    location = checked(location)
    if not is_remote(location):
        return open(location, "rb")
    return io.BufferedReader(cast(io.RawIOBase, _RemoteFile(location, storage)), 2**16)


class _RemoteFile(io.RawIOBase):
    """Ranges of a remote file. Requests grow while reading goes straight on, so that a seek costs little."""

    def __init__(self, location: str, storage: Storage) -> None:
        self._location, self._storage = location, storage
        self._size = file_size(location, storage)
        self._position = 0
        self._piece, self._piece_start = b"", 0
        self._next_length = 2**16
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

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
            self._turn()
            inside = 0
        count = min(len(view), len(self._piece) - inside)
        view[:count] = self._piece[inside : inside + count]
        self._position += count
        return count

    def _turn(self) -> None:
        """Make the piece that begins at the position the current one, and ask for the one behind it."""
        straight_on = self._position == self._piece_start + len(self._piece) and self._piece
        if self._ahead and self._ahead[0] == self._position:
            self._piece = self._ahead[1].result()
        else:
            self._next_length = self._next_length if straight_on else 2**16
            stop = min(self._position + self._next_length, self._size)
            self._piece = read_bytes(self._location, self._storage, self._position, stop)
        self._piece_start = self._position
        self._ahead = None
        if straight_on:
            self._next_length = min(4 * self._next_length, PIECE)
            start = self._position + len(self._piece)
            if start < self._size:
                stop = min(start + self._next_length, self._size)
                self._ahead = (
                    start,
                    self._reader.submit(read_bytes, self._location, self._storage, start, stop),
                )

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)
        super().close()

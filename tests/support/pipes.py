"""Pipes whose reader does not read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


@contextmanager
def full_pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The reading and the writing end of a pipe in which not one byte more fits."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as reader, open(writing, "wb", buffering=0) as writer:
        os.set_blocking(writing, False)
        while writer.write(bytes(4096)) is not None:
            pass
        os.set_blocking(writing, True)
        yield reader, writer

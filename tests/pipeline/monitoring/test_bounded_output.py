"""Console output whose reader stops reading, or goes away: real pipes."""

import os
import re
import threading
from collections.abc import Iterator

import pytest

from pipeline.monitoring.bounded_output import BoundedOutput, bounded_text


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading and the writing end."""
    reading, writing = os.pipe()
    yield reading, writing
    for end in (reading, writing):
        try:
            os.close(end)
        except OSError:
            continue


def lines_of(reading: int, last: bytes) -> list[bytes]:
    """What the pipe has up to the line `last`."""
    content = b""
    while not content.endswith(last):
        content += os.read(reading, 2**20)
    return content.splitlines(keepends=True)


def test_a_reader_that_stops_blocks_no_write_and_learns_later_how_many_lines_it_missed(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    notes: list[str] = []
    output = BoundedOutput(writing, notes.append)
    written = [b"line %06d\n" % number for number in range(200_000)]  # more than the pipe and the queue hold
    for line in written:
        assert output.write(line) == len(line)
    assert notes == ["nobody reads the console output; what does not fit into its buffer is in this log alone"]
    threading.Thread(target=output.finish, args=[60]).start()
    *kept, told = lines_of(reading, b": nobody was reading)\n")
    assert kept == written[: len(kept)]
    assert told == b"(%d lines are missing here: nobody was reading)\n" % (len(written) - len(kept))
    output.write(b"and again\n")
    assert lines_of(reading, b"\n") == [b"and again\n"]


def test_the_end_waits_for_a_reader_that_stopped_for_a_limited_time(pipe: tuple[int, int]) -> None:
    output = BoundedOutput(pipe[1])
    output.write(bytes(500_000))  # more than the pipe holds
    output.finish(0.05)  # returns, although nobody reads
    assert output._waiting


def test_a_reader_that_is_gone_is_noted_once(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.close(reading)
    notes: list[str] = []
    output = BoundedOutput(writing, notes.append)
    for _ in range(3):
        output.write(b"line\n")
        output.finish(60)
    assert notes == ["the console output cannot be written (Broken pipe); this log has all of it"]


def test_a_terminal_that_another_program_has_made_non_blocking_gets_everything(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(writing, False)
    text = bounded_text(writing)
    for number in range(20_000):
        text.write(f"line {number:06d}\n")
    text.write("end\n")
    lines = lines_of(reading, b"end\n")
    assert len(lines) == 20_001
    assert all(re.fullmatch(rb"line \d{6}\n", line) for line in lines[:-1])


def test_a_fork_does_not_wait_for_what_its_parent_had_to_write(pipe: tuple[int, int]) -> None:
    output = BoundedOutput(pipe[1])
    output.write(bytes(500_000))  # more than the pipe holds
    child = os.fork()
    if child == 0:
        output.finish(3600)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

"""Lines that are appended while a disk is full: a real file system, mounted for the test."""

import json
import os
from pathlib import Path

import pytest

from pipeline.runs.json_lines import append_json_line
from tests.support.disk import small_file_system


def test_a_line_that_a_full_disk_cuts_is_an_error_and_the_next_one_is_whole(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", "64k") as disk:
        path = disk / "log.jsonl"
        append_json_line(path, {"number": 0})
        with pytest.raises(OSError, match="No space left on device"):
            append_json_line(path, {"text": "x" * 200_000})
        os.truncate(path, 20_000)  # somebody makes room
        append_json_line(path, {"number": 1}, sync=True)
        first, cut, last = path.read_text().splitlines()
    assert (json.loads(first), json.loads(last)) == ({"number": 0}, {"number": 1})
    assert cut.endswith("x")

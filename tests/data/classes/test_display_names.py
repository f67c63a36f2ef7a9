"""Names for people, from lines as ImageNet's."""

import os
from pathlib import Path

import pytest

from data.classes.display_names import match_display_names
from data.errors import DataError


def test_names_are_matched_by_class_and_the_rest_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(
        "\ufeffn01 tench, Tinca tinca\r\n\r\nred apple\tApple, red\nn01 tench, Tinca tinca\nn99 x\n".encode()
    )
    found = match_display_names(file, ["red apple", "n02", "n01"])
    assert found.names == ("Apple, red", "n02", "tench, Tinca tinca")
    assert (found.without, found.unknown) == (("n02",), ("n99",))
    assert match_display_names(file, ["n01", "n99", "red apple"]).remarks("f") == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "names.txt: empty; give a file with a class"),
        (b"n01 tench\nn02\n", "line 2 is 'n02'; lines must be a class and its name"),
        (b"n01 tench\nn01 carp\n", "line 2 gives the class 'n01' a second name"),
        (b"n05 tench\n", r"none of its 1 lines begins with the name of a class \(n05 there, n01, n02 in the model\)"),
        (b"n01 \xff\n", "not UTF-8; save it as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        match_display_names(tmp_path / "names.txt", ["n01", "n02"])


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("nowhere", "No such file"), ("pipe", "not a regular file")):
        with pytest.raises(DataError, match=f"{name}: {reason}"):
            match_display_names(tmp_path / name, ["n01"])

"""Files of which only the first writer's exists."""

import errno
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.remote.exclusive_file import create_file
from data.remote.storage import Storage, read_bytes

PATIENT = Storage(give_up_after=20)


@pytest.fixture(params=["hard links", "no hard links", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://test/{uuid.uuid4().hex}/claim"
    if request.param == "no hard links":

        def link(source: Path, target: Path) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(os, "link", link)
    return str(tmp_path / "claim")


def test_of_several_writers_one_creates_the_file(location: str) -> None:
    contents = [str(number).encode() for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda content: create_file(location, content, PATIENT), contents))
    assert created.count(True) == 1
    assert read_bytes(location, PATIENT) == contents[created.index(True)]
    assert not create_file(location, b"late", PATIENT)
    assert read_bytes(location, PATIENT) == contents[created.index(True)]


def test_nothing_is_left_beside_it(tmp_path: Path) -> None:
    assert create_file(tmp_path / "claim", b"one", PATIENT)
    assert not create_file(tmp_path / "claim", b"two", PATIENT)
    assert [path.name for path in tmp_path.iterdir()] == ["claim"]

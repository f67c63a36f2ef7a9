"""Small files that would take much memory or time: each is refused or counted as broken, with its reason."""

import io
import os
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.building.build import build_shards
from data.classes.labels import label_values, stored_labels
from data.errors import DataError
from data.images.decode import DecodeError, decode
from data.index import LabelFormat
from data.shard import BrokenSample, Shard
from data.tar import read_tar


def tar_of(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_of_a_megabyte_is_damage(tmp_path: Path, form: int) -> None:
    members = [("a.jpg", b"x"), ("a.cls", b"0"), (f"{'n' * 2**20}.jpg", b"x"), ("b.cls", b"0")]
    with open(tar_of(tmp_path / "s.tar", members, form), "rb") as file:
        contents = read_tar(file.fileno())
    assert [member.name for member in contents.members] == ["a.jpg", "a.cls"]
    assert "no pax records" in str(contents.damage) or "a name of 1,048,5" in str(contents.damage)


def test_one_long_key_does_not_lengthen_those_of_all_samples(tmp_path: Path) -> None:
    members = [(f"{number}.{kind}", b"0") for number in range(5000) for kind in ("jpg", "cls")]
    members += [(f"{'n' * 4000}.{kind}", b"0") for kind in ("jpg", "cls")]
    path = tar_of(tmp_path / "s.tar", members)
    tracemalloc.start()
    shard = Shard(path, ("jpg",), "cls", 5001)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert [shard.key(place) for place in (0, 4999, 5000)] == ["0", "4999", "n" * 4000]
    assert taken < 2**20


def test_members_are_read_up_to_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tar.MEMBERS", 10)
    with open(tar_of(tmp_path / "s.tar", [(f"{n}.cls", b"") for n in range(40)]), "rb") as file:
        assert "more than 10 members; divide it into several tars" in str(read_tar(file.fileno()).damage)


def test_headers_are_not_kept_for_all_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tar._CHECKED_AT_ONCE", 64)
    path = tar_of(tmp_path / "s.tar", [(f"{n}.cls", b"") for n in range(3000)])
    tracemalloc.start()
    with open(path, "rb") as file:
        contents = read_tar(file.fileno())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(contents.members), contents.damage) == (3000, None)
    assert peak < 3000 * 512
    content = bytearray(path.read_bytes())
    content[1000 * 512] ^= 1  # the name of a member, which its checksum covers
    path.write_bytes(content)
    with open(path, "rb") as file:
        contents = read_tar(file.fileno())
    assert len(contents.members) == 1000
    assert contents.damage == "no tar header at byte 512,000"


@pytest.mark.parametrize(
    ("content", "label", "reason"),
    [
        (b"[" + b"1," * 4999 + b"1]", LabelFormat("json"), "the sample has 5,000 labels; at most 4,096 are read"),
        (b"1\n" * 5000, LabelFormat("txt", lists="classes"), "the sample has 5,000 labels; at most 4,096"),
        (b"1 " * 5000, LabelFormat("txt", lists="multi-hot"), "the sample has 5,000 labels; at most 4,096"),
        (b" " * (2**24 + 1), LabelFormat("cls"), "the label has more than 16,777,216 bytes"),
    ],
)
def test_a_sample_with_too_many_labels_is_broken(content: bytes, label: LabelFormat, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        label_values(stored_labels(content, label), label)


def test_a_jpeg_with_two_thousand_scans_is_not_decoded() -> None:
    file = io.BytesIO()
    Image.fromarray(np.zeros((2000, 2000, 3), np.uint8)).save(file, "JPEG", progressive=True)
    encoded = file.getvalue()
    last = encoded.rindex(b"\xff\xda")
    scan = encoded[last : encoded.rindex(b"\xff\xd9")]
    assert decode(encoded).shape == (2000, 2000, 3)
    began = time.process_time()
    with pytest.raises(DecodeError, match=r"2,\d\d\d scans exceed the limit of 100"):
        decode(encoded[:last] + 2000 * scan + b"\xff\xd9")
    assert time.process_time() - began < 1  # of the processor, where decoding takes a minute


def sparse(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, size)


def test_a_sparse_image_of_gigabytes_is_not_read(tmp_path: Path, pictures: Path) -> None:
    for name in ("bright", "dark"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.jpg").write_bytes(next((pictures / name).iterdir()).read_bytes())
    huge = tmp_path / "images" / "dark" / "1.jpg"
    sparse(huge, 40 * 2**30)
    huge.open("rb+").write(b"\xff\xd8\xff\xe0")
    with pytest.raises(DataError, match=r"dark/1\.jpg \(more than 268,435,456 bytes\)"):
        build_shards(tmp_path / "images", tmp_path / "out")


@pytest.mark.parametrize(("limit", "what"), [("IMAGE_BYTES", "image"), ("LABEL_BYTES", "label")])
def test_a_member_beyond_the_limit_is_a_broken_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, what: str
) -> None:
    path = tar_of(tmp_path / "s.tar", [("a.jpg", b"x" * 20), ("a.cls", b"0" * 20)])
    shard = Shard(path, ("jpg",), "cls", 1)
    assert shard.read(0).image == b"x" * 20
    monkeypatch.setattr(f"data.shard.{limit}", 19)
    with pytest.raises(BrokenSample, match=f"its {what} has 20 bytes; at most 19 are read"):
        shard.read(0)

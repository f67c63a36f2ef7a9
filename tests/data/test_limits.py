"""Small files that would take much memory or time: each is refused or counted as broken, with its reason."""

import gzip
import io
import os
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.building.build import build_shards
from data.classes.class_lists import read_classes
from data.classes.label_files import read_label_file
from data.classes.labels import label_values, read_label_map, stored_labels
from data.errors import CoatnetError, DataError, StorageRefused
from data.files.yaml_text import YamlError, read_yaml
from data.images.decode import DecodeError, decode
from data.index import LabelFormat, read_index, read_labels
from data.indexing.index_shards import index_shards
from data.remote.storage import Storage, read_bytes
from data.shard import BrokenSample, Shard
from data.tar import read_tar
from data.tarfile_limits import open_limited
from pipeline.recipe.loader import load_recipe
from tests.servers.web import WebServer


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
    what = "a name" if form == tarfile.GNU_FORMAT else "pax records"
    assert f"{what} of 1,048,5" in str(contents.damage)


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


def header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(records: bytes) -> bytes:
    return header("pax", tarfile.XHDTYPE, len(records)) + records + bytes(-len(records) % 512)


HEADERS = {
    "a name of gigabytes": header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 6 * 2**30),
    "pax records of gigabytes": header("pax", tarfile.XHDTYPE, 6 * 2**30),
    "thousands of headers of one member": 3000 * (header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 2) + b"a\0" + bytes(510)),
    "a length below zero": pax(b"14 size=-1024\n"),
    "a length that no file has": pax(b"28 size=9223372036854775807\n"),
    "a sparse map that is none": pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
}  # fmt: skip
WHY = (
    r"a name or pax records of 6,442,450,944 bytes; at most 1,048,576 are read|hundreds of headers of one member|"
    r"a member of -1,024 bytes|a damaged header \(|it ends inside a member|unexpected end of data|truncated header"
)


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("compressed", [False, True])
def test_headers_for_which_tarfile_takes_gigabytes_or_does_not_end_are_damage(
    tmp_path: Path, what: str, compressed: bool
) -> None:
    """`tarfile` reads the sources of builds."""
    path = tmp_path / ("s.tar.gz" if compressed else "s.tar")
    content = HEADERS[what] + header("a.jpg", tarfile.REGTYPE, 0) + bytes(1024)
    path.write_bytes(gzip.compress(content) if compressed else content)
    (tmp_path / "labels.txt").write_text("a.jpg 0\n")
    tracemalloc.start()
    with pytest.raises(DataError, match=WHY):
        build_shards(path, tmp_path / "out", labels=str(tmp_path / "labels.txt"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


@pytest.mark.parametrize("what", HEADERS)
def test_such_headers_are_damage_for_the_first_look_at_a_shard(tmp_path: Path, what: str) -> None:
    (tmp_path / "s.tar").write_bytes(HEADERS[what] + header("a.jpg", tarfile.REGTYPE, 0) + bytes(1024))
    with pytest.raises(DataError, match=f"none of 1 tars has samples, from s.tar on .*({WHY})|no cls, .* jpg 1;"):
        index_shards([str(tmp_path / "s.tar")], output=str(tmp_path / "out"))


def test_links_to_themselves_and_to_nothing_have_no_content(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, target in (("a.jpg", "a.jpg"), ("b.jpg", "c.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    with open(tmp_path / "s.tar", "rb") as file, open_limited(file) as limited:
        for member in limited:
            with pytest.raises(tarfile.ReadError, match="a link to nothing, or to itself"):
                limited.extractfile(member)


@pytest.mark.parametrize(
    ("limit", "name", "read"),
    [
        ("data.files.yaml_text.YAML_BYTES", "map.yaml", lambda path: read_label_map(path, ("a",))),
        ("data.files.yaml_text.YAML_BYTES", "recipe.yaml", lambda path: load_recipe(path)),
        ("data.classes.class_lists.CLASS_LIST_BYTES", "classes.txt", lambda path: read_classes(str(path), Storage())),
        ("data.classes.label_files.LABEL_FILE_BYTES", "l.csv", lambda path: read_label_file(str(path), Storage())),
        ("data.index.INDEX_BYTES", "index.json", lambda path: read_index(path)),
    ],
)
def test_files_that_are_read_whole_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, name: str, read: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(limit, 2**20)
    sparse(tmp_path / name, 40 * 2**30)
    with pytest.raises(CoatnetError, match=rf"{name}: (has 42,949,672,960 bytes; at most|more than) 1,048,576"):
        read(tmp_path / name)


def test_the_labels_of_an_index_have_a_limit(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.index.LABELS_BYTES", 100)
    with pytest.raises(DataError, match=r"labels.npy: has [\d,]+ bytes; at most 100 are read"):
        read_labels(read_index(shards / "train"), Storage())


def test_a_web_server_that_sends_more_than_a_file_may_have_is_not_read_on(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(1000))
    with WebServer(tmp_path) as web:
        assert len(read_bytes(f"{web.url}/x", Storage(), most=1000)) == 1000
        with pytest.raises(StorageRefused, match=r"/x: has more than 999 bytes"):
            read_bytes(f"{web.url}/x", Storage(), most=999)


def test_a_yaml_file_of_short_values_is_not_composed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value takes a kilobyte of memory and two bytes of text."""
    monkeypatch.setattr("data.files.yaml_text.YAML_VALUES", 1000)
    tracemalloc.start()
    with pytest.raises(YamlError, match=r"a.yaml:1: not YAML: more than 1,000 values; write fewer"):
        read_yaml("[" + "a," * 2**18 + "a]", "a.yaml")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24

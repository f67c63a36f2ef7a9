"""Tar headers: the same members as `tarfile`, and damage is reported."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tar import members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def expected(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as archive:
        return [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]


def found(path: Path) -> tuple[list[tuple[str, int, int]], str | None]:
    with open(path, "rb") as file:
        names, damage = members(file.fileno())
    return [(member.name, member.offset, member.size) for member in names], damage


@pytest.mark.parametrize("format_name", FORMATS)
def test_members_are_those_that_tarfile_finds(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=FORMATS[format_name]) as archive:
        long_folder = "f" * 60 + "/" + "g" * 60
        for number, name in enumerate(["a.jpg", "n01/b.JPEG", f"{long_folder}/c.jpg", "empty.cls"]):
            info = tarfile.TarInfo(name)
            info.size = number * 700 if name != "empty.cls" else 0
            archive.addfile(info, io.BytesIO(b"x" * info.size))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        if format_name != "ustar":
            for name in ("ü" * 90 + ".jpg", "n" * 300 + ".jpg"):
                info = tarfile.TarInfo(name)
                info.size = 5
                archive.addfile(info, io.BytesIO(b"12345"))
    assert found(path) == (expected(path), None)
    assert len(expected(path)) == (4 if format_name == "ustar" else 6)


def test_members_of_a_tar_that_webdataset_writes_are_found(tmp_path: Path) -> None:
    # Its times are fractions of seconds, which take a pax header for every member.
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for number in range(20):
            writer.write({"__key__": f"n01/{number}", "jpg": os.urandom(number * 100), "cls": number})
    assert found(tmp_path / "s.tar") == (expected(tmp_path / "s.tar"), None)
    assert len(expected(tmp_path / "s.tar")) == 40


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_and_truncation_are_reported_or_harmless(data: st.DataObject) -> None:
    """Content bytes may change unnoticed, headers may not: a wrong place or size would shift the samples."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=data.draw(st.sampled_from(list(FORMATS.values())))) as archive:
        for number in range(6):
            info = tarfile.TarInfo(f"n0/{number}.jpg")
            info.size = 300
            info.mtime = number + 0.5 if archive.format == tarfile.PAX_FORMAT else number
            archive.addfile(info, io.BytesIO(os.urandom(300)))
    content = bytearray(file.getvalue())
    with open(os.memfd_create("whole"), "w+b") as whole:
        whole.write(content)
        whole.flush()
        before, _ = members(whole.fileno())
    # One byte: two in one header may cancel out in its checksum, which is a sum.
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    with open(os.memfd_create("damaged"), "w+b") as damaged:
        damaged.write(content)
        damaged.flush()
        after, damage = members(damaged.fileno())
    if len(after) < len(before):
        assert damage is not None
    assert [m for m in after if m not in before] == []


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        (b"", "an empty file"),
        (b"x" * 100, "ends after 100 bytes without an end mark"),
        (b"x" * 2048, "no tar header at byte 0"),
        (
            b"a.jpg".ljust(124, b"\0") + b"\x80" + b"\xff" * 11 + b"\0" * 20 + b"x" + b"\0" * 2000,
            "ends after 2,157 bytes, inside",
        ),
    ],
)
def test_files_that_are_not_tars_are_reported(tmp_path: Path, content: bytes, damage: str) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    members, reported = found(tmp_path / "s.tar")
    assert (members, str(reported)[: len(damage)]) == ([], damage)

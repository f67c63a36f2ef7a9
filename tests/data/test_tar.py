"""Tar headers: the same members as `tarfile`, and damage is reported."""

import io
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tar import TarContents, read_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def expected(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as archive:
        return [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]


def contents(path: Path) -> TarContents:
    with open(path, "rb") as file:
        return read_tar(file.fileno())


def found(path: Path) -> tuple[list[tuple[str, int, int]], str | None]:
    read = contents(path)
    return [(member.name, member.offset, member.size) for member in read.members], read.damage


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
        before = read_tar(whole.fileno()).members
    # One byte: two in one header may cancel out in its checksum, which is a sum.
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    with open(os.memfd_create("damaged"), "w+b") as damaged:
        damaged.write(content)
        damaged.flush()
        after, _, damage, has_end, _ = read_tar(damaged.fileno())
    if len(after) < len(before):
        assert damage is not None or not has_end
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


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar_of(*entries: tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar in which every regular file contains its own name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for info in entries:
            info.size = len(info.name.encode()) if info.type == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(info.name.encode()) if info.size else None)
    return file.getvalue()


def texts(path: Path, read: TarContents) -> dict[str, str]:
    """Name -> content."""
    data = path.read_bytes()
    return {member.name: data[member.offset : member.offset + member.size].decode() for member in read.members}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_have_the_content_of_their_targets(tmp_path: Path, form: int) -> None:
    path, long = tmp_path / "s.tar", "n" * 150
    path.write_bytes(
        tar_of(
            entry("d/first.jpg", tarfile.SYMTYPE, "../real.jpg"),
            entry("real.jpg"),
            entry("hard.jpg", tarfile.LNKTYPE, "real.jpg"),
            entry("./d/chain.jpg", tarfile.SYMTYPE, "first.jpg"),
            entry(f"{long}.jpg"),
            entry("to_long.jpg", tarfile.LNKTYPE, f"{long}.jpg"),
            entry("gone.jpg", tarfile.SYMTYPE, "nowhere.jpg"),
            entry("out.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            entry("a.jpg", tarfile.SYMTYPE, "b.jpg"),
            entry("b.jpg", tarfile.SYMTYPE, "a.jpg"),
            form=form,
        )
    )
    read = contents(path)
    assert texts(path, read) == {
        **dict.fromkeys(["d/first.jpg", "real.jpg", "hard.jpg", "./d/chain.jpg"], "real.jpg"),
        **dict.fromkeys([f"{long}.jpg", "to_long.jpg"], f"{long}.jpg"),
    }
    assert read.others == [(name, "links to nothing in the tar") for name in ("gone.jpg", "out.jpg", "a.jpg", "b.jpg")]


def test_other_entries_are_named_with_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    kinds = {
        b"5": "folders",
        b"3": "devices",
        b"6": "named pipes",
        b"V": "volume labels",
        b"Z": "entries of an unknown kind",
    }
    path.write_bytes(tar_of(*(entry(f"x{kind.decode()}", kind) for kind in kinds), entry("a.jpg")))
    read = contents(path)
    assert (read.others, read.damage) == (
        [(f"x{kind.decode()}{'/' * (kind == b'5')}", name) for kind, name in kinds.items()],
        None,
    )
    assert texts(path, read) == {"a.jpg": "a.jpg"}


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_files_are_named_and_those_behind_them_are_read(tmp_path: Path, form: str) -> None:
    with open(tmp_path / "sparse.jpg", "wb") as file:
        for hole in range(1, 30):  # more pieces than a GNU header has room for
            file.seek(hole * 2**17)
            file.write(b"x")
    (tmp_path / "b.jpg").write_bytes(b"b.jpg")
    command = ["tar", "--sparse", f"--format={form}", "-cf", "s.tar", "sparse.jpg", "b.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    read = contents(tmp_path / "s.tar")
    assert read.others == [("sparse.jpg", "sparse files (make the tar without --sparse)")]
    assert (texts(tmp_path / "s.tar", read), read.damage) == ({"b.jpg": "b.jpg"}, None)


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_of_gnu_tar_are_read(tmp_path: Path, form: str) -> None:
    (tmp_path / "x").mkdir()
    for name in ("a.jpg", "a.cls"):
        (tmp_path / "x" / name).write_text(name)
    os.link(tmp_path / "x/a.jpg", tmp_path / "x/b.jpg")
    os.symlink("a.cls", tmp_path / "x/b.cls")
    label = ["--label=VOLUME"] if form in ("oldgnu", "gnu", "posix") else []
    command = ["tar", "--sort=name", f"--format={form}", *label, "-cf", "s.tar", "x"]
    subprocess.run(command, cwd=tmp_path, check=True)
    read = contents(tmp_path / "s.tar")
    assert texts(tmp_path / "s.tar", read) == {
        "x/a.cls": "a.cls", "x/a.jpg": "a.jpg", "x/b.cls": "a.cls", "x/b.jpg": "a.jpg"
    }  # fmt: skip
    volume = [("VOLUME", "volume labels")] if form in ("oldgnu", "gnu") else []
    assert (read.others, read.damage) == ([*volume, ("x/", "folders")], None)


def test_a_global_pax_header_is_no_member(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as archive:
        archive.addfile(entry("a.jpg"))
    assert [member.name for member in contents(path).members] == ["a.jpg"]
    assert contents(path).others == []


FIRST, SECOND = tar_of(entry("a.jpg"), entry("a.cls")), tar_of(entry("b.jpg"), entry("b.cls"))


def test_tars_behind_one_another_are_read(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(FIRST + SECOND + FIRST)
    read = contents(path)
    assert [member.name for member in read.members] == ["a.jpg", "a.cls", "b.jpg", "b.cls", "a.jpg", "a.cls"]
    assert (read.damage, read.has_end, read.archives) == (None, True, 3)


@pytest.mark.parametrize("kept", [0, 3, 5, 300, 512])
def test_whole_members_without_an_end_mark_are_taken(tmp_path: Path, kept: int) -> None:
    # The content of the second member has five bytes, and its padding may be cut.
    path = tmp_path / "s.tar"
    path.write_bytes(FIRST[: 3 * 512 + kept])
    read = contents(path)
    assert [member.name for member in read.members] == (["a.jpg", "a.cls"] if kept >= 5 else ["a.jpg"])
    assert (read.damage is None, read.has_end) == (kept >= 5, False)


@pytest.mark.parametrize(
    ("tail", "damage"),
    [
        (
            b"x" * 512,
            r"bytes that are no tar follow its end mark at byte 10,240; if they may go: truncate --size 10240",
        ),
        (bytes(700) + b"checksum\n", r"bytes that are no tar follow its end mark at byte 10,752;"),
        (bytes(2**23), r"8,396,800 bytes of zeros at its end, as an interrupted download leaves them"),
    ],
)
def test_what_follows_the_end_mark_is_damage_unless_it_is_a_tar(tmp_path: Path, tail: bytes, damage: str) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(FIRST + tail)
    read = contents(path)
    assert [member.name for member in read.members] == ["a.jpg", "a.cls"]
    assert re.match(damage, read.damage or "")

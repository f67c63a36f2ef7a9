"""Trees of images as sources of builds, in every form, and builds of them that are checked to add up."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.accounting import REPORT_NAME
from data.building.build import build_shards
from data.building.merge import BuildReport
from data.files.json_records import to_json


def picture(number: int = 0, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def as_tar(folder: Path, path: Path, mode: str = "w", **options: Any) -> Path:
    """The folder as a tar, with its folders and links as members."""
    with tarfile.open(path, mode, **options) as archive:  # type: ignore[call-overload]
        for entry in sorted(folder.iterdir()):
            archive.add(entry, entry.name)
    return path


def as_class_tars(folder: Path, path: Path) -> Path:
    """The class folders as tars in a tar, and other files beside them."""
    with tarfile.open(path, "w") as archive:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith(".") and entry.name != "__MACOSX":
                content = as_tar(entry, path.with_suffix(".inner")).read_bytes()
                member = tarfile.TarInfo(f"{entry.name}.tar")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                archive.add(entry, entry.name)
    return path


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "folder": lambda folder, path: folder,
    "tar": as_tar,
    "pax tar": lambda folder, path: as_tar(folder, path, format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}),
    "tar.gz": lambda folder, path: as_tar(folder, path, "w:gz"),
    "tar of tars": as_class_tars,
}


def built(source: Path, destination: Path, **options: Any) -> BuildReport:
    report = build_shards(source, destination, **options)
    report.accounting.check()
    for folder in report.indexes:
        document = json.loads((folder / REPORT_NAME).read_text())
        assert document == report.document()
        assert to_json(report.accounting).items() <= document.items()
    return report


def left_out(report: BuildReport) -> dict[str, int]:
    return {reason: entries.count for reason, entries in report.accounting.left_out.items()}


def digest(report: BuildReport) -> str:
    return next(iter(report.indexes.values())).digest


PLAIN = {"cat/a.jpg": picture(1), "cat/b.jpg": picture(2), "dog/c.jpg": picture(3)}
ODD = {
    "cat/d.jfif": picture(4),
    "cat/e.JPE": picture(5),
    "cat/noext": picture(6),
    "cat/strange.dat": picture(7, "PNG"),
    "cat/packed.JPEG": gzip.compress(picture(8), mtime=0),
    "cat/packed.jpg.gz": gzip.compress(picture(9), mtime=0),
    "cat/._a.jpg": b"AppleDouble",
    "cat/Thumbs.db": b"thumbnails",
    "cat/notes": b"words",
    "cat/BMW": b"BMW, a car",
    "cat/.cache/x.jpg": picture(10),
    ".Trash-1000/files/x.jpg": picture(11),
    "__MACOSX/cat/a.jpg": picture(12),
    "readme.txt": b"words",
    "logo.png": picture(13, "PNG"),
}


def class_tar(*members: tuple[str, bytes], **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()

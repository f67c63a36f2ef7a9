"""Where images come from: a folder of class folders, or a tar of one tar per class as ImageNet-21K ships."""

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.errors import DataError

# Extension of the file as found -> extension of the member in a shard.
IMAGE_EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image: its class, its name for people, and the bytes of a file that hold it."""

    class_name: str
    name: str
    path: Path
    offset: int
    size: int

    @property
    def extension(self) -> str:
        return IMAGE_EXTENSIONS[PurePosixPath(self.name).suffix.lower()]

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


def list_images(source: Path) -> list[SourceImage]:
    """All images of `source`, sorted by class and name.

    Raises:
        DataError: nothing there, no classes, or a class without images.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    images = _list_folder(source) if source.is_dir() else _list_tar(source)
    return sorted(images, key=lambda image: (image.class_name, image.name))


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_EXTENSIONS


def _refuse_empty(source: Path, counts: dict[str, int], kind: str) -> None:
    if not counts:
        raise DataError(f"{source}: no class {kind}s in it; it should hold one {kind} per class, each with images")
    empty = sorted(name for name, count in counts.items() if count == 0)
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise DataError(
            f"{source}: class {kind} {empty[0]}{more} has no image ({', '.join(IMAGE_EXTENSIONS)}); "
            "add images or remove it"
        )


def _list_folder(source: Path) -> list[SourceImage]:
    images: list[SourceImage] = []
    counts: dict[str, int] = {}
    for folder in sorted(entry for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        found = [file for file in folder.iterdir() if file.is_file() and _is_image(file.name)]
        counts[folder.name] = len(found)
        images += [SourceImage(folder.name, f"{folder.name}/{f.name}", f, 0, f.stat().st_size) for f in found]
    _refuse_empty(source, counts, "folder")
    return images


def _list_tar(source: Path) -> list[SourceImage]:
    """Images inside the inner tars by their place in the outer file: nothing is unpacked."""
    images: list[SourceImage] = []
    counts: dict[str, int] = {}
    try:
        with open(source, "rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
            for member in outer:
                if not (member.isfile() and member.name.endswith(".tar")):
                    continue
                class_name = PurePosixPath(member.name).stem
                inner_file = outer.extractfile(member)
                assert inner_file is not None
                with tarfile.open(fileobj=inner_file, mode="r:") as inner:
                    found = [
                        SourceImage(
                            class_name, f"{class_name}/{PurePosixPath(image.name).name}", source,
                            member.offset_data + image.offset_data, image.size,
                        )
                        for image in inner
                        if image.isfile() and _is_image(image.name)
                    ]  # fmt: skip
                counts[class_name] = len(found)
                images += found
    except tarfile.TarError as error:
        raise DataError(
            f"{source}: not a folder and not a readable uncompressed tar of class tars ({error})"
        ) from error
    _refuse_empty(source, counts, "tar")
    return images

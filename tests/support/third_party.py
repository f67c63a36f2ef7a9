"""WebDatasets as other tools build them: with the writer of the webdataset library, or member by member."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

COLORS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]


def picture(number: int, image_format: str = "JPEG", size: tuple[int, int] = (20, 12)) -> bytes:
    """An encoded image of one colour; PNG and WebP are lossless."""
    file = io.BytesIO()
    color = tuple(np.add(COLORS[number % 3], number % 40))
    Image.new("RGB", size, color).save(file, image_format, **({"lossless": True} if image_format == "WEBP" else {}))
    return file.getvalue()


def samples(count: int, label: Any, extension: str = "jpg", image_format: str = "JPEG") -> list[dict[str, Any]]:
    """Samples for the writer; `label` returns the label members of a sample number."""
    return [
        {"__key__": f"picture_{number:04d}", extension: picture(number, image_format), **label(number)}
        for number in range(count)
    ]


def write_shards(folder: Path, content: Sequence[dict[str, Any]], per_shard: int = 4, name: str = "in") -> Path:
    """The samples as the shards `<name>-0000.tar` ... in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / f"{name}-%04d.tar"), maxcount=per_shard, verbose=0, mtime=0) as writer:
        for sample in content:
            writer.write(sample)
    return folder


def write_members(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar of these members only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return path


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    """The content of a tar of these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()

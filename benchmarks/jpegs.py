"""JPEGs to measure with: those of a folder, or generated ones as large as ImageNet's."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def sample_jpegs(folder: Path | None, limit: int) -> list[bytes]:
    """The contents of up to `limit` JPEG files below `folder`, in the order of their names; generated ones if None.

    Raises:
        SystemExit: the folder has none.
    """
    if folder is None:
        return [textured_jpeg(seed) for seed in range(limit)]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise SystemExit(f"{folder}: no JPEGs in it")
    return [path.read_bytes() for path in paths[:limit]]


def textured_jpeg(seed: int) -> bytes:
    """A JPEG of about 110 KB for 470 x 400 pixels without chroma subsampling, like most of ImageNet."""
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(330, 471)), int(rng.integers(400, 541))
    pixels = np.zeros((height, width, 3))
    for cells, strength in ((6, 110), (40, 40), (160, 8)):  # soft shapes, edges, texture
        layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC)) / 255 - 0.5) * 2 * strength
    pixels += rng.normal(0, 3, (height, width, 1)) + 128  # grain, equal in all channels
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95, subsampling="4:4:4")
    return file.getvalue()

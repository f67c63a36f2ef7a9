"""Images to classify arrive in order, decoded and transformed as in an evaluation."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.dataset import open_dataset
from data.images.augment import EvaluationTransform
from data.images.decode import decode
from data.inputs.image_stream import image_batches
from data.inputs.open_inputs import open_inputs
from data.remote.cache import Cache
from data.remote.storage import Storage
from data.stream import RankShare, evaluation_stream
from tests.servers.s3 import S3Server
from tests.support.third_party import picture

TRANSFORM = EvaluationTransform(32, "center")


def test_samples_of_shards_have_the_pixels_labels_and_batches_of_an_evaluation(shards: Path) -> None:
    folder = str(shards / "validation")
    wanted = list(evaluation_stream(open_dataset(folder, Storage()), TRANSFORM, RankShare(0, 1, 4), workers=2))
    found = list(image_batches(open_inputs([folder], Storage()).sources, TRANSFORM, 4, workers=2))
    assert len(found) == len(wanted) == 4
    for one, other in zip(found, wanted, strict=True):
        used = int(other.weights.sum())
        assert one.pixels.shape == other.images.shape
        assert np.array_equal(one.pixels[:used], other.images[:used])
        assert [image.labels for image in one.images] == [tuple(row) for row in other.labels[:used].tolist()]


def test_shards_on_s3_are_read_through_the_cache(s3: S3Server, shards: Path, tmp_path: Path) -> None:
    url = s3.put(shards / "validation", "predict")
    sources = open_inputs([url, f"{url}/validation-000000.tar"], Storage(), Cache(tmp_path / "cache", 10**9)).sources
    try:
        images = [image for batch in image_batches(sources, TRANSFORM, 6, workers=2) for image in batch.images]
    finally:
        sources.close()
    local = open_inputs([str(shards / "validation")], Storage()).sources
    same = [image for batch in image_batches(local, TRANSFORM, 6, workers=2) for image in batch.images]
    assert [(image.labels, image.problem) for image in images[:15]] == [(image.labels, "") for image in same]
    assert [image.name.rpartition("/")[2] for image in images[15:]] == [
        image.name.rpartition("/")[2] for image in images[:7]
    ]


def test_images_of_every_kind_are_decoded_and_others_are_named_with_the_reason(tmp_path: Path) -> None:
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save(tmp_path / "a.jpg", exif=turned)
    colour.convert("CMYK").save(tmp_path / "b.jpg")
    colour.convert("L").save(tmp_path / "c.png")
    colour.save(tmp_path / "d.webp", lossless=True)
    colour.save(tmp_path / "e.bmp")
    (tmp_path / "f.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:700])
    (tmp_path / "g.jpg").write_bytes(b"")
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
    (tmp_path / "h.png").write_bytes(header + (20_000).to_bytes(4) + (20_000).to_bytes(4))
    sources = open_inputs([str(tmp_path)], Storage()).sources
    (batch,) = image_batches(sources, TRANSFORM, 8, workers=2, thumbnails=3, thumbnail_size=30)
    assert [(Path(image.name).name, image.problem, image.turned) for image in batch.images] == [
        ("a.jpg", "", True),
        ("b.jpg", "", False),
        ("c.png", "", False),
        ("d.webp", "", False),
        ("e.bmp", "a BMP, not a JPEG, PNG or WebP", False),
        ("f.jpg", "damaged: Premature end of JPEG file", False),
        ("g.jpg", "empty file", False),
        ("h.png", "20,000 x 20,000 pixels exceed the limit of 89,478,485", False),
    ]
    for row, name in enumerate(("a.jpg", "b.jpg", "c.png", "d.webp")):
        assert np.array_equal(batch.pixels[row], TRANSFORM(decode((tmp_path / name).read_bytes())))
    assert not batch.pixels[4:].any()
    thumbnails = [image.thumbnail for image in batch.images]
    assert [None if one is None else one.shape for one in thumbnails] == [(20, 30, 3)] * 4 + [None] * 4


@pytest.mark.parametrize("workers", [1, 3])
def test_files_keep_their_order_and_only_the_first_batches_have_thumbnails(workers: int, tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / f"{number:02d}.png").write_bytes(picture(number, "PNG"))
    sources = open_inputs([str(tmp_path)], Storage()).sources
    batches = list(image_batches(sources, TRANSFORM, 4, workers, thumbnails=5, thumbnail_size=8))
    images = [image for batch in batches for image in batch.images]
    assert [Path(image.name).stem for image in images] == [f"{number:02d}" for number in range(11)]
    assert [batch.pixels.shape[0] for batch in batches] == [4, 4, 4]
    assert [image.thumbnail is not None for image in images] == [number < 8 for number in range(11)]

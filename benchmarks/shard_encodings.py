"""What `coatnet shards build` makes of images with several sizes and encodings: bytes, decoding speed, and lost detail.

Crops are decoded as in training.

python -m benchmarks.shard_encodings --images DIR
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.jpegs import sample_jpegs
from benchmarks.timing import Timing, interleaved, machine, report
from data.building.conversion import Conversion, Kind, check_image
from data.building.jpeg_encoding import Subsampling
from data.building.restart_markers import require_libturbojpeg
from data.errors import DataError
from data.images.augment import TrainTransform, center_crop, random_window
from data.images.decode import Pixels, decode, decode_window
from data.images.jpeg_region import RegionDecoder, find_region_decoder
from data.images.random_augment import RandomAugment

SIZE = 224
AREA = (0.05, 1.0)
WINDOWS = 4
"""Random crops of each image that are compared with those of the original."""
_TURN = 10  # images
_ORIGINALS = "originals"
_TRANSFORMS = {
    "crop": TrainTransform(SIZE, crop_area=AREA),
    "augmented": TrainTransform(SIZE, crop_area=AREA, random_augment=RandomAugment(2, 15.0)),
}
Crop = NDArray[np.float32]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The images as a build stores them."""

    files: list[bytes]
    again: list[bool]
    """Which of them were encoded again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEGs; generated ones if it is not given")
    parser.add_argument("--limit", type=int, default=200, help="JPEGs at most")
    parser.add_argument("--rounds", type=int, default=5, help="of all images")
    parser.add_argument("--short-sides", type=int, nargs="+", default=[512, 384, 320, 256])
    parser.add_argument("--qualities", type=int, nargs="+", default=[85, 90, 95])
    parser.add_argument("--subsamplings", choices=get_args(Subsampling), nargs="+", default=["4:4:4", "4:2:0"])
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the reader's parallelism is between images
    files = sample_jpegs(arguments.images, arguments.limit)
    print(f"{machine(torch.device('cpu'))}; {len(files)} JPEGs of {sum(map(len, files)) / len(files) / 1e3:.0f} KB")
    conversions = _conversions(arguments.short_sides, arguments.qualities, arguments.subsamplings)
    sets = {_ORIGINALS: Encoded(files, [False] * len(files))}
    sets |= {name: _encoded(files, conversion) for name, conversion in conversions.items()}
    timings = _timings({name: encoded.files for name, encoded in sets.items()}, arguments.rounds)
    rows = [_row(name, encoded, sets[_ORIGINALS], timings) for name, encoded in sets.items()]
    report(f"Images as shards have them, decoded and cropped to {SIZE}", rows, arguments.json)


def _conversions(
    short_sides: Sequence[int], qualities: Sequence[int], subsamplings: Sequence[Subsampling]
) -> dict[str, Conversion]:
    """Every combination with `recompress`, the recommended one also without it, and some with restart markers."""
    found = {
        f"{side}, {quality}, {subsampling}": Conversion(
            short_side=side, quality=quality, subsampling=subsampling, recompress=True
        )
        for side, quality, subsampling in product(short_sides, qualities, subsamplings)
    }
    recommended = Conversion(short_side=384, quality=90, subsampling="4:2:0")
    found["384, 90, 4:2:0, larger alone"] = recommended
    try:
        require_libturbojpeg()
    except DataError as error:
        print(f"without restart markers: {error}")
        return found
    return found | {
        "384, 90, 4:2:0, restart markers": replace(recommended, recompress=True, restart_markers=True),
        f"{_ORIGINALS}, restart markers": Conversion(restart_markers=True),
    }


def _encoded(files: Sequence[bytes], conversion: Conversion) -> Encoded:
    checked = [check_image(file, conversion) for file in files]
    return Encoded([one.encoded for one in checked], [bool(one.kind & Kind.ENCODED_AGAIN) for one in checked])


def _timings(sets: dict[str, list[bytes]], rounds: int) -> dict[tuple[str, str], Timing]:
    """Processor seconds of a round of all images, by name of the set and of the transform."""
    images = len(sets[_ORIGINALS])
    # Turns are short, so that other load on the machine affects all contestants alike.
    turns = [range(start, min(start + _TURN, images)) for start in range(0, images, _TURN)]
    regions = find_region_decoder()
    contestants = {
        f"{name}\n{transform}": partial(_run, files, _TRANSFORMS[transform], regions, cycle(turns))
        for name, files in sets.items()
        for transform in _TRANSFORMS
    }
    timings = interleaved(contestants, rounds=rounds * len(turns), device=torch.device("cpu"), clock=time.process_time)
    found = {}
    for label, timing in timings.items():
        name, _, transform = label.partition("\n")
        in_rounds = np.array(timing.seconds).reshape(rounds, len(turns)).sum(axis=1)
        found[name, transform] = Timing(in_rounds.tolist())
    return found


def _run(files: Sequence[bytes], transform: TrainTransform, regions: RegionDecoder, turns: Iterator[range]) -> None:
    for number in next(turns):
        rng = np.random.default_rng(number)
        transform.view(decode_window(files[number], partial(transform.window, rng=rng), regions), rng)


def _row(name: str, encoded: Encoded, originals: Encoded, timings: dict[tuple[str, str], Timing]) -> dict[str, Any]:
    images, bytes_ = len(encoded.files), sum(map(len, encoded.files))
    row: dict[str, Any] = {
        "encoding": name,
        "again": f"{sum(encoded.again) / images:.0%}",
        "KB": bytes_ / images / 1e3,
        "bytes": bytes_ / sum(map(len, originals.files)),
    }
    for transform in _TRANSFORMS:
        timing, base = timings[name, transform], timings[_ORIGINALS, transform]
        ratios = [b / a for a, b in zip(timing.seconds, base.seconds, strict=True)]
        row[f"{transform}/s"] = images / timing.median
        row[f"{transform}, speed"] = timing.speed_against(base)
        row[f"{transform}, range"] = f"{min(ratios):.2f}-{max(ratios):.2f}"
    pairs = [(old, new) for old, new, again in zip(originals.files, encoded.files, encoded.again, strict=True) if again]
    for kind, decibels in _detail(pairs).items():
        row[f"{kind}, dB"] = float(np.mean(decibels)) if decibels else ""
        row[f"{kind}, 5 %"] = float(np.percentile(decibels, 5)) if decibels else ""
    return row


def _detail(pairs: Sequence[tuple[bytes, bytes]]) -> dict[str, list[float]]:
    """PSNR of the crops of images that were encoded again against those of their originals, in decibels."""
    decibels: dict[str, list[float]] = {"crop": [], "centre": []}
    for number, (old, new) in enumerate(pairs):
        original, again = decode(old), decode(new)
        rng = np.random.default_rng(number)
        for box in (_window(original, rng) for _ in range(WINDOWS)):
            decibels["crop"].append(_psnr(original, again, box))
        decibels["centre"].append(_psnr(original, again, _center(original)))
    return decibels


def _psnr(original: Pixels, again: Pixels, box: Box) -> float:
    down, along = again.shape[0] / original.shape[0], again.shape[1] / original.shape[1]
    left, top, right, bottom = box
    moved = (left * along, top * down, min(right * along, again.shape[1]), min(bottom * down, again.shape[0]))
    error = float(np.mean(np.square(_crop(original, box) - _crop(again, moved), dtype=np.float64)))
    return 10 * float(np.log10(255**2 / max(error, 1e-10)))


def _window(pixels: Pixels, rng: np.random.Generator) -> Box:
    rows, columns = random_window(pixels.shape[0], pixels.shape[1], AREA, rng)
    return columns.start, rows.start, columns.stop, rows.stop


def _center(pixels: Pixels) -> Box:
    height, width = pixels.shape[:2]
    side = center_crop(pixels, SIZE).shape[0]
    top, left = (height - side) // 2, (width - side) // 2
    return left, top, left + side, top + side


def _crop(pixels: Pixels, box: Box) -> Crop:
    """The window (left, top, right, bottom), between pixels as well, resized to (SIZE, SIZE, 3) without rounding."""
    channels = [Image.fromarray(np.ascontiguousarray(pixels[:, :, channel], np.float32)) for channel in range(3)]
    resized = [channel.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=-1)


if __name__ == "__main__":
    main()

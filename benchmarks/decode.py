"""Decode, random resized crop to 224 pixels and flip: libraries side by side, in images per second of processor time.

python -m benchmarks.decode --images DIR
python -m benchmarks.decode --images DIR --parts            where the time of ours goes
python -m benchmarks.decode --images DIR --operations       the operations of RandAugment
"""

import argparse
import importlib.util
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from benchmarks.jpegs import sample_jpegs
from benchmarks.pillow_transform import OPERATIONS as PILLOW_OPERATIONS
from benchmarks.pillow_transform import pillow_transform
from benchmarks.timing import interleaved, machine, report
from data.building.restart_markers import with_restart_markers
from data.images.augment import TrainTransform, random_window, resize
from data.images.decode import Pixels, decode, decode_window
from data.images.jpeg_region import RegionDecoder
from data.images.random_augment import OPERATIONS, RandomAugment
from data.images.region_frame import region_frame
from data.images.turbojpeg import find_turbojpeg
from data.random_streams import RandomStream

SIZE = 224
AREA = (0.05, 1.0)
PILLOW = "Pillow"
_TURN = 10  # images
_ENTROPY = "of decoding: entropy decoding down to the end of the crop"
Transform = Callable[[bytes, np.random.Generator], Pixels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of JPEGs; generated ones if it is not given")
    parser.add_argument("--limit", type=int, default=200, help="JPEGs at most")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--restart-markers", action="store_true", help="the same JPEGs with restart markers")
    parser.add_argument("--parts", action="store_true", help="the parts of our transform instead")
    parser.add_argument("--operations", action="store_true", help="the operations of RandAugment instead")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the reader's parallelism is between images
    files = sample_jpegs(arguments.images, arguments.limit)
    if arguments.restart_markers:
        marked = [with_restart_markers(file, decode(file)) for file in files]
        files = [file for file in marked if file]
        print(f"{len(marked) - len(files)} of {len(marked)} cannot have restart markers and are left out")
    print(f"{machine(torch.device('cpu'))}; {len(files)} JPEGs of {sum(map(len, files)) / len(files) / 1e3:.0f} KB")
    if arguments.parts:
        report("An image of ours", _parts(files, arguments.rounds), arguments.json)
    elif arguments.operations:
        report("RandAugment at magnitude 15", _operations(files, arguments.rounds), arguments.json)
    else:
        report(f"Decode, crop to {SIZE}, flip", _decoders(files, arguments.rounds), arguments.json)


def _decoders(files: list[bytes], rounds: int) -> list[dict[str, Any]]:
    contestants = _contestants()
    # Turns are short, so that other load on the machine affects all contestants alike.
    turns = [files[start : start + _TURN] for start in range(0, len(files) - _TURN + 1, _TURN)]
    timings = interleaved(
        {name: partial(_run, run, cycle(turns)) for name, run in contestants.items()},
        rounds=rounds * len(turns), device=torch.device("cpu"), clock=time.process_time,
    )  # fmt: skip
    return [
        {
            "what": name,
            "images per CPU second": _TURN / statistics.mean(timing.seconds),
            "speed": timing.speed_against(timings[PILLOW]),
            "levels from Pillow, RMS": ""
            if "Rand" in name
            else _difference(contestants[name], contestants[PILLOW], files),
        }
        for name, timing in timings.items()
    ]


def _run(transform: Transform, turns: Iterator[list[bytes]]) -> None:
    # Results are dropped: allocating memory for every image would take longer than some of what is measured.
    for number, file in enumerate(next(turns)):
        transform(file, np.random.default_rng(number))


def _difference(transform: Transform, other: Transform, files: list[bytes]) -> float | str:
    """Mean over the images of the root mean square difference in levels; empty if they are not comparable."""
    differences = []
    for number, file in enumerate(files):
        a, b = (run(file, np.random.default_rng(number)) for run in (transform, other))
        if a.shape != b.shape:
            return ""
        differences.append(np.sqrt(np.mean((a.astype(np.float32) - b) ** 2)))
    return float(np.mean(differences))


def _contestants() -> dict[str, Transform]:
    ours, augmented = TrainTransform(SIZE), TrainTransform(SIZE, random_augment=RandomAugment(2, 15.0))

    def with_pillow(file: bytes, rng: np.random.Generator) -> Pixels:
        return np.asarray(pillow_transform(Image.open(io.BytesIO(file)).convert("RGB"), SIZE, None, rng))

    def with_pillow_and_augment(file: bytes, rng: np.random.Generator) -> Pixels:
        return np.asarray(pillow_transform(Image.open(io.BytesIO(file)).convert("RGB"), SIZE, (2, 15.0), rng))

    contestants: dict[str, Transform] = {
        "ours: whole, simplejpeg, strict; torch": _of_crops(ours, None),
        "ours: down to the end of the crop, simplejpeg; torch": _of_crops(ours, RegionDecoder()),
        "simplejpeg, fast DCT and upsampling; torch": _with(_decode_fast, _resize),
        "simplejpeg, DCT scaling; torch": _with_scaling,
        "simplejpeg; OpenCV, area": _with(simplejpeg.decode_jpeg, _resize_area),
        "simplejpeg; OpenCV, bilinear without antialiasing": _with(simplejpeg.decode_jpeg, _resize_linear),
        "OpenCV; OpenCV, area": _with(_decode_opencv, _resize_area),
        PILLOW: with_pillow,
        "ours, decoding alone": lambda file, rng: decode(file),
        "ours, whole, with RandAugment (2, 15)": _of_crops(augmented, None),
        "ours, down to the end of the crop, with RandAugment (2, 15)": _of_crops(augmented, RegionDecoder()),
        "Pillow, with RandAugment (2, 15)": with_pillow_and_augment,
    }
    library = find_turbojpeg(os.environ)
    if library:
        contestants["ours: the crop alone, libturbojpeg; torch"] = _of_crops(ours, RegionDecoder(library))
        contestants["ours, the crop alone, with RandAugment (2, 15)"] = _of_crops(augmented, RegionDecoder(library))
    if importlib.util.find_spec("turboloader"):
        contestants["turboloader, the crop alone; torch"] = _with_turboloader
    return contestants


def _of_crops(transform: TrainTransform, regions: RegionDecoder | None) -> Transform:
    def crop_and_view(file: bytes, rng: np.random.Generator) -> Pixels:
        return transform.view(decode_window(file, partial(transform.window, rng=rng), regions), rng)

    return crop_and_view


def _parts(files: list[bytes], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of processor time of the parts of an image, in one thread and without reading it."""
    library, transform, augment = find_turbojpeg(os.environ), TrainTransform(SIZE), RandomAugment(2, 15.0)
    regions = RegionDecoder(library)
    spent: dict[str, list[float]] = {}
    wholes = set()

    def timed(part: str, run: Callable[..., Any], *arguments: Any) -> Any:
        began = time.thread_time()
        result = run(*arguments)
        spent.setdefault(part, []).append(time.thread_time() - began)
        return result

    for turn in range(2 + rounds):
        if turn == 2:
            spent.clear()
        for number, file in enumerate(files):
            rng = timed("random generator", RandomStream.AUGMENTATION.generator, 0, turn, number)
            frame = timed("header, and where the data ends", region_frame, file)
            if frame is None:
                wholes.add(number)
                continue
            window = timed("drawing the crop", transform.window, frame.height, frame.width, rng)
            crop = timed("decoding the crop", regions, file, frame, window)
            if crop is None:
                wholes.add(number)
                continue
            pixels = timed("resizing and flipping", transform.view, crop, rng)
            timed("RandAugment (2, 15)", augment, pixels, rng)
            if library and not frame.interval:
                last = frame.rows_read(window[0].stop) - 1
                timed(_ENTROPY, library.region, file, 0, last, frame.width, 1)
    print(f"without {len(wholes)} of {len(files)} pictures, which are decoded whole")
    return [{"part": part, "ms": 1e3 * statistics.mean(seconds)} for part, seconds in spent.items()]


def _with(decoder: Callable[[bytes], Pixels], resizer: Callable[[Pixels], Pixels]) -> Transform:
    def transform(file: bytes, rng: np.random.Generator) -> Pixels:
        pixels = decoder(file)
        height, width = pixels.shape[:2]
        rows, columns = random_window(height, width, AREA, rng)
        return _flip(resizer(pixels[rows, columns]), rng)

    return transform


def _with_scaling(file: bytes, rng: np.random.Generator) -> Pixels:
    """libjpeg's scaled decoding, 1/8 to 8/8, as long as the crop remains at least as large as the output."""
    height, width, *_ = simplejpeg.decode_jpeg_header(file)
    rows, columns = random_window(height, width, AREA, rng)
    least = SIZE / min(rows.stop - rows.start, columns.stop - columns.start)
    pixels = decode(file) if least >= 1 else simplejpeg.decode_jpeg(file, min_height=int(np.ceil(least * height)))
    return _flip(
        _resize(pixels[_rescaled(rows, pixels.shape[0] / height), _rescaled(columns, pixels.shape[1] / width)]), rng
    )


def _with_turboloader(file: bytes, rng: np.random.Generator) -> Pixels:
    turboloader: Any = importlib.import_module("turboloader")
    height, width, *_ = simplejpeg.decode_jpeg_header(file)
    rows, columns = random_window(height, width, AREA, rng)
    wide, high = columns.stop - columns.start, rows.stop - rows.start
    strip, left, *_ = turboloader.decode_jpeg_region(file, width, height, columns.start, rows.start, wide, high)
    return _flip(_resize(strip[:, columns.start - left : columns.stop - left]), rng)


def _rescaled(places: slice, factor: float) -> slice:
    return slice(round(places.start * factor), max(round(places.start * factor) + 1, round(places.stop * factor)))


def _flip(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    return np.asarray(cv2.flip(pixels, 1), np.uint8) if rng.random() < 0.5 else pixels


def _decode_fast(file: bytes) -> Pixels:
    pixels: Pixels = simplejpeg.decode_jpeg(file, fastdct=True, fastupsample=True)
    return pixels


def _decode_opencv(file: bytes) -> Pixels:
    return np.asarray(cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB), np.uint8)


def _resize(pixels: Pixels) -> Pixels:
    return resize(pixels, SIZE)


def _resize_area(pixels: Pixels) -> Pixels:
    return np.asarray(cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.uint8)


def _resize_linear(pixels: Pixels) -> Pixels:
    return np.asarray(cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR), np.uint8)


def _operations(files: list[bytes], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each operation on a crop, array to array with OpenCV and image to image with Pillow."""
    crops = [TrainTransform(SIZE)(decode(file), np.random.default_rng(n)) for n, file in enumerate(files)]
    images = [Image.fromarray(crop) for crop in crops]
    rows = []
    for name, operation in OPERATIONS.items():
        timings = interleaved(
            {
                "ours": partial(_each, operation, crops),
                "Pillow": partial(_each, PILLOW_OPERATIONS[name], images),
            },
            rounds=rounds, device=torch.device("cpu"), clock=time.process_time,
        )  # fmt: skip
        ours, pillow = timings["ours"], timings["Pillow"]
        per_crop = 1e3 / len(crops)
        rows.append(
            {
                "operation": name,
                "ms ours": ours.median * per_crop,
                "ms Pillow": pillow.median * per_crop,
                "speed": ours.speed_against(pillow),
            }
        )
    return rows


def _each(operation: Callable[[Any, float, np.random.Generator], object], images: Sequence[object]) -> None:
    for image in images:
        operation(image, 1.5, np.random.default_rng(0))


if __name__ == "__main__":
    main()

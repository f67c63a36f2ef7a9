"""What became of every entry of a source, from the listing of the source to the finished dataset."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.accounting import Accounting, listed
from data.building.build_folder import BuildPart
from data.building.class_folders import option
from data.building.conversion import UNCONVERTED, Conversion, Kind
from data.building.jpeg_encoding import QUALITY, SUBSAMPLING
from data.building.shard_plan import Images, Int32, Int64
from data.building.source import BrokenInput
from data.building.tar_members import LOST_LINK
from data.classes.class_remarks import remark_on_similar_classes, remark_on_unused_classes
from data.errors import DataError
from data.files.atomic_file import write_atomically
from data.files.json_records import parse_json, to_json
from data.text.printable import one_line

SAME_NAME = "another image has the same name"
ELSEWHERE = "in other parts"
_OWN_REASONS = {SAME_NAME, LOST_LINK, "no such file", *UNCONVERTED.values()}
"""Reasons that are the same for all entries; others are about one image."""


def save_listing(folder: Path, part: BuildPart, listing: Accounting) -> None:
    """Keep what a part has found in the whole source, in the `folder` of the build."""
    (folder / "listings").mkdir(exist_ok=True)
    path = folder / "listings" / f"{part.number}-of-{part.parts}.json"
    write_atomically(path, json.dumps(to_json(listing)), shared=True)


def read_listing(folder: Path) -> Accounting:
    """What the parts of a build have found in the source, each in all of it.

    Raises:
        DataError: they have found different things, or a file is missing or damaged.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in (folder / "listings").glob("*.json"):
        if match := re.fullmatch(r"(\d+)-of-(\d+)", path.stem):
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    parts = max((parts for parts, paths in found.items() if len(paths) == parts), default=0)
    if not parts:
        raise DataError(
            f"{folder}: no part has listed the source; run the parts again with: coatnet shards build ... --part"
        )
    listings = {}
    for number, path in sorted(found[parts].items()):
        try:
            listings[number] = parse_json(Accounting, path.read_bytes())
        except ValueError as error:
            raise DataError(
                f"{path}: not the listing of a part ({error}); read the part again with: coatnet shards build ... "
                f"--part {number}/{parts}"
            ) from None
    first = listings[1]
    for number, listing in listings.items():
        if listing != first:
            raise DataError(
                f"{folder}: part {number}/{parts} has found {listing.found:,} {listing.unit} in the source and part "
                f"1/{parts} {first.found:,}, or others; the source has changed in between: run all parts again"
            )
    return first


def account(
    listing: Accounting, images: Images, order: Int64, left_out: Iterable[BrokenInput], leave_out: Iterable[str]
) -> Accounting:
    """What became of every entry.

    Args:
        listing: what was found in the source.
        images: what was read of it.
        order: positions of the images that are taken.
        left_out: images, and rests of tars, that are not.
        leave_out: the patterns of `--leave-out`.
    """
    total = Accounting(listing.unit)
    unpacked = int(np.count_nonzero(images.kind[order] & Kind.GZIPPED))
    total.take("images", len(order) - unpacked)
    if unpacked:
        total.take("images that were compressed with gzip, unpacked", unpacked)
    total.add(listing)
    total.add(images.inside)
    for broken in left_out:
        name, reason = one_line(broken.name), broken.reason
        if reason in _OWN_REASONS:
            total.leave_out(reason, name)
        else:
            total.leave_out("lost in a damaged tar" if broken.is_tar else "broken", f"{name}: {reason}")
    unused = [pattern for pattern in leave_out if option(pattern) not in total.left_out]
    if unused:
        total.remark("unused_patterns", f"nothing matches {', '.join(map(option, unused))}")
    return total


def in_part(listing: Accounting, images: Images | None, elsewhere: int) -> Accounting:
    """What became of every entry as far as one part knows, of which `elsewhere` are in other parts.

    Args:
        images: what the part has read, None if nothing.
    """
    total = Accounting(listing.unit)
    if images is None:
        total.add(listing)
    else:
        total.add(account(listing, images, np.arange(len(images.rank)), images.broken, ()))
    total.take(ELSEWHERE, elsewhere)
    total.check()
    return total


def remark_on_conversion(accounting: Accounting, conversion: Conversion, kinds: NDArray[np.uint16]) -> None:
    """A remark on options of a conversion that has encoded none of the images, whose `kinds` (n,) are given."""
    if not conversion.encodes or np.any(kinds & Kind.ENCODED_AGAIN):
        return
    given = {
        "--convert": conversion.convert,
        f"--short-side {conversion.short_side}": conversion.short_side is not None,
        "--recompress": conversion.recompress,
        f"--quality {conversion.quality}": conversion.quality != QUALITY,
        f"--subsampling {conversion.subsampling}": conversion.subsampling != SUBSAMPLING,
    }
    options = [option for option, is_given in given.items() if is_given]
    fix = "" if conversion.recompress else "; --recompress encodes images that need no other change"
    accounting.remark(
        "nothing_encoded", f"no image was encoded again, so that nothing follows from {', '.join(options)}{fix}"
    )


def remark_on_classes(
    accounting: Accounting, classes: tuple[str, ...], images: Images, order: Int64, labels: Int32
) -> None:
    """Remarks on what a class list and labels (N, k), of the images in `order`, mean."""
    several = np.flatnonzero((labels >= 0).sum(axis=1) > 1)
    if several.size:
        first = int(several[0])
        names = ", ".join(one_line(classes[label]) for label in labels[first] if label >= 0)
        accounting.remark(
            "multi_label",
            f"the dataset is multi-label: {several.size:,} of {len(order):,} images have several labels (first: "
            f"{one_line(images.name(int(order[first])))}: {names}); for one with single labels, give each image one",
        )
    remark_on_similar_classes(accounting, classes)
    changed = next((name for name in images.classes if name not in classes and "." in name), None)
    if changed and changed.partition(".")[0] in classes:
        accounting.remark("whole_numbers", f"labels such as {changed} are read as whole numbers")
    unused = sorted(set(range(len(classes))) - set(np.unique(labels).tolist()))
    remark_on_unused_classes(accounting, [one_line(name) for name in classes], unused, "images")


def remark_on_lost_classes(accounting: Accounting, images: Images) -> None:
    """A remark on classes of which all images are broken, since they are not in a class list made from the images."""
    lost = sorted({name for broken in images.broken for name in broken.classes} - set(images.classes))
    if lost:
        accounting.remark(
            "lost_classes",
            f"{len(lost):,} classes have no image that can be read and are not in the class list "
            f"({listed([*map(one_line, lost)])}); to keep their numbers, give the class list with --classes",
        )


def remark_on_validation(accounting: Accounting, classes: tuple[str, ...], labels: list[Int32]) -> None:
    """A remark on classes that are in the training set alone, from the labels (n, k) of both sets."""
    if len(labels) < 2:
        return
    training, validation = (set(np.unique(part).tolist()) - {-1} for part in labels)
    absent = sorted(training - validation)
    if absent:
        names = listed([one_line(classes[number]) for number in absent])
        accounting.remark(
            "classes_without_validation",
            f"{len(absent):,} of {len(classes):,} classes have no image in the validation set ({names}), "
            "since they have too few: add images, or take a larger fraction",
        )

"""What a person should know about the class list of a dataset."""

import re
import unicodedata
from collections.abc import Iterator, Sequence

from data.accounting import Accounting, listed


def remark_on_similar_classes(accounting: Accounting, classes: Sequence[str]) -> None:
    """Remark on classes that are probably the same."""
    groups = [" and ".join(map(ascii, names)) for names in _similar(classes)]
    if groups:
        accounting.remark(
            "similar_classes",
            f"{len(groups):,} groups of class names differ only in case, spaces, hyphens, leading zeros or Unicode "
            f"form and stay different classes ({listed(groups, '; ')}); a label map (data.label_map) merges them",
        )


def remark_on_unused_classes(
    accounting: Accounting, classes: Sequence[str], unused: Sequence[int], entries: str
) -> None:
    """Remark on the classes with the numbers `unused`, which have no `entries`: no images, or no samples."""
    if unused:
        accounting.remark(
            "unused_classes",
            f"{len(unused):,} of {len(classes):,} classes have no {entries} "
            f"({listed([classes[number] for number in unused])}); the class list is decided by --classes",
        )


def _similar(names: Sequence[str]) -> Iterator[list[str]]:
    """Groups of names that differ only in case, spaces, hyphens, leading zeros or Unicode form."""
    groups: dict[str, list[str]] = {}
    for name in names:
        text = unicodedata.normalize("NFKC", name).casefold()
        if text.isdecimal():
            text = text.lstrip("0") or "0"
        groups.setdefault(" ".join(re.split(r"[\s_-]+", text)).strip(), []).append(name)
    return (found for found in groups.values() if len(found) > 1)

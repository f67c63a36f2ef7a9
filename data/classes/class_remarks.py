"""What a person should know about the class list of a dataset."""

from collections.abc import Sequence

from data.accounting import Accounting, listed
from data.classes.labels import look_alikes


def remark_on_similar_classes(accounting: Accounting, classes: Sequence[str]) -> None:
    """Remark on classes that are probably the same."""
    groups = [" and ".join(map(ascii, names)) for names in look_alikes(classes)]
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

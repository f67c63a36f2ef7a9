"""Text files with the labels of images and with class lists."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.index import FILE_NAME, read_index
from data.storage import Storage, is_remote, parent, read_bytes


@dataclass(frozen=True, slots=True)
class LabelFile:
    """Labels of the images of a flat folder or tar: by name, or without names for the images in sorted order."""

    location: str
    by_name: dict[str, tuple[str, ...]]
    in_order: list[tuple[str, ...]]

    def assign(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The labels of the images `names`, which are all images.

        Raises:
            DataError: the numbers of lines and images differ, an image has no labels, or labels have no image.
        """
        names = sorted(names)
        if self.in_order:
            if len(self.in_order) != len(names):
                raise DataError(
                    f"{self.location}: {len(self.in_order):,} labels for {len(names):,} images; it needs one line per "
                    "image, in the order of their names, or lines of NAME LABEL"
                )
            return dict(zip(names, self.in_order, strict=True))
        labels = {name: self.of(name) for name in names}
        self.refuse_unknown(labels)
        return labels

    def of(self, name: str) -> tuple[str, ...]:
        """The labels of an image by its name.

        Raises:
            DataError: it has none.
        """
        if name not in self.by_name:
            raise DataError(f"{self.location}: no label for the image {name}; add a line for it")
        return self.by_name[name]

    def refuse_unknown(self, names: Iterable[str]) -> None:
        """
        Raises:
            DataError: there are lines for other images than `names`.
        """
        unknown = sorted(self.by_name.keys() - set(names))
        if unknown:
            raise DataError(
                f"{self.location}: {len(unknown):,} lines name images that do not exist (first: {unknown[0]}); "
                "remove them or add the images"
            )


def split_line(line: str) -> tuple[str, tuple[str, ...]]:
    """Name and labels of a line: NAME<TAB>LABELS, NAME,LABELS or NAME LABELS; labels are separated by any of these."""
    line = line.strip()
    separator = "\t" if "\t" in line else "," if "," in line else None
    name, *rest = line.split(separator, 1)
    labels = " ".join(rest).replace(",", " ").split()
    return name.strip(), tuple(dict.fromkeys(labels))


def read_label_file(location: str, storage: Storage) -> LabelFile:
    """The label file at `location`.

    Raises:
        DataError: it does not exist, is empty, mixes lines with and without a name, or repeats an image.
    """
    by_name: dict[str, tuple[str, ...]] = {}
    bare: list[str] = []
    for number, line in enumerate(_text(location, storage).splitlines(), 1):
        if not line.strip():
            continue
        name, labels = split_line(line)
        if not labels:
            bare.append(name)
        elif name in by_name:
            raise DataError(f"{location}: line {number:,}: a second line for the image {name}; remove one")
        else:
            by_name[name] = labels
        if bare and by_name:
            raise DataError(
                f"{location}: line {number:,}: lines of NAME LABEL and lines of one word are mixed; either all have a "
                "name and a label, or all are labels in the order of the image names"
            )
    if not bare and not by_name:
        raise DataError(f"{location}: no labels in it; it needs lines of NAME LABEL")
    return LabelFile(location, by_name, [(label,) for label in bare])


def read_classes(location: str, storage: Storage) -> tuple[str, ...]:
    """The class list of a text file with one name per line, or of the index in a folder.

    Raises:
        DataError: there is neither, or the file has an empty line or a repeated name.
    """
    if location.endswith(FILE_NAME):
        return read_index(parent(location), storage).classes
    if location.endswith("/") or not (Path(location).is_file() or (is_remote(location) and location.endswith(".txt"))):
        return read_index(location, storage).classes
    names = [line.strip() for line in _text(location, storage).rstrip().splitlines()]
    # The line number is the class number: an empty line would shift the following classes.
    problem = (
        "no class in it"
        if not names
        else f"line {names.index('') + 1} is empty"
        if "" in names
        else next((f"class {name} is repeated" for name, count in Counter(names).items() if count > 1), "")
    )
    if problem:
        raise DataError(f"{location}: {problem}; it needs one class per line, each once")
    return tuple(names)


def _text(location: str, storage: Storage) -> str:
    try:
        return read_bytes(location, storage).decode("utf-8-sig", "surrogateescape")
    except FileNotFoundError:
        raise DataError(f"{location}: no such file") from None

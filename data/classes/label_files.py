"""Text files with the labels of images."""

import codecs
import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from data.building.formats import IMAGE_EXTENSIONS
from data.errors import DataError
from data.limits import LABEL_FILE_BYTES
from data.remote.storage import Storage, read_bytes
from data.text.printable import one_line


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
            natural = sorted(names, key=natural_order)
            if natural != names:
                place = next(n for n, (one, other) in enumerate(zip(names, natural, strict=True)) if one != other)
                raise DataError(
                    f"{self.location}: labels without names are for the images in sorted order, and these have two: as "
                    f"text {names[place]} is image {place + 1:,}, by number {natural[place]} is; write lines of "
                    "NAME LABEL"
                )
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
            raise DataError(f"{self.location}: no label for the image {one_line(name)}; {self._fix(name)}")
        return self.by_name[name]

    def _fix(self, name: str) -> str:
        """What to do about an image without a line: often it has one, in which its name is written differently."""
        alike = {name.lower(), name.lower().rpartition(".")[0]} - {""}
        for line in self.by_name:
            if re.split(r"[/\\]", line)[-1].lower() in alike:
                return (
                    f"the line of {one_line(line)} may be meant: write the names as those of the files, with extension "
                    "and without folder"
                )
        return "add a line for it"

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


class LabelLine(NamedTuple):
    """One line of a file of labels."""

    number: int
    name: str
    labels: tuple[str, ...]
    """Without repetition; empty if the line has a name only."""
    length: int
    """Characters since the previous line."""
    left_out: str = ""
    """Why the line names no image, if it does not."""


_NAME_HEADINGS = {"name", "path", "file", "image", "img", "key", "id"}
_LABEL_HEADINGS = {"label", "labels", "class", "classes", "class_id", "classid", "category", "category_id", "target"}
_HEADING_WORD = re.compile(r"[^a-z]+")
_SEPARATORS = {"\t": "tabs", ";": "semicolons", ",": "commas", "|": "bars"}


def label_lines(lines: Iterable[str], location: str) -> Iterator[LabelLine]:
    """All lines of a file of labels, also those that are left out.

    In `.csv` and `.tsv` every cell is one label, possibly quoted; a first line of headings is left out. Otherwise a
    line is NAME<TAB>LABELS, NAME,LABELS or NAME LABELS, and labels are separated by any of these.

    Raises:
        DataError: a quote that is not closed, headings of more than a name and a label, or a one-hot list.
    """
    if not location.lower().endswith((".csv", ".tsv")):
        for number, line in enumerate(lines, 1):
            name, labels = split_line(line) if line.strip() else ("", ())
            yield LabelLine(number, name, labels, len(line), "" if name else "empty")
        return
    read = 0

    def counted() -> Iterator[str]:
        nonlocal read
        for line in lines:
            read += len(line)
            yield line

    rows = csv.reader(counted(), delimiter="\t" if location.lower().endswith(".tsv") else ",", strict=True)
    before, first = 0, True
    try:
        for row in rows:
            cells = [cell.strip() for cell in row]
            left_out = "" if any(cells) else "empty"
            if first and not left_out:
                left_out, first = "headings" if _are_headings(cells, location) else "", False
            labels = () if left_out else tuple(dict.fromkeys(cell for cell in cells[1:] if cell))
            if len(labels) < len(cells) - 1 and set(cells[1:]) <= {"0", "1", "0.0", "1.0"} and labels:
                raise DataError(
                    f"{location}: line {rows.line_num:,}: {', '.join(cells[1:])} seems to be a one-hot list, and every "
                    "cell behind the name is a label; write the classes of the image instead"
                )
            yield LabelLine(rows.line_num, "" if left_out else cells[0], labels, read - before, left_out)
            before = read
    except csv.Error as error:
        raise DataError(f"{location}: line {rows.line_num:,}: {error}; correct its quotes") from None


def _are_headings(cells: list[str], location: str) -> bool:
    """Whether these are headings, of which there may be only two: other columns would become labels."""
    words = _HEADING_WORD.sub(" ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cells[0]).lower()).split()
    is_heading = any(word in _NAME_HEADINGS or word.startswith("file") for word in words) and "." not in cells[0]
    separator = next((separator for separator in _SEPARATORS if separator in cells[0]), None)
    if is_heading and len(cells) == 1 and separator:
        raise DataError(
            f"{location}: its columns are separated by {_SEPARATORS[separator]} ({one_line(cells[0])}), which are read "
            f"as one; separate them by {_separators_of(location)}"
        )
    if is_heading and len(cells) > 2:
        raise DataError(
            f"{location}: has {len(cells)} columns, {', '.join(cells)}, and every one behind the name would be a "
            "label; leave only that of the name and that of the label"
        )
    return is_heading


def split_line(line: str) -> tuple[str, tuple[str, ...]]:
    """Name and labels of a line of text."""
    line = line.strip()
    separator = "\t" if "\t" in line else "," if "," in line else None
    name, *rest = line.split(separator, 1)
    labels = " ".join(rest).replace(",", " ").split()
    return name.strip(), tuple(dict.fromkeys(labels))


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which `img2` comes before `img10`."""
    parts = re.split(r"([0-9]+)", name)
    # Numbers are compared by their lengths and then as text: int() refuses thousands of digits.
    return [_number_order(part) if place % 2 else (-1, part) for place, part in enumerate(parts)]


def _number_order(digits: str) -> tuple[int, str]:
    number = digits.lstrip("0")
    return len(number), number


def read_label_file(location: str, storage: Storage) -> LabelFile:
    """The label file at `location`.

    Raises:
        DataError: it does not exist, is empty, mixes lines with and without a name, or repeats an image.
    """
    by_name: dict[str, tuple[str, ...]] = {}
    bare: list[str] = []
    if location.lower().endswith((".json", ".jsonl", ".xml", ".yaml", ".yml")):
        raise DataError(f"{location}: labels are read from text, CSV and TSV; write lines of NAME LABEL")
    for number, name, labels, _, left_out in label_lines(
        io.StringIO(read_text(location, storage, LABEL_FILE_BYTES), newline=None), location
    ):
        if left_out:
            continue
        if not labels:
            bare.append(name)
        elif name in by_name:
            raise DataError(
                f"{location}: line {number:,}: a second line for the image {one_line(name)}; remove one, and if these "
                "are labels, swap the columns: names come first"
            )
        else:
            by_name[name] = labels
        if bare and by_name:
            raise DataError(
                f"{location}: line {number:,}: lines of NAME LABEL and lines of one word are mixed; either all have a "
                "name and a label, or all are labels in the order of the image names"
            )
    if not bare and not by_name:
        raise DataError(f"{location}: no labels in it; it needs lines of NAME LABEL")
    _refuse_names(location, bare)
    return LabelFile(location, by_name, [(label,) for label in bare])


def _refuse_names(location: str, bare: list[str]) -> None:
    """
    Raises:
        DataError: what should be labels in the order of the images begins with names or a heading.
    """
    for number, line in enumerate(bare, 1):
        for separator, plural in _SEPARATORS.items():
            cells = [cell.strip(' "') for cell in line.split(separator)]
            if len(cells) > 1 and (_is_image_name(cells[0]) or (number == 1 and _are_headings(cells[:2], location))):
                raise DataError(
                    f"{location}: its columns are separated by {plural} ({one_line(line)}), which are read as one; "
                    f"separate them by {_separators_of(location)}"
                )
        if _is_image_name(line):
            raise DataError(f"{location}: {one_line(line)} is the name of an image without a label; write NAME LABEL")
    if bare and bare[0].lower() in _LABEL_HEADINGS and bare[0] not in bare[1:]:
        raise DataError(f"{location}: its first line, {bare[0]}, seems to be a heading and not a label; remove it")


def _separators_of(location: str) -> str:
    return "tabs" if location.lower().endswith(".tsv") else "commas"


def _is_image_name(text: str) -> bool:
    return text.lower().endswith(IMAGE_EXTENSIONS)


def read_text(location: str, storage: Storage, most: int) -> str:
    """The text at `location`: UTF-8, other bytes as surrogates, or UTF-16 with a byte order mark.

    Raises:
        DataError: no such file, or it has more than `most` bytes.
    """
    try:
        content = read_bytes(location, storage, most=most)
    except FileNotFoundError:
        raise DataError(f"{location}: no such file") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    return content.decode("utf-8-sig", "surrogateescape")

"""Text files with the labels of images and with class lists."""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.building.formats import IMAGE_EXTENSIONS
from data.building.keys import readable
from data.errors import DataError
from data.index import FILE_NAME, read_index
from data.json_records import load_json
from data.remote.storage import Storage, is_remote, parent, read_bytes


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
            raise DataError(f"{self.location}: no label for the image {readable(name)}; {self._fix(name)}")
        return self.by_name[name]

    def _fix(self, name: str) -> str:
        """What to do about an image without a line: often it has one, in which its name is written differently."""
        alike = {name.lower(), name.lower().rpartition(".")[0]} - {""}
        for line in self.by_name:
            if re.split(r"[/\\]", line)[-1].lower() in alike:
                return (
                    f"the line of {readable(line)} may be meant: write the names as those of the files, with extension "
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
            f"{location}: its columns are separated by {_SEPARATORS[separator]} ({readable(cells[0])}), which are read "
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
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def read_label_file(location: str, storage: Storage) -> LabelFile:
    """The label file at `location`.

    Raises:
        DataError: it does not exist, is empty, mixes lines with and without a name, or repeats an image.
    """
    by_name: dict[str, tuple[str, ...]] = {}
    bare: list[str] = []
    if location.lower().endswith((".json", ".jsonl", ".xml", ".yaml", ".yml")):
        raise DataError(f"{location}: labels are read from text, CSV and TSV; write lines of NAME LABEL")
    for number, name, labels, _, left_out in label_lines(io.StringIO(_text(location, storage), newline=None), location):
        if left_out:
            continue
        if not labels:
            bare.append(name)
        elif name in by_name:
            raise DataError(
                f"{location}: line {number:,}: a second line for the image {readable(name)}; remove one, and if these "
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
                    f"{location}: its columns are separated by {plural} ({readable(line)}), which are read as one; "
                    f"separate them by {_separators_of(location)}"
                )
        if _is_image_name(line):
            raise DataError(f"{location}: {readable(line)} is the name of an image without a label; write NAME LABEL")
    if bare and bare[0].lower() in _LABEL_HEADINGS and bare[0] not in bare[1:]:
        raise DataError(f"{location}: its first line, {bare[0]}, seems to be a heading and not a label; remove it")


def _separators_of(location: str) -> str:
    return "tabs" if location.lower().endswith(".tsv") else "commas"


def _is_image_name(text: str) -> bool:
    return text.lower().endswith(IMAGE_EXTENSIONS)


@dataclass(frozen=True, slots=True)
class ClassList:
    """A class list from a file or an index: names in the order of the labels, and their ids such as WordNet's, if any.

    Names may be equal, as those of ImageNet are: they identify a class only if the labels are names.
    """

    location: str
    names: tuple[str, ...]
    ids: tuple[str, ...] | None = None

    def by_number(self) -> tuple[str, ...]:
        """The names, with the number or id of the class behind those that several classes have.

        Raises:
            DataError: they remain equal, or are the numbers of the classes in another order.
        """
        counts = Counter(self.names)
        ids = self.ids or tuple(map(str, range(len(self.names))))
        if sorted(self.names, key=natural_order) != list(self.names) and set(self.names) == set(
            map(str, range(len(self.names)))
        ):
            raise DataError(
                f"{self.location}: the classes are numbers in another order than the labels; write names, or leave out "
                "--classes"
            )
        unique = tuple(f"{n} ({i})" if counts[n] > 1 else n for n, i in zip(self.names, ids, strict=True))
        return unique if len(set(unique)) == len(unique) else self._refuse_repeated(unique)

    def by_name(self, labels: Collection[str] | None = None) -> tuple[str, ...]:
        """The names or the ids, whichever are the `labels`; the ids if these are not known.

        Raises:
            DataError: a name is repeated.
        """
        if self.ids is not None and (labels is None or not set(labels) <= set(self.names)):
            return self.ids if len(set(self.ids)) == len(self.ids) else self._refuse_repeated(self.ids)
        return self.names if len(set(self.names)) == len(self.names) else self._refuse_repeated(self.names)

    def _refuse_repeated(self, names: tuple[str, ...]) -> tuple[str, ...]:
        name, _ = Counter(names).most_common(1)[0]
        raise DataError(f"{self.location}: class {name} is repeated; it needs one class per line, each once")


def read_classes(location: str, storage: Storage) -> tuple[str, ...]:
    """The class list at `location`, see `read_class_list`.

    Raises:
        DataError: as for `read_class_list`, or a name is repeated.
    """
    return read_class_list(location, storage).by_name()


def read_class_list(location: str, storage: Storage) -> ClassList:
    """The class list of a text file with one name per line, of a JSON file, or of the index in a folder.

    All lines may have an id (WordNet's, or any before a tab) before the name, or a number, by which they are put in
    order. JSON may be a list, names by number (`{"0": "tench"}` or, with ids, `{"0": ["n01440764", "tench"]}`),
    or numbers by name.

    Raises:
        DataError: there is none of these, or the file has an empty line, a comment, headings, or numbers from 1.
    """
    if location.rpartition("/")[2] == FILE_NAME:
        return ClassList(location, read_index(parent(location), storage).classes)
    is_file = Path(location).is_file() or (is_remote(location) and location.endswith((".txt", ".json")))
    if not is_file and not is_remote(location) and not Path(location).is_dir():
        raise DataError(f"{location}: no such file or folder; --classes needs a class list or a folder with an index")
    if location.endswith("/") or not is_file:
        if Path(location).suffix in _CLASS_FILES and not is_remote(location) and not Path(location).exists():
            raise DataError(f"{location}: no such file")
        return ClassList(location, read_index(location, storage).classes)
    text = _text(location, storage)
    if _SURROGATE.search(text):
        raise DataError(f"{location}: not UTF-8; save it as UTF-8")
    return _json_classes(location, text) if location.endswith(".json") else _text_classes(location, text)


_CLASS_FILES = (".txt", ".json", ".csv", ".tsv", ".yaml", ".yml")
_CLASS_HEADINGS = {
    "category", "categories", "class", "classes", "class_name", "id", "index", "label", "labels", "name", "names",
    "synset", "wnid", "words",
}  # fmt: skip
_SURROGATE = re.compile("[\udc80-\udcff]")
_NUMBERED = (
    re.compile(r"(?P<number>[0-9]{1,9})\s*[\s:,;]\s*(?P<name>.*\S)"),
    re.compile(r"(?P<name>.*\S)\s*[\s:,;]\s*(?P<number>[0-9]{1,9})"),
)
_WITH_ID = re.compile(r"(n[0-9]{8})[\s,:]+(.*\S)|([^\t]*[^\t\s])\s*\t\s*([^\t]+)")


def _text_classes(location: str, text: str) -> ClassList:
    text = text.rstrip()
    if text.startswith(("[", "{")) and text.endswith(("]", "}")):
        try:
            load_json(text)
        except ValueError as error:
            raise DataError(
                f"{location}: looks like a list or dictionary and is not JSON ({error}); write JSON, or one class "
                "per line"
            ) from None
        return _json_classes(location, text)
    # Not `splitlines`, which also splits at characters that names may contain.
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)] if text else []
    # The line number is the class number: any other line would shift the following classes.
    comment = next((number for number, line in enumerate(lines, 1) if line.startswith("#")), None)
    headings = len(lines) > 1 and set(re.split(r"[\s,;]+", lines[0].casefold())) <= _CLASS_HEADINGS
    problem = (
        "no class in it"
        if not lines
        else f"line {lines.index('') + 1} is empty"
        if "" in lines
        else f"line {comment} is a comment"
        if comment
        else f"line 1, {lines[0]!r}, is a heading"
        if headings
        else "is YAML"
        if location.lower().endswith((".yaml", ".yml"))
        else "has columns"
        if location.lower().endswith(".csv") and any("," in line for line in lines)
        else ""
    )
    if problem:
        raise DataError(f"{location}: {problem}; it needs one class per line, each once (or JSON in a .json file)")
    names = _by_line_number(location, lines)
    with_ids = [_WITH_ID.fullmatch(name) for name in names]
    pairs = [tuple(filter(None, match.groups())) for match in with_ids if match is not None]
    if len(pairs) == len(names) and len({one for one, _ in pairs}) == len(names):
        ids, words = zip(*pairs, strict=True)
        return ClassList(location, tuple(_by_line_number(location, list(words))), ids)
    if tab := next((number for number, name in enumerate(names, 1) if "\t" in name), None):
        raise DataError(
            f"{location}: line {tab} has columns, and not all lines are an ID, a tab and a name; it needs one class "
            "per line, each once"
        )
    return ClassList(location, tuple(names))


def _by_line_number(location: str, lines: list[str]) -> list[str]:
    """The names in lines such as `3 cat`, `3: cat` or `cat 3`, in the order of the numbers; other lines as they are.

    Raises:
        DataError: the numbers are 1 to N.
    """
    for pattern in _NUMBERED:
        found = [match for match in map(pattern.fullmatch, lines) if match is not None]
        names = {int(match["number"]): match["name"].strip(" :,;-") for match in found}
        # Otherwise the numbers are parts of names, such as `class 3`.
        if len(names) < len(lines) or 2 * len(set(names.values())) <= len(lines):
            continue
        if sorted(names) == list(range(len(lines))):
            return [names[number] for number in range(len(lines))]
        if sorted(names) == list(range(1, len(lines) + 1)):
            raise DataError(
                f"{location}: the lines are numbered from 1 to {len(lines):,}; write the names only, one per line in "
                "the order of the numbers, and add --first-label 1 if the labels begin with 1"
            )
    return lines


def _json_classes(location: str, text: str) -> ClassList:
    try:
        content: Any = load_json(text)
        json.loads(text, object_pairs_hook=_refuse_repeated_key)
    except ValueError as error:
        raise DataError(f"{location}: not JSON ({error})") from None
    if isinstance(content, dict) and content and all(type(number) is int for number in content.values()):
        numbers_by_name = content
        content = {str(number): name for name, number in numbers_by_name.items()}
        content = content if len(content) == len(numbers_by_name) else None
    if isinstance(content, dict):
        content = [content.get(str(number)) for number in range(len(content))]
    ordered: list[Any] = content if isinstance(content, list) else []
    if ordered and all(isinstance(name, str) and name for name in ordered):
        return ClassList(location, tuple(map(str, ordered)))
    if ordered and all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(x, str) for x in one) for one in ordered
    ):
        return ClassList(location, tuple(str(name) for _, name in ordered), tuple(str(i) for i, _ in ordered))
    raise DataError(
        f'{location}: not a class list; it may be a list of names, or an object as {{"0": "tench", ...}} or {{"0": '
        '["n01440764", "tench"], ...} with all numbers from 0, or numbers by name'
    )


def _refuse_repeated_key(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = Counter(key for key, _ in pairs)
    if len(keys) < len(pairs):
        raise ValueError(f"the key {keys.most_common(1)[0][0]!r} is there twice")
    return dict(pairs)


def _text(location: str, storage: Storage) -> str:
    try:
        content = read_bytes(location, storage)
    except FileNotFoundError:
        raise DataError(f"{location}: no such file") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    return content.decode("utf-8-sig", "surrogateescape")

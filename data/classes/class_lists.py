"""Class lists: files with one name per line, JSON, or those of an index."""

import json
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.classes.label_files import natural_order, read_text
from data.errors import DataError
from data.files.json_records import load_json
from data.index import FILE_NAME, read_index
from data.limits import CLASS_LIST_BYTES
from data.remote.storage import Storage, is_remote, parent


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
    text = read_text(location, storage, CLASS_LIST_BYTES)
    if _SURROGATE.search(text):
        raise DataError(f"{location}: not UTF-8; save it as UTF-8")
    return _json_classes(location, text) if location.endswith(".json") else _text_classes(location, text)


_CLASS_FILES = (".txt", ".json", ".csv", ".tsv", ".yaml", ".yml")
_CLASS_HEADINGS = {
    "category", "categories", "class", "classes", "class_name", "id", "index", "label", "labels", "name", "names",
    "synset", "wnid", "words",
}  # fmt: skip
_SURROGATE = re.compile("[\udc80-\udcff]")
# No two parts in a row can match the same characters, so that long lines take no quadratic time.
_NUMBERED = (
    re.compile(r"(?P<number>[0-9]{1,9})(?:\s*[:,;]\s*|\s+)(?P<name>.*\S)"),
    re.compile(r"(?P<name>.*\S)(?:\s*[:,;]\s*|\s+)(?P<number>[0-9]{1,9})"),
)
_WITH_ID = re.compile(r"(n[0-9]{8})[\s,:]+(.*\S)|([^\t]*[^\t\s])[^\S\t]*\t\s*([^\t\s][^\t]*)")


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
    if ordered and all(isinstance(name, str) and name.strip() for name in ordered):
        return ClassList(location, tuple(map(str, ordered)))
    if ordered and all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(x, str) and x.strip() for x in one)
        for one in ordered
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

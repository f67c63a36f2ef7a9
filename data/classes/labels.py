"""Labels of samples, and maps from one class list to another."""

import codecs
import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.files.digest import json_sha256
from data.files.yaml_text import KeyPath, Unquoted, YamlError, read_yaml, yaml_file
from data.index import LabelFormat
from data.limits import LABEL_BYTES, LABELS_PER_SAMPLE


class IgnoredLabel(ValueError):
    """A sample has only labels that are ignored; the message says so."""


class LabelReader:
    """Content of a label member -> positions in the class list."""

    def __init__(self, label: LabelFormat, classes: tuple[str, ...]) -> None:
        self._label = label
        self._classes = len(classes)
        self._numbers = class_numbers(classes, label)

    def __call__(self, content: bytes) -> tuple[int, ...]:
        """The sample's classes, ascending, each once.

        Raises:
            IgnoredLabel: only labels that are ignored.
            ValueError: not a label, or not one of the classes; the message is the reason.
        """
        stored = stored_labels(content, self._label)
        if self._label.lists == "multi-hot" and len(stored) != self._classes:
            raise ValueError(
                f"the label is a list of {len(stored):,} numbers, not one for each of {self._classes:,} classes"
            )
        values = label_values(stored, self._label)
        found = {self._number(value) for value in values} - {IGNORED}
        if not found:
            raise IgnoredLabel(f"the label {values[0]!r} is ignored")
        return tuple(sorted(found))

    def _number(self, value: Any) -> int:
        if value in self._numbers:
            return self._numbers[value]
        if self._label.by == "name":
            raise ValueError(f"the label {value!r} is not in the class list")
        raise ValueError(f"the label {value} is not one of {self._classes:,} classes")


IGNORED = -1
"""In place of a position in the class list."""
_NUMBER = re.compile(r"[+-]?[0-9]+(\.0*)?")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_DECIMAL = re.compile(r"[+-]?[0-9]*\.[0-9]+|[+-]?nan", re.IGNORECASE)


def class_numbers(classes: tuple[str, ...], label: LabelFormat) -> dict[Any, int]:
    """Label -> position in the class list, or IGNORED."""
    first = 0 if label.by == "name" else label.first
    numbers = {name if label.by == "name" else first + number: number for number, name in enumerate(classes)}
    return numbers | {name if label.by == "name" else class_number(name): IGNORED for name in label.ignored}


def text_of(content: bytes) -> str:
    """The text of a file in UTF-8, or with the byte order mark of UTF-16; without the mark, surrounding spaces, and
    the zero bytes that end strings of fixed length.

    Raises:
        ValueError: it is not text.
    """
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if utf16 else "utf-8-sig").rstrip("\0").strip()
    if _CONTROL.search(text):
        raise ValueError("it is binary")
    return text


def stored_labels(content: bytes, label: LabelFormat) -> list[Any]:
    """What a label member contains: strings and numbers, at least one.

    Raises:
        ValueError: it contains no label.
    """
    if len(content) > LABEL_BYTES:
        raise ValueError(f"the label has more than {LABEL_BYTES:,} bytes")
    is_json = label.field.rpartition(".")[2] == "json"
    try:
        if not is_json:
            value: Any = text_of(content)
            if label.lists:
                value = json.loads(value) if value.startswith("[") else split_list(value)
        else:
            value = json.loads(content, object_pairs_hook=_json_object)
            value = value if label.key is None else value_at(value, label.key)
    except (ValueError, KeyError, TypeError, RecursionError):
        expected = f"JSON with {label.key!r}" if label.key else "JSON" if is_json else "text"
        raise ValueError(f"the label is not {expected}: {content[:40]!r}") from None
    if value is _REPEATED:
        raise ValueError(f"the key {label.key!r} is there twice in {content[:40]!r}")
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(v, str | int | float) and v != "" for v in found):
        raise ValueError(f"no label in {content[:40]!r}")
    return found


_REPEATED = object()
"""In place of the value of a key that a JSON object has twice: JSON does not say which one counts."""


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        found |= {key: _REPEATED for key, count in keys.items() if count > 1}
    return found


def value_at(value: Any, key: str) -> Any:
    """The value under `key` of a JSON object; a dot leads into nested objects unless it is part of the key.

    Raises:
        KeyError, TypeError: there is none.
    """
    if "." not in key or key in value:
        return value[key]
    for part in key.split("."):
        value = value[part]
    return value


def split_list(text: str) -> list[str]:
    """The items of a list in text, separated by line breaks, or else by commas, or else by spaces."""
    separator = "\n" if "\n" in text else "," if "," in text else None
    return [item.strip() for item in text.split(separator)]


def label_values(stored: list[Any], label: LabelFormat) -> list[Any]:
    """Class numbers or names from what a member contains, in its order.

    Raises:
        ValueError: something is not a number, a name, or a flag; no flag is set; or there are too many.
    """
    values = _label_values(stored, label)
    if len(values) > LABELS_PER_SAMPLE:
        raise ValueError(f"the sample has {len(values):,} labels; at most {LABELS_PER_SAMPLE:,} are read")
    return values


def _label_values(stored: list[Any], label: LabelFormat) -> list[Any]:
    if label.lists == "multi-hot":
        flags = [class_number(int(value) if isinstance(value, bool) else value) for value in stored]
        if not set(flags) <= {0, 1}:
            raise ValueError(f"the label {stored!r:.60} has other numbers than 0 and 1")
        if 1 not in flags:
            raise ValueError(f"the label has 0 for each of {len(flags):,} classes")
        return [number + label.first for number, flag in enumerate(flags) if flag]
    if label.by == "number":
        return [class_number(value) for value in stored]
    for value in stored:
        if not isinstance(value, str):
            raise ValueError(f"the label {value!r} is not a name")
    return stored


def class_number(value: Any) -> int:
    """The class number in a label, given as a whole number or as decimal digits, also `3.0`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    text = str(value).strip()
    if isinstance(value, bool) or not _NUMBER.fullmatch(text):
        raise ValueError(f"the label {text[:40]} is not a whole number" if is_decimal(value) else not_a_number(value))
    return int(text.partition(".")[0])


def is_number(value: Any) -> bool:
    """Whether `value` is a class number."""
    try:
        class_number(value)
    except ValueError:
        return False
    return True


def not_a_number(value: Any) -> str:
    """Why `value` is no class."""
    return f"the label {str(value)[:40]!r} is not a number"


def is_decimal(value: Any) -> bool:
    """Whether `value` is a number, or text of one, that is not whole."""
    return isinstance(value, float) or (isinstance(value, str) and bool(_DECIMAL.fullmatch(value.strip())))


@dataclass(frozen=True, slots=True, eq=False)
class LabelMap:
    """From the classes of an index to those of a run."""

    classes: tuple[str, ...]
    """The names of the new classes; a label is a position in this list."""
    targets: NDArray[np.int32]
    """(classes of the index,) the new class of each, -1 if it is dropped."""

    @property
    def digest(self) -> str:
        """sha256 of its content."""
        return json_sha256([self.classes, self.targets.tolist()])

    @property
    def drops(self) -> bool:
        """Whether any class is dropped."""
        return bool((self.targets < 0).any())

    def __call__(self, labels: tuple[int, ...]) -> tuple[int, ...]:
        """The new labels of a sample, ascending; empty if all of them are dropped."""
        return tuple(sorted({int(self.targets[label]) for label in labels if self.targets[label] >= 0}))


def read_label_map(path: str | Path, classes: tuple[str, ...]) -> LabelMap:
    """The label map in a YAML file, for an index with `classes`.

        rename: {n02085620: dog, n02123045: cat}    several classes may share a name
        others: keep                                or drop: what to do with classes that are not renamed
        classes: [cat, dog]                         optional: the new order, by default alphabetical

    Names are read as they are written: `no`, `010` and `1e3` are not a truth value and numbers.

    Raises:
        DataError: no such file, not a label map, or names that are not in the class list.
    """
    content, origins = _read_map(Path(path))
    if not isinstance(content, dict) or set(content) - {"rename", "others", "classes"}:
        raise DataError(f"{path}: a label map may only have the keys rename, others and classes")
    names, others, order = content.get("rename") or {}, content.get("others", "keep"), content.get("classes") or None
    lists_names = isinstance(order, list | None) and all(isinstance(name, str) for name in order or ())
    renames = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not renames or others not in ("keep", "drop") or not lists_names:
        raise DataError(f"{path}: rename must be a mapping of names, others keep or drop, classes a list of names")
    names = {old: str(new) for old, new in names.items()}
    unknown = sorted(set(names) - set(classes))
    if unknown:
        near = difflib.get_close_matches(unknown[0], classes, 1)
        raise DataError(
            f"{origins['rename', unknown[0]]}: {unknown[0]} is not a class of the shards ({len(unknown):,} of "
            f"{len(names):,} are not)" + (f"; did you mean {near[0]}?" if near else "")
        )
    afterwards = [names.get(name, name if others == "keep" else None) for name in classes]
    kept = {name for name in afterwards if name is not None}
    ordered = tuple(sorted(kept)) if order is None else tuple(map(str, order))
    if missing := sorted(kept - set(ordered)):
        raise DataError(f"{path}: {missing[0]} is missing under classes ({len(missing):,} names are)")
    if len(set(ordered)) != len(ordered) or not kept:
        raise DataError(f"{path}: {'a name is repeated under classes' if kept else 'no class is kept'}")
    added = set(names.values()) - set(classes)
    if alike := next((group for group in look_alikes(ordered) if added & set(group)), None):
        raise DataError(
            f"{path}: {alike[0]!a} and {alike[1]!a} differ in case, spaces or Unicode form only, and would be "
            "different classes; write them alike"
        )
    numbers = {name: number for number, name in enumerate(ordered)}
    return LabelMap(ordered, np.array([-1 if n is None else numbers[n] for n in afterwards], np.int32))


def _read_map(path: Path) -> tuple[Any, dict[KeyPath, str]]:
    """The content of a label map as text, and where each key of it is."""
    try:
        content, origins = read_yaml(yaml_file(path), str(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such label map") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except YamlError as error:
        raise DataError(str(error)) from None
    names = content.get("rename") if isinstance(content, dict) else None
    for old, new in names.items() if isinstance(names, dict) else ():
        is_null = isinstance(new, Unquoted) and new.lower() in _NO_NAMES
        if is_null or (isinstance(new, str) and not new.strip()):
            raise DataError(
                f"{origins['rename', old]}: {old}: {new.strip() or 'nothing'} is no name; to drop classes use others: "
                "drop and rename those that stay, if need be to themselves; quote it if a class is to be called that"
            )
    return content, origins


_NO_NAMES = {"", "~", "null", "none", "drop", "keep", "ignore"}


def look_alikes(names: Sequence[str]) -> Iterator[list[str]]:
    """Groups of names that differ only in case, spaces, hyphens, leading zeros or Unicode form."""
    groups: dict[str, list[str]] = {}
    for name in names:
        text = unicodedata.normalize("NFKC", name).casefold()
        if text.isdecimal():
            text = text.lstrip("0") or "0"
        elif not is_number(text):  # whose hyphen is a sign
            text = re.sub(r"[\s_-]+", " ", text).strip()
        groups.setdefault(text, []).append(name)
    return (found for found in groups.values() if len(found) > 1)

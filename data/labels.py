"""Labels of samples, and maps from one class list to another."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from data.digest import json_sha256
from data.errors import DataError
from data.index import LabelFormat


class LabelReader:
    """Content of a label member -> positions in the class list."""

    def __init__(self, label: LabelFormat, classes: tuple[str, ...]) -> None:
        self._label = label
        self._classes = len(classes)
        self._numbers = {name: number for number, name in enumerate(classes)} if label.by == "name" else {}

    def __call__(self, content: bytes) -> tuple[int, ...]:
        """The sample's classes, ascending, each once.

        Raises:
            ValueError: not a label, or not one of the classes; the message is the reason.
        """
        return tuple(sorted({self._number(value) for value in stored_labels(content, self._label)}))

    def _number(self, value: Any) -> int:
        if self._label.by == "name":
            if value not in self._numbers:
                raise ValueError(f"the label {value!r} is not in the class list")
            return self._numbers[value]
        number = class_number(value)
        if not 0 <= number < self._classes:
            raise ValueError(f"the label {number} is not one of {self._classes:,} classes")
        return number


def stored_labels(content: bytes, label: LabelFormat) -> list[Any]:
    """The labels in a label member, numbers or names; at least one.

    Raises:
        ValueError: it contains no label.
    """
    try:
        if label.field.rpartition(".")[2] != "json":
            value: Any = content.decode().strip()
        else:
            value = json.loads(content)
            value = value if label.key is None else value[label.key]
    except (ValueError, KeyError, TypeError, RecursionError):
        expected = f"JSON with {label.key!r}" if label.key else "JSON" if label.field.endswith("json") else "text"
        raise ValueError(f"the label is not {expected}: {content[:40]!r}") from None
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(v, str | int) and v != "" for v in found):
        raise ValueError(f"no label in {content[:40]!r}")
    return found


def class_number(value: Any) -> int:
    """The class number in a label, given as a number or as decimal digits.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, bool) or not str(value).lstrip("-").isdecimal():
        raise ValueError(f"the label {str(value)[:40]!r} is not a number")
    return int(value)


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

    Raises:
        DataError: no such file, not a label map, or names that are not in the class list.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such label map") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML ({error})") from error
    if not isinstance(content, dict) or set(content) - {"rename", "others", "classes"}:
        raise DataError(f"{path}: a label map may only have the keys rename, others and classes")
    rename, others, order = content.get("rename") or {}, content.get("others", "keep"), content.get("classes")
    if not isinstance(rename, dict) or others not in ("keep", "drop") or not isinstance(order, list | None):
        raise DataError(f"{path}: rename must be a mapping of names, others keep or drop, classes a list of names")
    unknown = sorted(str(name) for name in rename if str(name) not in set(classes))
    if unknown:
        raise DataError(
            f"{path}: {unknown[0]} is not a class of the shards ({len(unknown):,} of {len(rename):,} are not)"
        )
    names = {str(source): str(target) for source, target in rename.items()}
    afterwards = [names.get(name, name if others == "keep" else None) for name in classes]
    kept = {name for name in afterwards if name is not None}
    ordered = tuple(sorted(kept)) if order is None else tuple(str(name) for name in order)
    if missing := sorted(kept - set(ordered)):
        raise DataError(f"{path}: {missing[0]} is missing under classes ({len(missing):,} names are)")
    if len(set(ordered)) != len(ordered) or not kept:
        raise DataError(f"{path}: {'a name is repeated under classes' if kept else 'no class is kept'}")
    numbers = {name: number for number, name in enumerate(ordered)}
    return LabelMap(ordered, np.array([-1 if n is None else numbers[n] for n in afterwards], np.int32))

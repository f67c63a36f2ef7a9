"""The classes of a dataset as those of a model that was trained on another one, by their names."""

import difflib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data.classes.labels import LabelMap
from data.dataset import Dataset
from data.errors import DataError
from data.text.printable import one_line

_SHOWN = 5  # names


def for_classes(dataset: Dataset, classes: Sequence[str], whose: str, hint: str = "") -> Dataset:
    """The dataset with labels that are positions in `classes`, of which it may have fewer, in another order.

    Args:
        dataset: its label map, if any, has been applied.
        classes: names.
        whose: they are, for messages.
        hint: appended to the message that names differ.

    Raises:
        DataError: the dataset has classes that are not among them, or names are repeated.
    """
    classes = tuple(classes)
    if dataset.classes == classes:
        return dataset
    shards = dataset.index.home or dataset.index.folder
    for names, owner in ((classes, whose), (dataset.classes, shards)):
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"{owner}: several classes are called {one_line(repeated)}, so that classes cannot be matched by name; "
                "index the shards with the class list that the model was trained with: coatnet shards index ... "
                "--classes"
            )
    positions = {name: number for number, name in enumerate(classes)}
    missing = [name for name in dataset.classes if name not in positions]
    if missing:
        raise DataError(_difference(shards, dataset.classes, missing, whose, classes) + hint)
    targets = np.array([positions[name] for name in dataset.classes], np.int32)
    if dataset.label_map:
        before = dataset.label_map.targets
        targets = np.where(before >= 0, targets[before], np.int32(-1)).astype(np.int32)
    return replace(dataset, label_map=LabelMap(classes, targets))


def _difference(shards: str, own: Sequence[str], missing: Sequence[str], whose: str, classes: Sequence[str]) -> str:
    shown = ", ".join(map(one_line, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
    near = difflib.get_close_matches(missing[0], classes, 1)
    like = one_line(near[0] if near else classes[0])
    return (
        f"{shards}: {len(missing):,} of its {len(own):,} classes are not among the {len(classes):,} of {whose} "
        f"({shown}); say which they are by --label-map FILE, with lines such as `rename: "
        f"{{{one_line(missing[0])}: {like}}}`, and `others: drop` to leave out the samples of the others"
    )

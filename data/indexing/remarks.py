"""What a person should know about the labels of a dataset, with the option that decides it."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.accounting import Accounting, listed
from data.classes.class_remarks import remark_on_similar_classes, remark_on_unused_classes
from data.classes.label_files import natural_order
from data.classes.labels import class_number, is_number, split_list
from data.errors import DataError
from data.index import ShardIndex
from data.indexing.scan import Problem, ShardScan
from data.indexing.splits import describe_groups

_SEVERAL = 20
"""Samples of a small trial, of which each may have a class of its own."""
_FAR = 100  # numbers between the greatest label and the one before it


def remark_on(members: Accounting, index: ShardIndex, labels: NDArray[np.int32], scans: Sequence[ShardScan]) -> None:
    """Add the remarks on the shards, the class list and the labels (N, k) to `members`."""
    if groups := describe_groups([scan.entry.name for scan in scans]):
        members.remark("different_names", groups)
    for kind in dict.fromkeys(kind for scan in scans for kind in scan.remarks):
        concerned = [scan for scan in scans if kind in scan.remarks]
        more = f"; {len(concerned) - 1:,} more shards are like it" if len(concerned) > 1 else ""
        members.remark(kind, f"{concerned[0].entry.name} {concerned[0].remarks[kind]}{more}")
    _remark_on_shards(members, scans)
    scattered = sum(problem.problem == Problem.KEY_REPEATED for scan in scans for problem in scan.problems)
    if scattered:
        members.remark(
            "repeated_keys",
            f"{scattered:,} keys come again in their shard: the members of a sample must follow each other, as in "
            "a tar made with --sort=name",
        )
    repeated = sum(scan.repeated_labels for scan in scans)
    if repeated:
        members.remark("repeated_labels", f"{repeated:,} samples have a label more than once, which counts once")
    unseen = [
        label for label in index.label.ignored if not any(scan.samples_with(_stored(label, index)) for scan in scans)
    ]
    if unseen:
        members.remark("ignored_label_unseen", f"no sample has the label {', '.join(unseen)} of --ignore-label")
    minus_one = sum(scan.samples_with(-1) for scan in scans)
    if minus_one and index.label.by == "number" and "-1" not in index.label.ignored:
        members.remark(
            "label_minus_one",
            f"{minus_one:,} samples have the label -1; if it means that they are in none of the classes, leave them "
            "out of the epochs with --ignore-label -1",
        )
    _remark_on_labels(members, index, labels)


def refuse_captions(index: ShardIndex, labels: NDArray[np.int32]) -> None:
    """Refuse texts that were inferred to be labels and are sentences, most of which occur once; `cls` is for classes.

    Raises:
        DataError: they are.
    """
    label = index.label
    words = sum(" " in name for name in index.classes)
    mostly_once = 2 * len(index.classes) > (labels[:, 0] >= 0).sum()
    if label.by == "name" and label.field != "cls" and mostly_once and 2 * words > len(index.classes):
        option = f"--label-key {label.key}" if label.key else f"--label-field {label.field}"
        raise DataError(
            f"{index.folder}: the labels in the {label.field} members are probably captions: {len(index.classes):,} "
            f"different texts such as {index.classes[0][:60]!r} among {len(labels):,} samples; specify the labels with "
            f"--label-field, and in JSON their key with --label-key; {option} takes these texts as class names"
        )


def _stored(label: str, index: ShardIndex) -> int | str:
    return class_number(label) if index.label.by == "number" else label


def _remark_on_shards(members: Accounting, scans: Sequence[ShardScan]) -> None:
    """On shards with the same bytes, such as links to one file, and on those that are wholly unusable."""
    first: dict[str, str] = {}
    copies: list[tuple[str, str]] = []
    for entry in (scan.entry for scan in scans):
        if first.setdefault(entry.sha256, entry.name) != entry.name:
            copies.append((entry.name, first[entry.sha256]))
    if copies:
        members.remark(
            "identical_shards",
            f"warning: {len(copies):,} shards have the same content as others ({copies[0][0]} as {copies[0][1]}), so "
            "that their samples are in the dataset several times; remove or do not match the copies",
        )
    unusable = [
        scan.entry.name
        for scan in scans
        if scan.entry.samples > 1 and len({problem.place for problem in scan.problems}) == scan.entry.samples
    ]
    if unusable:
        members.remark(
            "shards_without_usable_samples",
            f"warning: no sample of {len(unusable):,} of {len(scans):,} shards is usable (first: {unusable[0]}); "
            "fields are inferred from the first shard: index shards with others separately",
        )


def _remark_on_labels(accounting: Accounting, index: ShardIndex, labels: NDArray[np.int32]) -> None:
    samples = len(labels)
    several = int((labels[:, 1:] >= 0).any(axis=1).sum())
    if several:
        accounting.remark(
            "multi_label",
            f"multi-label: {several:,} of {samples:,} samples have several classes, up to {labels.shape[1]}; training "
            "needs loss.kind: sigmoid",
        )
    counts = np.bincount(labels[labels >= 0], minlength=len(index.classes))
    absent = np.flatnonzero(counts == 0)
    by_number = index.label.by == "number"
    if by_number and index.label.first == 0 and absent.tolist() == [0] and len(index.classes) > 1:
        accounting.remark(
            "labels_from_1",
            f"no sample has the label 0, and all others up to {len(index.classes) - 1:,} occur; if the first class has "
            "the label 1, use --first-label 1; without it class 0 has no samples",
        )
    else:
        remark_on_unused_classes(accounting, index.classes, absent.tolist(), "samples")
    first = index.label.first
    if by_number and index.classes == tuple(map(str, range(first, first + len(index.classes)))):
        _remark_on_greatest(accounting, index, np.flatnonzero(counts), counts)
    remark_on_similar_classes(accounting, index.classes)
    if not by_number:
        _remark_on_names(accounting, index)
    present = int((counts > 0).sum())
    if 2 * present > samples and (not by_number or samples >= _SEVERAL):
        accounting.remark(
            "captions",
            f"warning: {present:,} classes among {samples:,} samples; are the {index.label.field} members "
            "labels? See --label-field",
        )


def _remark_on_names(accounting: Accounting, index: ShardIndex) -> None:
    """On names that may be something else."""
    numbers = [name for name in index.classes if is_number(name)]
    if 0 < len(numbers) < len(index.classes):
        accounting.remark(
            "numbers_among_names",
            f"{len(numbers):,} of {len(index.classes):,} class names are numbers ({listed(numbers)}); if "
            "others are wrong, use --label-by number",
        )
    natural = sorted(index.classes, key=natural_order)
    if list(index.classes) == sorted(index.classes) != natural:
        place = next(n for n, (one, other) in enumerate(zip(index.classes, natural, strict=True)) if one != other)
        accounting.remark(
            "classes_in_text_order",
            f"the classes are in the text order of their names, in which class {place:,} is {index.classes[place]!a} "
            f"and comes before {natural[place]!a}; --classes decides another order",
        )
    quoted = [name for name in index.classes if len(name) > 2 and re.fullmatch(r"""b?(['"]).*\1""", name)]
    if quoted:
        accounting.remark(
            "quoted_names",
            f"{len(quoted):,} of {len(index.classes):,} class names have quotes ({quoted[0]}), which are part of them",
        )
    known = set(index.classes)
    lists = [name for name in index.classes if "," in name and "\n" not in name and known >= set(split_list(name))]
    if lists:
        accounting.remark(
            "lists_in_names",
            f"{len(lists):,} of {len(index.classes):,} class names are lists of others ({lists[0]!a}); if they mean "
            "several classes, use --label-lists classes",
        )
    several = [name for name in index.classes if "\n" in name]
    if several:
        accounting.remark(
            "lines_in_names",
            f"{len(several):,} of {len(index.classes):,} class names have several lines ({several[0]!a}); if each "
            "line is a class, use --label-lists classes",
        )


def _remark_on_greatest(
    accounting: Accounting, index: ShardIndex, present: NDArray[np.int64], counts: NDArray[np.int64]
) -> None:
    """On a label far beyond all others, which are close together: by convention 255 or 65535 mean `ignore`."""
    if len(present) < 3:
        return
    second, greatest = present[-2:].tolist()
    if greatest - second > _FAR and greatest > 2 * second and 2 * (len(present) - 1) > second:
        label = greatest + index.label.first
        accounting.remark(
            "outlier_label",
            f"{counts[greatest]:,} samples have the label {label:,}, and no other is above "
            f"{second + index.label.first:,}; if it is none of the classes, leave its samples out with --ignore-label "
            f"{label}",
        )

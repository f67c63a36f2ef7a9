"""Several datasets among the shards that a pattern matches, such as training and validation shards in one folder."""

import re
from collections.abc import Iterable, Sequence

from data.errors import DataError
from data.indexing.pattern import ShardFiles
from data.remote.storage import join
from data.splits import SPLITS, name_words

_OTHER = "other"
_FIRST_GROUPS = 5


def refuse_several_splits(patterns: Sequence[str], files: ShardFiles) -> None:
    """
    Raises:
        DataError: the names tell of several splits, and the patterns do not name each of them.
    """
    words: dict[str, set[str]] = {}
    shards: dict[str, list[str]] = {}
    for name in map(_without_query, files.sizes):
        word = next((word for word in reversed(name_words(name)) if word in SPLITS), None)
        shards.setdefault(SPLITS[word] if word else _OTHER, []).append(name)
        if word is not None:
            words.setdefault(SPLITS[word], set()).add(word)
    if set(words) <= {"training"}:
        return
    named = set(name_words(" ".join(_explicit_part(pattern, len(patterns) > 1) for pattern in patterns)))
    if len(shards) == 1 or all(found & named for found in words.values()):
        return
    listing = ", ".join(f"{len(names):,} {split} ({names[0]})" for split, names in shards.items())
    commands = " and ".join(f"'{join(files.folder, naming_pattern(names))}'" for names in shards.values())
    raise DataError(
        f"{files.folder}: the shards are those of several splits: {listing}. Index each by its pattern, {commands}, "
        "and give all but one an --output of its own; or index all as one dataset with --mix-splits"
    )


def splits_of_folders(keys: Iterable[str]) -> dict[str, str]:
    """Part of a dataset -> the first key in a folder of its name, such as `train/n01440764/1`."""
    found: dict[str, str] = {}
    known: set[str] = set()
    for key in keys:
        folder = key.rpartition("/")[0]
        if folder in known:
            continue
        known.add(folder)
        word = next((part for part in folder.lower().split("/") if part in SPLITS), None)
        if word:
            found.setdefault(SPLITS[word], key)
    return found


def refuse_splits_in_shards(folder: str, found: Iterable[tuple[str, dict[str, str]]]) -> None:
    """Refuse shards whose members are in folders of several splits, given as name and `splits_of_folders`.

    Raises:
        DataError: they are.
    """
    first: dict[str, str] = {}
    for shard, splits in found:
        first |= {split: f"{key} in {shard}" for split, key in splits.items() if split not in first}
    if len(first) > 1:
        listing = ", ".join(f"{split} ({where})" for split, where in first.items())
        raise DataError(
            f"{folder}: the folders in the names of samples are those of several splits: {listing}. Write each split "
            "to shards of its own, or index all as one dataset with --mix-splits"
        )


def naming_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """The names that differ only by their numbers, by a pattern for them."""
    groups: dict[str, list[str]] = {}
    for name in map(_without_query, names):
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return {naming_pattern(found): found for found in groups.values()}


def describe_groups(names: Sequence[str]) -> str | None:
    """A remark about names that are not alike; None if they are, or if each has a name of its own."""
    groups = naming_groups(names)
    if len(groups) < 2 or 2 * len(groups) > len(names):
        return None
    listing = ", ".join(f"{pattern} ({len(found):,})" for pattern, found in list(groups.items())[:_FIRST_GROUPS])
    more = ", ..." if len(groups) > _FIRST_GROUPS else ""
    return f"shards with different names are indexed as one dataset: {listing}{more}; give a pattern to index some only"


def naming_pattern(names: Sequence[str]) -> str:
    """`x-{000..127}.tar` if the names are these, otherwise `x-*.tar`."""
    pieces = [re.fullmatch(r"(.*?)(\d+)(\D*)", name) for name in names]
    found = [piece.groups() for piece in pieces if piece is not None]
    if len(found) == len(names) > 0 and len({(start, end, len(digits)) for start, digits, end in found}) == 1:
        numbers = sorted(int(digits) for _, digits, _ in found)
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            start, digits, end = found[0]
            return f"{start}{{{numbers[0]:0{len(digits)}}..{numbers[-1]:0{len(digits)}}}}{end}"
    globs = {re.sub(r"\d+", "*", name) for name in names}
    if len(globs) == 1:
        return globs.pop()
    first, last = min(globs), max(globs)
    common = next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return f"{first[:common]}*.tar"


def _without_query(name: str) -> str:
    """Without the query of a web address, such as a signature."""
    return name.partition("?")[0]


def _explicit_part(pattern: str, several: bool) -> str:
    """The part of a pattern that says which shards of a folder are meant."""
    braces = " ".join(re.findall(r"\{[^}]*\}", pattern))
    last = pattern.rstrip("/").rpartition("/")[2]
    return f"{braces} {last}" if several or last.endswith(".tar") else braces

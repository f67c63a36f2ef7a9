"""Which shards a person means: a folder, a glob, or the brace patterns of WebDataset."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from data.errors import DataError
from data.storage import Storage, absolute, file_size, is_remote, join, list_files, parent

MOST_SHARDS = 1_000_000
"""More than any dataset has; a brace pattern of more is a slip of the finger."""
_WILDCARDS = "*?["
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})")


class ShardFiles(NamedTuple):
    """Tars, none of them opened yet."""

    folder: str
    """Absolute path or URL of the deepest folder that all lie under."""
    sizes: dict[str, int]
    """Name below the folder -> bytes, in the order of the names."""


def find_shards(patterns: Sequence[str], storage: Storage) -> ShardFiles:
    """The tars that `patterns` name, each once.

    A pattern is a folder (the `*.tar` in it), a glob (`**` for any depth), a tar, or any of these with braces:
    `s3://bucket/{train,more}/in21k-{0000..4095}.tar`. Hidden files are passed over.

    Raises:
        DataError: a pattern that cannot be read or names no tar, shards that are not there, or no common folder.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    found: dict[str, int] = {}
    single: dict[str, list[str]] = {}
    for pattern in patterns:
        for place in _expanded(pattern):
            if _is_one_tar(place):
                single.setdefault(parent(place), []).append(place.rpartition("/")[2])
            elif any(wildcard in place for wildcard in _WILDCARDS) and not Path(place).is_dir():
                found |= _globbed(place, storage)
            else:
                found |= _in_folder(place, storage)
    for folder, names in single.items():
        found |= _named(folder, names, storage)
    folder = _common_folder(list(found))
    return ShardFiles(folder, {place[len(folder) :].lstrip("/"): found[place] for place in sorted(found)})


def _expanded(pattern: str) -> Iterator[str]:
    """The places that a brace pattern stands for; local ones absolute."""
    # Ranges are looked at first because braceexpand holds each of them in memory.
    too_many = any(abs(int(last) - int(first)) >= MOST_SHARDS for first, last in _RANGE.findall(pattern))
    try:
        places = [pattern] if "{" not in pattern or too_many else list(islice(braceexpand(pattern), MOST_SHARDS + 1))
    except ValueError:
        raise DataError(f"{pattern}: a brace is not closed; write for example shard-{{0000..0099}}.tar") from None
    if too_many or len(places) > MOST_SHARDS:
        raise DataError(f"{pattern}: stands for more than {MOST_SHARDS:,} shards; check its ranges")
    yield from map(absolute, places)


def _is_one_tar(place: str) -> bool:
    if not is_remote(place) and Path(place).is_file():
        if not place.endswith(".tar"):
            raise DataError(f"{place}: not a .tar; shards are uncompressed tars, as random access needs them")
        return True
    if place.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
        raise DataError(f"{place}: compressed tars cannot be read at random places; unpack the compression first")
    is_folder = not is_remote(place) and Path(place).is_dir()
    return place.endswith(".tar") and not is_folder and not any(wildcard in place for wildcard in _WILDCARDS)


def _is_shard(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.endswith(".tar") and not base.startswith(".")


def _listed(folder: str, storage: Storage, *, below: bool) -> dict[str, int]:
    try:
        return list_files(folder, storage, below=below)
    except FileNotFoundError:
        raise DataError(f"{folder}: no such folder; check the pattern and where the shards lie") from None


def _in_folder(folder: str, storage: Storage) -> dict[str, int]:
    names = {name: size for name, size in _listed(folder, storage, below=False).items() if _is_shard(name)}
    if not names:
        raise DataError(f"{folder}: no *.tar in it; for those in folders below name {join(folder, '**/*.tar')}")
    return {join(folder, name): size for name, size in names.items()}


def _globbed(glob: str, storage: Storage) -> dict[str, int]:
    parts = glob.split("/")
    first = next(place for place, part in enumerate(parts) if any(wildcard in part for wildcard in _WILDCARDS))
    folder, wanted = "/".join(parts[:first]) or "/", parts[first:]
    below = len(wanted) > 1 or wanted == ["**"]
    names = {
        name: size
        for name, size in _listed(folder, storage, below=below).items()
        if _is_shard(name) and _matches(name.split("/"), wanted)
    }
    if not names:
        raise DataError(f"{glob}: matches no *.tar; check the pattern")
    return {join(folder, name): size for name, size in names.items()}


def _matches(parts: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_matches(parts[skipped:], wanted[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def _named(folder: str, names: list[str], storage: Storage) -> dict[str, int]:
    if folder.startswith("http"):  # web servers need not list folders
        with ThreadPoolExecutor(16) as executor:
            asked = executor.map(lambda name: _size_or_none(join(folder, name), storage), names)
            sizes = {name: size for name, size in zip(names, asked, strict=True) if size is not None}
    else:
        sizes = _listed(folder, storage, below=False)
    missing = [name for name in names if name not in sizes]
    if missing:
        raise DataError(
            f"{folder}: {len(missing):,} of {len(names):,} shards are not there: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; copy them there or name only those that are"
        )
    return {join(folder, name): sizes[name] for name in names}


def _size_or_none(location: str, storage: Storage) -> int | None:
    try:
        return file_size(location, storage)
    except FileNotFoundError:
        return None


def _common_folder(places: list[str]) -> str:
    folders = [parent(place).split("/") for place in places]
    first, last = min(folders), max(folders)
    common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    if any(map(is_remote, places)) and len(common) < 3:  # "s3:", "", bucket
        raise DataError(f"{'/'.join(first)} and {'/'.join(last)} lie in no common folder; index them one by one")
    return "/".join(common) or "/"

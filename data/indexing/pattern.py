"""Finding shards by pattern: a folder, a glob, or the brace notation of WebDataset."""

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
"""More than any dataset has; a brace pattern of more is a typing error."""
_WILDCARDS = "*?["
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})")


class ShardFiles(NamedTuple):
    """Tars that match, not opened yet."""

    folder: str
    """Absolute path or URL of the deepest folder that contains all of them."""
    sizes: dict[str, int]
    """Path below the folder -> bytes, sorted by path."""


def find_shards(patterns: Sequence[str], storage: Storage) -> ShardFiles:
    """The tars that match `patterns`, each once.

    A pattern is a folder (the `*.tar` in it), a glob (`**` for any depth), a tar, or any of these with braces:
    `s3://bucket/{train,more}/in21k-{0000..4095}.tar`. Hidden files are ignored.

    Raises:
        DataError: a pattern that is malformed or matches no tar, missing shards, or no common folder.
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
    """The locations that a brace pattern expands to; local ones absolute."""
    # Ranges are checked first because braceexpand holds each of them in memory.
    too_many = any(abs(int(last) - int(first)) >= MOST_SHARDS for first, last in _RANGE.findall(pattern))
    try:
        places = [pattern] if "{" not in pattern or too_many else list(islice(braceexpand(pattern), MOST_SHARDS + 1))
    except ValueError:
        raise DataError(f"{pattern}: a brace is not closed; write for example shard-{{0000..0099}}.tar") from None
    if too_many or len(places) > MOST_SHARDS:
        raise DataError(f"{pattern}: expands to more than {MOST_SHARDS:,} shards; check its ranges")
    yield from map(absolute, places)


def _is_one_tar(place: str) -> bool:
    if not is_remote(place) and Path(place).is_file():
        if not place.endswith(".tar"):
            raise DataError(f"{place}: not a .tar; shards are uncompressed tars, as random access needs them")
        return True
    if place.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
        raise DataError(f"{place}: compressed tars have no random access; decompress them first")
    is_folder = not is_remote(place) and Path(place).is_dir()
    return place.endswith(".tar") and not is_folder and not any(wildcard in place for wildcard in _WILDCARDS)


def _is_shard(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.endswith(".tar") and not base.startswith(".")


def _listed(folder: str, storage: Storage, *, below: bool) -> dict[str, int]:
    try:
        return list_files(folder, storage, below=below)
    except FileNotFoundError:
        raise DataError(f"{folder}: no such folder; check the pattern and the location of the shards") from None


def _in_folder(folder: str, storage: Storage) -> dict[str, int]:
    names = {name: size for name, size in _listed(folder, storage, below=False).items() if _is_shard(name)}
    if not names:
        raise DataError(f"{folder}: no *.tar in it; for those in subfolders use {join(folder, '**/*.tar')}")
    return {join(folder, name): size for name, size in names.items()}


def _globbed(glob: str, storage: Storage) -> dict[str, int]:
    parts = glob.split("/")
    first = next(place for place, part in enumerate(parts) if any(wildcard in part for wildcard in _WILDCARDS))
    folder, remaining = "/".join(parts[:first]) or "/", parts[first:]
    below = len(remaining) > 1 or remaining == ["**"]
    names = {
        name: size
        for name, size in _listed(folder, storage, below=below).items()
        if _is_shard(name) and _matches(name.split("/"), remaining)
    }
    if not names:
        raise DataError(f"{glob}: matches no *.tar; check the pattern")
    return {join(folder, name): size for name, size in names.items()}


def _matches(parts: list[str], glob: list[str]) -> bool:
    if not glob:
        return not parts
    if glob[0] == "**":
        return any(_matches(parts[skipped:], glob[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], glob[0]) and _matches(parts[1:], glob[1:])


def _named(folder: str, names: list[str], storage: Storage) -> dict[str, int]:
    if folder.startswith("http"):  # web servers need not list folders
        with ThreadPoolExecutor(16) as executor:
            found = executor.map(lambda name: _size_or_none(join(folder, name), storage), names)
            sizes = {name: size for name, size in zip(names, found, strict=True) if size is not None}
    else:
        sizes = _listed(folder, storage, below=False)
    missing = [name for name in names if name not in sizes]
    if missing:
        raise DataError(
            f"{folder}: {len(missing):,} of {len(names):,} shards are missing: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; copy them there or list only existing ones"
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
        raise DataError(f"{'/'.join(first)} and {'/'.join(last)} have no common folder; index them separately")
    return "/".join(common) or "/"

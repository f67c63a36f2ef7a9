"""Finding shards by pattern: a folder, a glob, or the brace notation of WebDataset."""

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from data.errors import DataError, StorageRefused
from data.files.hidden import is_hidden
from data.remote.storage import Storage, absolute, is_remote, join, list_files, named_sizes, parent
from data.remote.web_address import split_query, without_signature
from data.tar import COMPRESSED_TAR_EXTENSIONS, UNREAD_TAR_EXTENSIONS

MOST_SHARDS = 1_000_000
"""More than any dataset has; a brace pattern of more is a typing error."""
WILDCARDS = "*?["
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
    `s3://bucket/{train,more}/in21k-{0000..4095}.tar`. A folder or tar whose name looks like a glob is meant literally
    if it exists. Hidden files are ignored. A web address keeps its query.

    Raises:
        DataError: a pattern that is malformed or matches no tar, missing shards, or no common folder.
        StorageRefused, StorageDown: access refused, or no answer.
    """

    @cache
    def listed(folder: str) -> dict[str, int] | None:
        try:
            return list_files(folder, storage)
        except FileNotFoundError:
            return None

    found: dict[str, int] = {}
    single: dict[str, list[str]] = {}
    for pattern in patterns:
        for place in _expanded(pattern):
            path, query = split_query(place)
            first = _first_glob(path, query, listed, storage)
            if first is not None:
                found |= _globbed(path, query, first, storage)
            elif _is_one_tar(path):
                single.setdefault(parent(path), []).append(path.rpartition("/")[2] + query)
            else:
                found |= _in_folder(place, storage)
    for folder, names in single.items():
        found |= _named(folder, names, storage)
    queries = {split_query(place)[1] for place in found}
    folder = _common_folder([split_query(place)[0] for place in found])
    if len(queries) == 1:  # one token for all, which is no part of their names
        found = {split_query(place)[0]: size for place, size in found.items()}
    names_and_sizes = {place[len(folder) :].lstrip("/"): found[place] for place in sorted(found)}
    return ShardFiles(folder + (queries.pop() if len(queries) == 1 else ""), names_and_sizes)


def _first_glob(path: str, query: str, listed: Callable[[str], dict[str, int] | None], storage: Storage) -> int | None:
    """The first of the parts of `path` between slashes that is a glob; None if there is none.

    A part with wildcards in it is none if a file or folder of exactly this name exists.
    """
    parts = path.split("/")
    globs = [place for place, part in enumerate(parts) if any(wildcard in part for wildcard in WILDCARDS)]
    if globs and path.startswith("http") and path.endswith(".tar"):  # web servers need not list folders
        folder, _, name = path.rpartition("/")
        return None if named_sizes(folder, [name + query], storage) else globs[0]
    for place in globs:
        folder = "/".join(parts[: place + 1])
        if not is_remote(path):
            exists = Path(folder).exists()
        elif place == len(parts) - 1 and path.endswith(".tar"):
            exists = parts[place] in (listed("/".join(parts[:place])) or {})
        else:
            found = listed(folder + query)
            exists = bool(found) if path.startswith("http") else found is not None
        if not exists:
            return place
    return None


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


def _is_one_tar(path: str) -> bool:
    if not is_remote(path) and Path(path).is_file():
        if not path.endswith(".tar"):
            raise DataError(f"{path}: not a .tar; shards are uncompressed tars, as random access needs them")
        return True
    if path.endswith((*COMPRESSED_TAR_EXTENSIONS, *UNREAD_TAR_EXTENSIONS)):
        raise DataError(f"{path}: compressed tars have no random access; decompress them first")
    is_folder = not is_remote(path) and Path(path).is_dir()
    return path.endswith(".tar") and not is_folder


def is_shard(name: str) -> bool:
    """Whether a file of this name is a shard: an uncompressed tar that is not hidden."""
    base = name.rpartition("/")[2]
    return base.endswith(".tar") and not is_hidden(base)


def _listed(folder: str, storage: Storage, *, below: bool) -> dict[str, int]:
    shown = without_signature(folder)
    web = folder.startswith("http")
    name_them = f"a web server need not list a folder: name the shards, as in {shown}/shard-{{0000..0099}}.tar"
    try:
        return list_files(folder, storage, below=below)
    except FileNotFoundError:
        fix = name_them if web else "check the pattern and the location of the shards"
        raise DataError(f"{shown}: no such folder; {fix}") from None
    except StorageRefused as error:
        raise StorageRefused(f"{error}; {name_them}") if web else error from None


def _in_folder(folder: str, storage: Storage) -> dict[str, int]:
    found = _listed(folder, storage, below=False)
    names = {name: size for name, size in found.items() if is_shard(name)}
    if not names:
        shown = without_signature(folder)
        alike = [name for name in found if re.search(r"\.(tar|tgz)(\.|$)", name, re.IGNORECASE)]
        if alike:
            raise DataError(
                f"{shown}: no *.tar in it, but {len(alike):,} files such as {alike[0]}; shards are uncompressed tars "
                "whose names end in .tar: decompress or rename them"
            )
        raise DataError(f"{shown}: no *.tar in it; for those in subfolders use {join(shown, '**/*.tar')}")
    return {join(folder, name): size for name, size in names.items()}


def _globbed(path: str, query: str, first: int, storage: Storage) -> dict[str, int]:
    """The tars that match the glob `path`, whose parts before `first` are literal."""
    parts = path.split("/")
    folder, remaining = ("/".join(parts[:first]) or "/") + query, parts[first:]
    below = len(remaining) > 1 or remaining == ["**"]
    names = {
        name: size
        for name, size in _listed(folder, storage, below=below).items()
        if is_shard(name) and matches_glob(name.split("/"), remaining)
    }
    if not names:
        raise DataError(f"{path}: matches no *.tar; check the pattern")
    return {join(folder, name): size for name, size in names.items()}


def matches_glob(parts: list[str], glob: list[str]) -> bool:
    """Whether a path matches a glob, both split at slashes; `**` matches folders of any depth."""
    if not glob:
        return not parts
    if glob[0] == "**":
        return any(matches_glob(parts[skipped:], glob[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], glob[0]) and matches_glob(parts[1:], glob[1:])


def _named(folder: str, names: list[str], storage: Storage) -> dict[str, int]:
    try:
        sizes = named_sizes(folder, names, storage)
    except FileNotFoundError:
        raise DataError(f"{folder}: no such folder; check the pattern and the location of the shards") from None
    missing = [name.partition("?")[0] if folder.startswith("http") else name for name in names if name not in sizes]
    if missing:
        raise DataError(
            f"{folder}: {len(missing):,} of {len(names):,} shards are missing: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; copy them there or list only existing ones"
        )
    return {join(folder, name): sizes[name] for name in names}


def _common_folder(places: list[str]) -> str:
    folders = [parent(place).split("/") for place in places]
    first, last = min(folders), max(folders)
    common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    if any(map(is_remote, places)) and len(common) < 3:  # "s3:", "", bucket
        raise DataError(f"{'/'.join(first)} and {'/'.join(last)} have no common folder; index them separately")
    return "/".join(common) or "/"

"""What became of every file in the folders of the shards, and of every member of the shards."""

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data.accounting import REPORT_NAME, Accounting
from data.building.build_record import RECORD_NAME
from data.errors import StorageRefused
from data.files.hidden import is_hidden
from data.index import FILE_NAME, LABELS_NAME
from data.indexing.pattern import ShardFiles
from data.indexing.scan import IMAGE, LABEL, LabelRows, SampleProblem, ShardScan
from data.remote.storage import Storage, is_remote, join, list_files, list_folders
from data.tar import COMPRESSED_TAR_EXTENSIONS, UNREAD_TAR_EXTENSIONS

_FOLDERS_LISTED = 50
"""Remote folders up to which each is listed by a request of its own."""


def account_members(scan: ShardScan, labels: LabelRows) -> Accounting:
    """The members of one shard: those of usable samples are taken."""
    accounting = Accounting("members")
    accounting.add(scan.other_members)
    first: dict[int, SampleProblem] = {}
    for problem in [*scan.problems, *labels.unknown]:
        first.setdefault(problem.place, problem)
    left_out: NDArray[np.bool_] = labels.ignored.copy()
    left_out[list(first)] = True
    for place, problem in sorted(first.items()):
        accounting.leave_out(f"of samples with {problem.problem}", *_names(scan, place, problem.key))
    ignored = [place for place in np.flatnonzero(labels.ignored).tolist() if place not in first]
    keys = scan.keys if ignored else []
    for place in ignored:
        accounting.leave_out("of samples with a label to be ignored", *_names(scan, place, keys[place]))
    taken = int((~left_out).sum())
    if taken:
        accounting.take("images", taken)
        accounting.take("labels", taken)
    return accounting


def _names(scan: ShardScan, place: int, key: str) -> list[str]:
    has = int(scan.sample_members[place])
    return [f"{scan.entry.name}: {key} ({use})" for flag, use in ((IMAGE, "image"), (LABEL, "label")) if has & flag]


def account_files(files: ShardFiles, left_out: Mapping[str, str], storage: Storage) -> Accounting:
    """The files in the folders of the shards.

    Args:
        files: the shards that match.
        left_out: shard -> why it is left out.
        storage: how to access them.

    Raises:
        StorageDown: no answer.
    """
    accounting = Accounting("files")
    folders = sorted({_folder(name) for name in files.sizes})
    try:
        entries = list(_entries(files, folders, storage))
    except (StorageRefused, FileNotFoundError):
        entries = [(name, False) for name in files.sizes]
        accounting.remark("not_listed", f"{files.folder}: cannot be listed, so that other files in it are not known")
    for name, is_folder in entries:
        if is_folder and any(folder == name or folder.startswith(f"{name}/") for folder in folders):
            continue
        accounting.found += 1
        if name in files.sizes and name not in left_out:
            accounting.take("shards")
        else:
            accounting.leave_out(left_out[name] if name in left_out else _why_no_shard(name, is_folder), name)
    return accounting


def _entries(files: ShardFiles, folders: Sequence[str], storage: Storage) -> Iterator[tuple[str, bool]]:
    """Path below the folder of all shards, and whether it is a folder, of everything in `folders`; sorted."""
    if files.folder.startswith("http"):  # web servers need not list folders
        yield from ((name, False) for name in files.sizes)
        return
    if is_remote(files.folder) and len(folders) > _FOLDERS_LISTED:
        searched = set(folders)
        below = list_files(files.folder, storage, below=True)
        yield from ((name, False) for name in below if _folder(name) in searched)
        return
    for folder in folders:
        place = join(files.folder, folder) if folder else files.folder
        found: dict[str, bool] = {}
        if is_remote(place):
            found |= dict.fromkeys(list_folders(place, storage), True) | dict.fromkeys(
                list_files(place, storage), False
            )
        else:
            with os.scandir(place) as entries:
                found |= {entry.name: entry.is_dir() for entry in entries}
        yield from ((join(folder, name) if folder else name, found[name]) for name in sorted(found))


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _why_no_shard(name: str, is_folder: bool) -> str:
    base = name.rpartition("/")[2]
    if is_hidden(base):
        return "hidden"
    if is_folder:
        return "folders, which are not searched (a pattern with ** does)"
    if base in (FILE_NAME, LABELS_NAME, REPORT_NAME, RECORD_NAME):
        return "files of an index"
    if base.lower().endswith((*COMPRESSED_TAR_EXTENSIONS, *UNREAD_TAR_EXTENSIONS)):
        return "compressed tars (decompress them)"
    if base.endswith(".tar"):
        return "tars that the patterns do not match, or links to nothing"
    return "files that are not tars"

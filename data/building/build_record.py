"""What a folder of shards was built from and how: `build.json`, which every build leaves in its destination.

A recipe with a section `shards` is compared with it, so that shards of another source or with other options are not
taken for those that the recipe describes.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.building.jpeg_encoding import QUALITY, SUBSAMPLING
from data.errors import DataError
from data.files.atomic_file import write_atomically
from data.files.digest import json_sha256
from data.files.hidden import is_hidden
from data.files.json_records import parse_json, to_json
from data.remote.storage import is_remote
from data.remote.web_address import without_signature

RECORD_NAME = "build.json"
DEFAULTS: Mapping[str, Any] = {"quality": QUALITY, "subsampling": SUBSAMPLING}
"""Of options that a recipe may leave out; the others are off."""
LEFT_OUT: Mapping[str, Any] = {"subsampling": SUBSAMPLING, "recompress": False, "restart_markers": False}
"""Options that a record has only if they differ from this; older builds did not have them."""
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class SourceState:
    """What can be known of a local source without listing all of it; None where nothing is."""

    bytes: int | None = None
    """Of a file."""
    parts: int | None = None
    """Folders and tars directly in a folder."""
    parts_sha256: str | None = None
    """Of their names."""
    modified: int | None = None
    """When a file, or a folder or one of the folders in it, was last modified; nanoseconds since the epoch."""


NOTHING_KNOWN = SourceState()


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """What shards were built from and with.

    Args:
        source: absolute path, or URL without its query, which may be a signature.
        source_beside: the path from the shards to the source, which stays the same when both are moved.
        state: of the source when the build began.
        options: of `build_shards`, by name.
    """

    source: str
    source_beside: str | None
    state: SourceState
    options: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write it into the `folder` of the shards."""
        write_atomically(folder / RECORD_NAME, json.dumps(to_json(self), indent=1) + "\n", shared=True)


def source_beside(source: str, destination: Path) -> str | None:
    """The path from the shards in `destination` to a local source."""
    return None if is_remote(source) else os.path.relpath(os.path.realpath(source), os.path.realpath(destination))


def source_state(source: str) -> SourceState:
    """The present state of a source; nothing is known of one that is remote or does not exist."""
    if is_remote(source) or not os.path.exists(source):
        return NOTHING_KNOWN
    modified = os.stat(source).st_mtime_ns
    if os.path.isfile(source):
        return SourceState(bytes=os.path.getsize(source), modified=modified)
    names = []
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.is_dir() and not is_hidden(entry.name):
                modified = max(modified, entry.stat().st_mtime_ns)
                names.append(entry.name)
            elif entry.name.lower().endswith(".tar") and not is_hidden(entry.name):
                names.append(entry.name)
    return SourceState(parts=len(names), parts_sha256=json_sha256(sorted(names)), modified=modified)


def read_record(folder: Path) -> BuildRecord | None:
    """What the shards in `folder` were built from and with; None if a build has left no record there.

    Raises:
        DataError: the record is damaged.
    """
    try:
        return parse_json(BuildRecord, (folder / RECORD_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(
            f"{folder / RECORD_NAME}: not the record of a build ({error}); build the shards again"
        ) from None


def differences(record: BuildRecord, folder: Path, source: str, options: Mapping[str, Any]) -> list[str]:
    """What `source` and `options` say otherwise than the record of the shards in `folder`, a line for each setting.

    Args:
        record: of the shards.
        folder: of the shards.
        source: absolute path, or URL.
        options: some of those of `build_shards`; those that are missing have their defaults.
    """
    lines = []
    if not _same_place(record, folder, source):
        lines.append(_difference("source", record.source, source))
    elif _content(now := source_state(source)) != _content(record.state) and _content(now) != _content(NOTHING_KNOWN):
        lines.append(f"source: {source} has changed since the shards were built ({_changes(record.state, now)})")
    for name, built in {**LEFT_OUT, **record.options}.items():
        wanted = options.get(name, DEFAULTS.get(name))
        if (built or None) != (wanted or None) and not _without_effect(name, built, record.options):
            lines.append(_difference(name, built, wanted))
    return lines


def source_was_modified(record: BuildRecord, source: str) -> bool:
    """Whether files may have come to or gone from a source, or one of its folders, since the shards were built."""
    now = source_state(source).modified
    return None not in (now, record.state.modified) and now != record.state.modified


def _same_place(record: BuildRecord, folder: Path, source: str) -> bool:
    if is_remote(source) or is_remote(record.source):
        return without_signature(source) == without_signature(record.source)  # a signature is renewed
    same = os.path.realpath(source) == os.path.realpath(record.source)
    return same or source_beside(source, folder) == record.source_beside


def _content(state: SourceState) -> tuple[int | str | None, ...]:
    return state.bytes, state.parts, state.parts_sha256


def _changes(before: SourceState, now: SourceState) -> str:
    if now.bytes is not None or before.bytes is not None:
        return f"{before.bytes or 0:,} bytes then, {now.bytes or 0:,} now"
    if before.parts != now.parts:
        return f"{before.parts or 0:,} folders and tars in it then, {now.parts or 0:,} now"
    return "the folders and tars in it have other names"


def _without_effect(name: str, built: Any, options: Mapping[str, Any]) -> bool:
    """Whether an option that differs makes no difference to the shards."""
    if name == "skip_broken":  # built without it, the source had no broken images
        return not built
    encodes = options.get("convert") or options.get("short_side") or options.get("recompress")
    return name in ("quality", "subsampling") and not encodes


def _difference(name: str, built: Any, wanted: Any) -> str:
    return f"{name}: the folder has {_shown(built)}, the recipe says {_shown(wanted)}"


def _shown(value: Any) -> str:
    if value in (None, [], ()):
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN or isinstance(value, str) else f"{text[:_SHOWN]}..."

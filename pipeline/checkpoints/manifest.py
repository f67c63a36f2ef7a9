"""What is in a checkpoint: its names, and the manifest that makes a folder of files one. Needs no torch.

    step-00012000/  manifest.json  buffers.safetensors  rank-00000.safetensors  rank-00001.safetensors ...

A folder without a manifest is no checkpoint.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data.storage import Storage, join, read_bytes
from pipeline.errors import ConfigError

MANIFEST = "manifest.json"
BUFFERS = "buffers.safetensors"
_VERSION = 1
_RANK = re.compile(r"^rank-(\d{5,})\b")
_NAME = re.compile(r"^step-(\d{8,})$")


def step_name(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in the folder name of a checkpoint; None for other names."""
    match = _NAME.match(name)
    return int(match.group(1)) if match else None


def rank_name(rank: int) -> str:
    """What the files of a rank begin with."""
    return f"rank-{rank:05d}"


def writer_of(file: str) -> int:
    """The rank that wrote `file`; the buffers are the leader's."""
    match = _RANK.match(file)
    return int(match.group(1)) if match else 0


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with the sha256 of its other content, as JSON with sorted keys, under `sha256`."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def read_manifest(location: str, storage: Storage) -> dict[str, Any]:
    """The manifest of the checkpoint at `location`, held against its own checksum.

    Raises:
        ConfigError: not a checkpoint, or a damaged manifest.
        StorageDown, StorageRefused: a remote place that cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads(read_bytes(join(location, MANIFEST), storage))
        if signed(manifest) != manifest:
            raise ConfigError(f"{location}: {MANIFEST} does not have its own checksum")
    except FileNotFoundError:
        raise ConfigError(f"{location}: not a checkpoint ({MANIFEST} is missing)") from None
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{location}: not a checkpoint ({error})") from None
    return manifest


def whole_manifest(
    facts: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], parts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The signed manifest of what all ranks wrote.

    Args:
        facts: go into it as they are.
        shapes: of all parameters, by name.
        parts: what each rank wrote: `files` (name -> bytes and sha256) and `fragments`.

    Raises:
        ValueError: the fragments are not every element of every parameter once.
    """
    files = {name: entry for part in parts for name, entry in part["files"].items()}
    fragments = [fragment for part in parts for fragment in part["fragments"]]
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for fragment in fragments:
        ranges[fragment["parameter"]].append((fragment["start"], fragment["stop"]))
    for name, shape in shapes.items():
        end = 0
        for start, stop in sorted(ranges[name]):
            if start != end:
                raise ValueError(f"{name}: elements {end} to {start} are missing or written twice")
            end = stop
        if end != math.prod(shape):
            raise ValueError(f"{name}: elements from {end} are missing")
    return signed(
        {
            "format": "coatnet-checkpoint", "version": _VERSION, **facts,
            "parameters": {name: list(shape) for name, shape in shapes.items()}, "fragments": fragments, "files": files,
        }
    )  # fmt: skip


def total_bytes(manifest: Mapping[str, Any]) -> int:
    """Bytes of all files that a manifest names."""
    return sum(int(entry["bytes"]) for entry in manifest["files"].values())


def missing_or_cut(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
    """What is wrong with files of the `sizes` in bytes, by name, if one is missing or of another size."""
    for name, expected in sorted(manifest["files"].items()):
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != expected["bytes"]:
            return f"{name} has {sizes[name]:,} bytes instead of {expected['bytes']:,}"
    return None

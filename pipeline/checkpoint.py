"""Checkpoints as fragments in safetensors: readable at any world size and ZeRO stage, and without DeepSpeed.

    checkpoints/step-00012000/  manifest.json  buffers.safetensors  rank-00000.safetensors  rank-00001.safetensors ...

Written under a temporary name and published by one rename: a checkpoint that is visible was whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.distributed import Ranks
from pipeline.errors import ConfigError
from pipeline.fragments import Fragment

MANIFEST = "manifest.json"
BUFFERS = "buffers.safetensors"
_NAME = re.compile(r"^step-(\d{8,})$")


def step_name(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, open for reading."""

    path: Path
    manifest: dict[str, Any]
    _ranges: dict[str, list[tuple[int, int, str]]] = field(init=False)

    def __post_init__(self) -> None:
        ranges: dict[str, list[tuple[int, int, str]]] = {}
        for entry in self.manifest["fragments"]:
            ranges.setdefault(entry["parameter"], []).append((entry["start"], entry["stop"], entry["file"]))
        object.__setattr__(self, "_ranges", {name: sorted(places) for name, places in ranges.items()})

    @property
    def step(self) -> int:
        """Steps taken when it was saved."""
        return int(self.manifest["step"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter names and shapes."""
        return {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}

    def read(self, parameter: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements `start` .. `stop` of one flattened tensor of state; (stop - start,) float32 on the CPU."""
        parts = []
        for first, last, file in self._ranges[parameter]:
            if first < stop and last > start:
                with safe_open(self.path / file, framework="pt") as tensors:
                    piece = tensors.get_slice(f"{kind}.{parameter}")
                    parts.append(piece[max(start, first) - first : min(stop, last) - first])
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def parameters(self) -> dict[str, Tensor]:
        """All weights, whole, float32 on the CPU."""
        whole = {name: torch.empty(shape) for name, shape in self.shapes.items()}
        for file in {entry["file"] for entry in self.manifest["fragments"]}:
            with safe_open(self.path / file, framework="pt") as tensors:
                for entry in self.manifest["fragments"]:
                    if entry["file"] == file:
                        name = entry["parameter"]
                        whole[name].view(-1)[entry["start"] : entry["stop"]] = tensors.get_tensor(f"master.{name}")
        return whole

    def buffers(self) -> dict[str, Tensor]:
        """All buffers by name, on the CPU."""
        with safe_open(self.path / BUFFERS, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)

    def damage(self, share: int = 0, shares: int = 1) -> str | None:
        """What is wrong with the files, or None. Rank `share` of `shares` hashes its part of them."""
        for number, (name, expected) in enumerate(sorted(self.manifest["files"].items())):
            path = self.path / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            if number % shares == share and _sha256(path) != expected["sha256"]:
                return f"{name} does not have the checksum of the manifest"
        return None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`; its manifest is checked against its own checksum, other files are not.

    Raises:
        ConfigError: not a checkpoint, or a damaged manifest.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if signed(manifest) != manifest:
            raise ConfigError(f"{path}: {MANIFEST} does not have its own checksum")
        return Checkpoint(path, manifest)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a checkpoint ({error})") from None


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """`manifest` with the sha256 of its other content, as JSON with sorted keys, under `sha256`."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def open_whole(path: Path, ranks: Ranks) -> Checkpoint:
    """The checkpoint in the folder `path` with every file's checksum verified, each rank hashing a share.

    Raises:
        ConfigError: damaged, as found by any rank.
    """
    damage = None
    try:
        checkpoint = open_checkpoint(path)
        damage = checkpoint.damage(ranks.rank, ranks.world_size)
    except (ConfigError, OSError) as error:
        damage = str(error)
    damaged = ranks.sum(torch.tensor([damage is not None], dtype=torch.int64, device=ranks.device))
    if damaged.item():
        raise ConfigError(f"{path}: damaged: {damage or 'as another rank found'}; restore it from a copy")
    return checkpoint


def checkpoints_newest_first(folder: Path) -> list[Path]:
    """The published checkpoints in `folder`."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.match(p.name)), key=_step_of, reverse=True)


def newest_whole(folder: Path, ranks: Ranks) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every file has its checksum, and why newer ones were passed over.

    None if there is none at all. Those passed over are renamed to `damaged-...`: they must not stand in the way of new
    ones, nor count as kept.

    Raises:
        ConfigError: there are checkpoints, and none is whole.
    """
    paths = checkpoints_newest_first(folder)
    damaged: list[Path] = []
    reasons: list[str] = []
    # One listing for all: a network file system may show ranks different ones.
    for number in range(ranks.from_leader(len(paths))):
        path = folder / step_name(ranks.from_leader(_step_of(paths[number]) if number < len(paths) else 0))
        try:
            checkpoint = open_whole(path, ranks)
        except ConfigError as error:
            damaged.append(path)
            reasons.append(str(error))
            continue
        ranks.barrier()
        if ranks.leads:
            for bad in damaged:
                aside = folder / f"damaged-{bad.name}"
                shutil.rmtree(aside, ignore_errors=True)
                bad.rename(aside)
        return checkpoint, reasons
    if damaged:
        raise ConfigError(
            f"{folder}: none of its {len(damaged)} checkpoints is whole ({reasons[0]}); "
            "restore one, or remove the folder to begin anew"
        )
    return None, []


def save_checkpoint(
    folder: Path,
    facts: dict[str, Any],
    state: Iterable[Fragment],
    buffers: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    ranks: Ranks,
) -> Path:
    """Write and publish the checkpoint of `facts["step"]`; called by every rank with its own `state`.

    Each rank writes and hashes its own file; buffers are equal everywhere and written once. `facts` go into the
    manifest as they are.
    """
    final = folder / step_name(facts["step"])
    unfinished = folder / f".{final.name}.writing"
    if ranks.leads:
        for leftover in folder.glob(".step-*.writing"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
    ranks.barrier()
    _write_rank(unfinished, f"rank-{ranks.rank:05d}", [fragment for fragment in state if fragment.saved_here])
    if ranks.leads:
        _write_tensors(unfinished / BUFFERS, {name: tensor.cpu() for name, tensor in buffers.items()})
    ranks.barrier()
    if ranks.leads:
        manifest = _manifest(unfinished, facts, shapes, ranks.world_size)
        _write_synced(unfinished / MANIFEST, json.dumps(manifest, indent=1))
        _sync_folder(unfinished)
        unfinished.rename(final)
        _sync_folder(folder)
    ranks.barrier()
    return final


def keep_last(folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints."""
    for path in checkpoints_newest_first(folder)[count:]:
        # Without its manifest it is no checkpoint any more, however the removal ends.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def load_state(checkpoint: Checkpoint, state: Iterable[Fragment], shapes: dict[str, tuple[int, ...]]) -> None:
    """Copy the ranges that this rank holds into the live state.

    Raises:
        ConfigError: the checkpoint is another model's.
    """
    if checkpoint.shapes != shapes:
        differing = sorted(
            name for name in checkpoint.shapes.keys() | shapes.keys() if checkpoint.shapes.get(name) != shapes.get(name)
        )
        name = differing[0]
        raise ConfigError(
            f"{checkpoint.path}: a checkpoint of another model: {name} is {checkpoint.shapes.get(name, 'absent')} "
            f"there and {shapes.get(name, 'absent')} in this model ({len(differing)} parameters differ); "
            "use another recipe name or remove the run folder"
        )
    for fragment in state:
        for kind, live in fragment.tensors.items():
            live.copy_(checkpoint.read(fragment.parameter, kind, fragment.start, fragment.stop))


def _step_of(path: Path) -> int:
    match = _NAME.match(path.name)
    assert match is not None
    return int(match.group(1))


def _write_rank(folder: Path, name: str, state: list[Fragment]) -> None:
    file = f"{name}.safetensors"
    tensors = {f"{kind}.{f.parameter}": t.detach().cpu() for f in state for kind, t in f.tensors.items()}
    entry = _write_tensors(folder / file, tensors)
    places = [{"parameter": f.parameter, "start": f.start, "stop": f.stop, "file": file} for f in state]
    (folder / f"{name}.json").write_text(json.dumps({"files": {file: entry}, "fragments": places}))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write, flush to the disk and read back; returns size and checksum of what lies there."""
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _manifest(
    folder: Path, facts: dict[str, Any], shapes: dict[str, tuple[int, ...]], world_size: int
) -> dict[str, Any]:
    """The manifest of what all ranks wrote, which must be every element of every parameter once."""
    files = {BUFFERS: {"bytes": (folder / BUFFERS).stat().st_size, "sha256": _sha256(folder / BUFFERS)}}
    places: list[dict[str, Any]] = []
    for rank in range(world_size):
        part = folder / f"rank-{rank:05d}.json"
        written = json.loads(part.read_text())
        files |= written["files"]
        places += written["fragments"]
        part.unlink()
    for name, shape in shapes.items():
        end = 0
        for start, stop in sorted((p["start"], p["stop"]) for p in places if p["parameter"] == name):
            assert start == end, f"{name}: elements {end} to {start} are missing or written twice"
            end = stop
        assert end == torch.Size(shape).numel(), f"{name}: elements from {end} are missing"
    content = {
        "format": "coatnet-checkpoint", "version": 1, **facts,
        "parameters": {name: list(shape) for name, shape in shapes.items()}, "fragments": places, "files": files,
    }  # fmt: skip
    return signed(content)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

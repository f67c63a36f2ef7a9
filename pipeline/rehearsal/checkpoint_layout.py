"""The files of a checkpoint before there is one: names, bytes and fragments of what each rank writes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from data.files.json_records import to_json
from pipeline.checkpoints.checkpoint import AVERAGED
from pipeline.checkpoints.host_copy import Layout, file_bytes, file_header
from pipeline.checkpoints.manifest import (
    BUFFERS,
    CLASSES,
    MANIFEST,
    CheckpointFacts,
    ClassNames,
    FileEntry,
    Manifest,
    rank_name,
)
from pipeline.rehearsal.partitions import ElementRange, Partitioning
from pipeline.weights import persistent_buffers

_STATE = ("master", "exp_avg", "exp_avg_sq")
_NO_CHECKSUM = "0" * 64  # as long as a real one


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file that a rank writes."""

    name: str
    bytes: int
    fragments: int
    """Ranges of parameters in it."""


@dataclass(frozen=True)
class CheckpointLayout:
    """The files of one checkpoint.

    Args:
        partitioning: what each rank saves.
        buffers: dtypes and shapes of the model's buffers, as `buffer_layout` has them.
        kinds: of state that is saved of every element, each in float32.
        classes: names of the model's outputs.
    """

    partitioning: Partitioning
    buffers: Layout
    kinds: tuple[str, ...]
    classes: tuple[str, ...]
    _headers: dict[tuple[tuple[str, int], ...], int] = field(default_factory=dict, init=False, repr=False)

    def rank_file(self, rank: int) -> PlannedFile:
        """The file with the state that `rank` saves."""
        saved = [part for part in self.partitioning.ranges(rank) if part.saved_here]
        return PlannedFile(f"{rank_name(rank)}.safetensors", self._state_bytes(saved), len(saved))

    def leader_files(self) -> list[PlannedFile]:
        """What rank 0 writes beside its state; the manifest is the last file of a checkpoint, see `manifest_file`."""
        names = json.dumps(to_json(ClassNames(self.classes))).encode()
        return [
            PlannedFile(BUFFERS, file_bytes(self.buffers), 0),
            PlannedFile(CLASSES, len(names), 0),
        ]

    def files(self) -> list[PlannedFile]:
        """All files but the manifest, those of the leader first."""
        return [*self.leader_files(), *(self.rank_file(rank) for rank in range(self.partitioning.ranks))]

    def manifest_file(self, facts: CheckpointFacts, files: Sequence[PlannedFile]) -> PlannedFile:
        """The manifest that names `files`; `facts` stand for those of a real checkpoint, whose texts may be as long or
        not."""
        # Without parameters none of its fragments is missing.
        empty = Manifest(facts, {}, (), {file.name: FileEntry(file.bytes, _NO_CHECKSUM) for file in files})
        content = empty.as_json() | {"parameters": to_json(self.partitioning.parameters.shapes)}
        fragments, size = 0, len(json.dumps(content, indent=1))
        quoted = {name: len(json.dumps(name)) for name in self.partitioning.parameters.shapes}
        for rank in range(self.partitioning.ranks):
            name = json.dumps(f"{rank_name(rank)}.safetensors")
            around = len('  {\n   "parameter": ,\n   "start": ,\n   "stop": ,\n   "file": \n  },\n') + len(name)
            for part in self.partitioning.ranges(rank):
                if part.saved_here:
                    size += around + quoted[part.parameter] + len(str(part.start)) + len(str(part.stop))
                    fragments += 1
        # Their list has a line break before the first and no comma behind the last, and its bracket on a line.
        return PlannedFile(MANIFEST, size + (1 if fragments else 0), fragments)

    def _state_bytes(self, saved: Sequence[ElementRange]) -> int:
        key = tuple((part.parameter, part.elements) for part in saved)
        if key not in self._headers:
            layout = {f"{kind}.{name}": (torch.float32, (count,)) for name, count in key for kind in self.kinds}
            self._headers[key] = len(file_header(layout)[0])
        count = sum(part.elements for part in saved)
        return self._headers[key] + torch.float32.itemsize * len(self.kinds) * count


def kinds_of(*, moving_average: bool) -> tuple[str, ...]:
    """What is saved of every element of every parameter."""
    return (*_STATE, "ema") if moving_average else _STATE


def buffer_layout(model: nn.Module, *, moving_average: bool) -> Layout:
    """Dtypes and shapes of the buffers that the leader saves, with their averages."""
    own = {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in persistent_buffers(model).items()}
    return own | ({AVERAGED + name: entry for name, entry in own.items()} if moving_average else {})

"""A rank's state copied from the device to host memory, laid out as the files will be.

The memory is allocated once and reused by every save. With a GPU it is pinned, so that copies run at bus speed.
"""

import json
import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.checkpoints.manifest import BUFFERS, CheckpointFacts, rank_name
from pipeline.ranks.distributed import Ranks
from pipeline.zero.fragments import Fragment

log = logging.getLogger(__name__)

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LiveState:
    """What one rank contributes to a checkpoint; the tensors are views of what is being trained.

    Args:
        facts: for the manifest, equal on all ranks.
        fragments: the ranges that this rank holds, at most one of each parameter.
        buffers: by name, equal on all ranks.
        shapes: of all parameters, by name.
        classes: names of the model's outputs, equal on all ranks; None where they are not known.
    """

    facts: CheckpointFacts
    fragments: Sequence[Fragment]
    buffers: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    classes: tuple[str, ...] | None = None


Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Dtypes and shapes of tensors, by name."""


def file_bytes(layout: Layout) -> int:
    """The size of a safetensors file."""
    header, ranges = file_header(layout)
    return len(header) + max((stop for _, stop in ranges.values()), default=0)


def file_header(layout: Layout) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a safetensors file, and the bytes of each tensor behind it.

    Tensors are ordered by element size, largest first, and then by name, as in the library, so that each is aligned.
    """
    entries, ranges, end = {}, {}, 0
    for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
        dtype, shape = layout[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        ranges[name] = (start, end)
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ranges


class HostFile:
    """The content of one safetensors file in host memory: `header`, then `memory`, (bytes,) uint8.

    Args:
        tensors: names, shapes and dtypes; `fill` copies the values.
        pinned: lock the memory for the current GPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, pinned: bool) -> None:
        self._layout = layout_of(tensors)
        self.header, ranges = file_header(self._layout)
        end = max((stop for _, stop in ranges.values()), default=0)
        self.memory = torch.empty(end, dtype=torch.uint8)
        if pinned and end:
            _pin(self.memory)
        self._views = {
            name: self.memory[start:stop].view(tensors[name].dtype).view(tensors[name].shape)
            for name, (start, stop) in ranges.items()
        }

    @property
    def blocks(self) -> list[memoryview]:
        """The bytes of the file."""
        return [memoryview(self.header), self.memory.numpy().data]

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `tensors` have the names, shapes and dtypes of this file."""
        return self._layout == layout_of(tensors)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values; from a GPU the copy is complete only after a synchronization."""
        for name, view in self._views.items():
            view.copy_(tensors[name], non_blocking=True)


def file_contents(state: LiveState, ranks: Ranks) -> dict[str, Mapping[str, Tensor]]:
    """The files with tensors that this rank writes, by name: of the fragments that it saves, and on the leader of the
    buffers."""
    saved = [fragment for fragment in state.fragments if fragment.saved_here]
    own = {f"{kind}.{f.parameter}": tensor for f in saved for kind, tensor in f.tensors.items()}
    contents: dict[str, Mapping[str, Tensor]] = {f"{rank_name(ranks.rank)}.safetensors": own}
    return {BUFFERS: state.buffers, **contents} if ranks.is_leader else contents


class HostCopy:
    """Host memory for the files of one rank; `files` has them by name after the first `fill`."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.files: dict[str, HostFile] = {}

    def fill(self, state: LiveState) -> None:
        """Copy the fragments that this rank saves, and on the leader the buffers; returns when the copy is complete."""
        cuda = self._ranks.device.type == "cuda"
        for name, tensors in file_contents(state, self._ranks).items():
            if name not in self.files or not self.files[name].fits(tensors):
                self.files[name] = HostFile(tensors, pinned=cuda)
            self.files[name].fill(tensors)
        if cuda:
            torch.cuda.synchronize(self._ranks.device)


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """The dtypes and shapes of `tensors`."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _pin(memory: Tensor) -> None:
    """Lock memory for the GPU in place: torch rounds the size of its own pinned memory up to a power of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    portable = 1  # cudaHostRegisterPortable
    failed = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), portable))
    if failed:
        log.warning("memory for checkpoints cannot be pinned (CUDA error %d); saves take longer", failed)
        _forget_last_error()
    else:
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())


def _forget_last_error() -> None:
    """Take the error of a failed call from where CUDA keeps it, or the next kernel would be reported as failed.

    Torch has no function for that, but asks for the last error after each kernel that it launches, which forgets it.
    """
    with suppress(torch.AcceleratorError):
        torch.zeros(1, device="cuda")

"""A small state to save, and ranks as threads of this process: their collectives are real, and start at once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml
from torch import Tensor

from data.remote.storage import Storage
from pipeline.checkpoints import staged
from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.checkpoints.host_copy import LiveState
from pipeline.checkpoints.manifest import FileEntry
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import CheckpointStore
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.runs.run_folder import RunFolder
from pipeline.zero.fragments import Fragment
from tests.support.records import checkpoint_facts

Answer = TypeVar("Answer")

ALONE = Ranks(0, 1, torch.device("cpu"))
SHAPES = {"a": (30, 40), "b": (50,), "c": (2, 3)}
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


class _Table:
    """Exchanges one value of each thread with all of them."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=60)
        self._values: list[Any] = [None] * count

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


@dataclass(frozen=True, slots=True)
class ThreadRanks(Ranks):
    """One of several ranks that are threads."""

    table: _Table

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.table.exchange(self.rank, tensor.clone())).sum(dim=0))

    def barrier(self) -> None:
        self.table.exchange(self.rank, None)

    def broadcast(self, number: int) -> int:
        return int(self.table.exchange(self.rank, number)[0])


def together(count: int, work: Callable[[Ranks], Answer]) -> list[Answer]:
    """What `work` returns on each of `count` ranks."""
    table = _Table(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(ThreadRanks(rank, count, torch.device("cpu"), table)), range(count)))


def whole(kind: str, name: str, step: int) -> Tensor:
    """The state of one kind of parameter `name` after `step` steps."""
    seed = 1000 * step + 10 * KINDS.index(kind) + list(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def live(step: int, ranks: Ranks = ALONE) -> LiveState:
    """The state after `step` steps, cut into equal parts in the order of parameters, as ZeRO does."""
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    first, last = (total * (ranks.rank + n) // ranks.world_size for n in (0, 1))
    fragments, begin = [], 0
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        start, stop = max(0, first - begin), min(size, last - begin)
        if start < stop:
            tensors = {kind: whole(kind, name, step).view(-1)[start:stop].clone() for kind in KINDS}
            fragments.append(Fragment(name, start, stop, tensors, True))
        begin += size
    buffers = {"mean": torch.full((3,), float(step)), "batches": torch.tensor(step)}
    return LiveState(checkpoint_facts(step, world_size=ranks.world_size), fragments, buffers, SHAPES)


def local(folder: Path) -> CheckpointStore:
    """The store of the run in `folder`."""
    return CheckpointStore(str(folder / "checkpoints"), Storage(), folder / "checkpoints")


def saver(
    folder: Path,
    ranks: Ranks = ALONE,
    store: CheckpointStore | None = None,
    patience: float = 30.0,
    error_patience: float = 30.0,
    section: Callable[[], AbstractContextManager[None]] = nullcontext,
    **kept: Any,
) -> Saver:
    """A saver of the run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = CheckpointSettings(**kept)
    return Saver(
        store or local(folder),
        RunFolder(folder),
        settings,
        ranks,
        patience=patience,
        error_patience=error_patience,
        section=section,
    )


def save(folder: Path, *steps: int, count: int = 1, store: CheckpointStore | None = None, **kept: Any) -> None:
    """Save the state after each of `steps` by `count` ranks, each save published before the next begins."""

    def work(ranks: Ranks) -> None:
        with saver(folder, ranks, store, **kept) as one:
            for step in steps:
                one.save(live(step, ranks))
                assert one.finish()

    together(count, work)


STAGE: dict[str, Any] = {
    "task": "train", "resolution": 32, "steps": 9, "data": {"train": "t", "validation": "v"},
    "model": {"name": "coatnet_0"}, "batch": {"global_size": 8, "micro_size": 8},
    "optimizer": {"peak_learning_rate": 1e-3},
}  # fmt: skip
"""A small training stage."""


def freeze(folder: Path, **changes: Any) -> None:
    """Write what the first start of a stage freezes in its run folder."""
    frozen = {"stage": folder.name, "seed": 0, **STAGE, "index_digests": {"train": "t"}, "start_digest": None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(frozen | changes))


def holds(checkpoint: Checkpoint, step: int) -> bool:
    """Whether it is what the state was after `step` steps, to the bit."""
    return checkpoint.step == step and all(
        torch.equal(checkpoint.read(name, kind, 0, torch.Size(shape).numel()), whole(kind, name, step).view(-1))
        for kind in KINDS
        for name, shape in SHAPES.items()
    )


def opened(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of `step` of the run in `folder`."""
    return open_checkpoint(local(folder).at(step))


class Gate:
    """Holds the writing of some files back: in place of a slow or dead disk, which a test cannot have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: str = "rank-00000.safetensors") -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        real = staged._write_verified

        def held(path: Path, *arguments: Any) -> FileEntry:
            if path.name == file:
                self.reached.set()
                assert self.open.wait(60)
            return real(path, *arguments)

        monkeypatch.setattr(staged, "_write_verified", held)


def names(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())

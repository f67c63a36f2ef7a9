"""One rank's engine of DeepSpeed on tensors without memory, in a process group whose collectives do nothing.

The engine is that of `pipeline.zero.engine.build_engine`, as on the cluster, and partitions what it would there.
Tensors have shapes, dtypes and storages of a size, and no values. What the other ranks would have sent is whatever was
in the tensor before; building an engine looks at none of it.
"""

import os
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.coatnet import CoAtNet
from models.registry import create_model
from pipeline.checkpoints.checkpoint import AVERAGED
from pipeline.checkpoints.host_copy import LiveState, file_bytes, file_contents, layout_of
from pipeline.checkpoints.manifest import CheckpointFacts, RunDigests, RunFacts
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.schema import TrainStage
from pipeline.rehearsal.partitions import ElementRange
from pipeline.training.training_state import TrainingState
from pipeline.weights import persistent_buffers
from pipeline.zero.engine import build_engine


@dataclass(frozen=True, slots=True)
class FakeEngineCase:
    """An engine to be built on some ranks; `data.files.json_records` reads it from JSON."""

    stage: Mapping[str, Any]
    """Settings of the training stage, as plain values."""
    classes: int
    world_size: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BuiltRank:
    """What the engine of one rank holds, and the files that the rank would save."""

    rank: int
    ranges: tuple[ElementRange, ...]
    """What it optimizes, in parameter order."""
    masters: int
    """Elements of the tensors that AdamW updates, with padding, but for those that are nothing else."""
    weight_bytes: int
    """Of the storages in which DeepSpeed keeps the weights that forwards use."""
    kept_whole: int
    """Elements of the small parameters that ZeRO 3 keeps whole on every rank once it has gathered them."""
    files: Mapping[str, int]
    """Bytes of its files of a checkpoint, by name."""
    collectives: Mapping[str, int]
    """How often it would have communicated with the other ranks meanwhile, by operation."""
    seconds: float
    peak_bytes: int
    """Of its process, in main memory."""


def build_on_fake_tensors(case: FakeEngineCase, rank: int) -> BuiltRank:
    """Build the engine of `rank` and say what it holds; once in a process, whose process group it is.

    Changes torch and the environment for the rest of the process.
    """
    began = time.monotonic()
    stage = without_compiler(TrainStage.model_validate(case.stage))
    _become_a_rank(rank, case.world_size)
    ranks = Ranks(rank, case.world_size, torch.device("cpu"))
    counted = _Collectives()
    with fake_tensors(), counted:
        model = fake_model(stage, case.classes)
        engine = build_engine(model, stage, ranks)
        state = TrainingState(engine, ranks, stage.ema_decay)
        weights, kept_whole = _weights(model)
        contents = file_contents(_live_state(state, stage, case.classes, ranks), ranks)
        return BuiltRank(
            rank,
            tuple(ElementRange(part.parameter, part.start, part.stop, part.saved_here) for part in state.fragments),
            sum(master.numel() for master in engine.masters),
            weights,
            kept_whole,
            {name: file_bytes(layout_of(tensors)) for name, tensors in contents.items()},
            dict(counted.calls),
            time.monotonic() - began,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def without_compiler(stage: TrainStage) -> TrainStage:
    """The stage without what a CPU may not have, and what changes nothing in what is partitioned."""
    return stage.model_copy(update={"compile": False, "fused_depthwise": False})


def fake_model(stage: TrainStage, classes: int) -> CoAtNet:
    """The stage's model of tensors without memory; inside of `fake_tensors`."""
    model = stage.model
    return create_model(
        model.name,
        num_classes=classes,
        image_size=stage.resolution,
        drop_path_rate=model.drop_path_rate,
        **model.options,
        device="meta",
    ).to_empty(device="cpu")


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, new tensors on the CPU have no memory, and modules convert their parameters in place."""
    before = nn.Module._apply
    nn.Module._apply = _apply_in_place  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            # DeepSpeed looks whether addresses are aligned, and fake tensors warn that they have none.
            warnings.simplefilter("ignore")
            yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


def _apply_in_place(module: nn.Module, function: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for fake tensors, which torch's own cannot put in the place of the module's."""
    for child in module.children():
        child._apply(function)  # type: ignore[no-untyped-call]
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        new = function(parameter.detach())
        if new.device != parameter.device:
            module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        elif new.dtype != parameter.dtype:
            parameter.data = new
    module._buffers.update({name: None if x is None else function(x) for name, x in module._buffers.items()})
    return module


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the collectives of this process by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "c10d":
            self.calls[function.overloadpacket.__name__.strip("_")] += 1
        return function(*arguments, **(keywords or {}))


def _become_a_rank(rank: int, world_size: int) -> None:
    """Join a process group whose collectives return at once; it has no address, and nobody listens."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def _weights(model: CoAtNet) -> tuple[int, int]:
    """Bytes in which the weights of forwards are kept, and elements of those that ZeRO 3 keeps whole."""
    storages: dict[int, int] = {}
    kept_whole = 0
    for parameter in model.parameters():
        held: Tensor = getattr(parameter, "ds_tensor", parameter)  # ZeRO 3's part of the parameter
        storage = held.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        kept_whole += getattr(parameter, "ds_numel", 0) if getattr(parameter, "ds_persist", False) else 0
    return sum(storages.values()), kept_whole


def _live_state(state: TrainingState, stage: TrainStage, classes: int, ranks: Ranks) -> LiveState:
    """What the rank would save, without the facts, of which some are values on the device."""
    buffers = persistent_buffers(state.engine.module)
    if state.has_average:
        buffers |= {AVERAGED + name: buffer for name, buffer in buffers.items()}
    model = {"name": stage.model.name, "num_classes": classes, "image_size": stage.resolution, **stage.model.options}
    run = RunFacts("rehearsal", stage.precision, model, RunDigests("", "", ""))
    facts = CheckpointFacts(run, 0, 0, 0, 0, ranks.world_size)
    return LiveState(facts, state.fragments, buffers, state.engine.parameters.shapes)

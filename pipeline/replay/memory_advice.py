"""What to change if a replay does not fit into the memory."""

from collections.abc import Iterator

import torch

from pipeline.errors import RunFailed
from pipeline.memory_estimate import is_host_memory_full
from pipeline.recipe.schema import TrainStage


def memory_advice(stage: TrainStage, world_size: int, *, look_inside: bool, forward_only: bool) -> str:
    """Which options need less memory, the most effective first.

    Args:
        stage: with the settings of the replay.
        world_size: its number of ranks.
        look_inside: whether a model without an engine was beside the engine.
        forward_only: whether it was alone.
    """
    return f"To need less: {'; '.join(_remedies(stage, world_size, look_inside, forward_only))}"


def _remedies(stage: TrainStage, world_size: int, look_inside: bool, forward_only: bool) -> Iterator[str]:
    if not forward_only:
        if look_inside:
            yield "--curves-only, which has no second model beside the engine"
        yield "--without-optimizer, which has the model alone and only a forward"
        if stage.activation_checkpointing != "every_block":
            yield "activation_checkpointing=every_block"
        if stage.zero_stage and world_size < stage.batch.micro_batches:
            yield f"more ranks than {world_size} (--ranks) on a machine with more GPUs"
    yield "a machine with more memory"


def replay_out_of_memory(error: RuntimeError | MemoryError, advice: str) -> RunFailed | None:
    """The error for a rank that gets no more memory, with `advice`; None for errors of other kinds."""
    if isinstance(error, torch.OutOfMemoryError):
        what = "the GPU's memory is full"
    elif is_host_memory_full(error):
        what = "the machine's memory is full"
    else:
        return None
    reason = str(error).partition("\n")[0].rstrip(".")
    return RunFailed(f"{what}{f' ({reason})' if reason else ''}. {advice}")

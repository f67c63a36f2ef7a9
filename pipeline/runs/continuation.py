"""What a run computes with, which may change between its starts, and what has changed since a checkpoint was saved.

The recipe allows these changes: they decide how fast and where a step is computed, and its result up to rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

import torch

from pipeline.checkpoints.manifest import CheckpointFacts, RunFacts
from pipeline.host import processor_name
from pipeline.plan import TrainPlan, ranks_per_node
from pipeline.ranks.distributed import Ranks
from pipeline.runs.stage_settings import digests
from pipeline.training.images import imagenet_preprocessing


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that a start computes with, and that was different when its checkpoint was saved."""

    what: str
    before: str
    now: str
    step: int
    """Of the checkpoint."""

    def __str__(self) -> str:
        return f"{self.what}: {self.before} at step {self.step:,}, now {self.now}"


def computed_with(plan: TrainPlan, ranks: Ranks) -> dict[str, str]:
    """What this start computes with besides the number of ranks, by name: settings that may change between starts, and
    versions and device as the leader has them.
    """
    stage, on_gpu = plan.stage, ranks.device.type == "cuda"
    found = {
        "micro-batches per rank": str(stage.batch.micro_batches // ranks.world_size),
        "zero_stage": str(stage.zero_stage),
        "activation_checkpointing": str(stage.activation_checkpointing),
        "compile": str(stage.compile).lower(),
        "fused_depthwise": str(stage.fused_depthwise).lower(),
        "torch": torch.__version__,
        "deepspeed": metadata.version("deepspeed"),
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else "CPU",
    }
    if on_gpu:  # NCCL adds in another order across nodes than within one
        per_node = str(ranks_per_node(stage, ranks.world_size))
        return found | {"deterministic": str(stage.deterministic).lower(), "ranks per node": per_node}
    return found | {"processor": processor_name(), "resources.threads_per_rank": str(stage.resources.threads_per_rank)}


def run_facts(plan: TrainPlan, run_id: str | None, now: Mapping[str, str]) -> RunFacts:
    """What the manifests of all checkpoints have in common that a start with `plan` saves.

    Args:
        plan: of the stage.
        run_id: see `pipeline.runs.run_identity`.
        now: `computed_with` of that start.
    """
    stage = plan.stage
    return RunFacts(
        plan.name,
        stage.precision,
        plan.model_arguments,
        digests(plan),
        run_id,
        now,
        imagenet_preprocessing(stage.resolution, stage.data.evaluation_crop),
        stage.loss.kind,
    )


def changes_since(checkpoint: CheckpointFacts, now: Mapping[str, str], world_size: int) -> list[Change]:
    """What differs from when `checkpoint` was saved; what its manifest does not say is left out.

    Args:
        checkpoint: from which a start continues.
        now: `computed_with` of that start.
        world_size: its number of ranks.
    """
    before = {"ranks": str(checkpoint.world_size), **(checkpoint.run.computed_with or {})}
    current = {"ranks": str(world_size), **now}
    return [
        Change(what, before[what], current[what], checkpoint.step)
        for what in current
        if what in before and before[what] != current[what]
    ]

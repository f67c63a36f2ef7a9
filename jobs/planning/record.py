"""The plan of a stage as JSON."""

from dataclasses import fields, is_dataclass
from typing import Any

from pipeline.planner.alternatives import Alternative
from pipeline.planner.ranges import Range
from pipeline.planner.stage_memory import GpuMemory
from pipeline.planner.stage_plan import StagePlan
from pipeline.planner.step_estimate import StepEstimate

FORMAT = {"format": "coatnet-plan", "version": 1}


def plan_record(plan: StagePlan) -> dict[str, Any]:
    """What `--json` prints: seconds, bytes and FLOPs; a figure with a range as `value`, `least` and `most`."""
    cluster, recommended = plan.cluster, plan.recommended
    return {
        **FORMAT,
        "recipe": plan.recipe,
        "stage": plan.name,
        "measured": plan.is_measured,
        "cluster": {
            "gpu": cluster.gpu.kind,
            "gpus": cluster.gpus,
            "nodes": cluster.nodes,
            "gpu_bytes": cluster.memory,
            "link_bytes_per_second": cluster.link.value,
            "network_bytes_per_second": cluster.network.value,
        },
        "dataset": _json(plan.dataset),
        "parameters": plan.parameters,
        "multiply_adds": plan.multiply_adds,
        "steps": plan.steps,
        "step": _step(plan.step),
        "memory": _memory(plan.memory),
        "cost": _json(plan.cost),
        "loader": _json(plan.loader),
        "shards": _json(plan.shards),
        "checkpoints": _json(plan.checkpoints),
        "alternatives": [_alternative(one) for one in plan.alternatives],
        "recommended": {
            "fits": recommended.fits,
            "settings": recommended.settings,
            "changes": recommended.changes,
            "reasons": recommended.reasons,
        },
        "remarks": list(plan.remarks),
    }


def _step(step: StepEstimate) -> dict[str, Any]:
    return {
        **_json(step),
        "seconds": _json(step.seconds),
        "computing": _json(step.computing),
        "images_per_second": _json(step.images_per_second),
        "utilization": _json(step.utilization),
    }


def _memory(memory: GpuMemory) -> dict[str, Any]:
    return {"fits": memory.fits, "needed": memory.needed, "size": memory.size, "kinds": memory.kinds}


def _alternative(one: Alternative) -> dict[str, Any]:
    return {
        "zero_stage": one.zero_stage,
        "activation_checkpointing": one.policy,
        "micro_size": one.micro_size,
        "largest_micro_size": one.largest_micro_size,
        "memory": _memory(one.memory),
        "seconds": None if one.step is None else _json(one.step.seconds),
        "images_per_second": None if one.step is None else _json(one.step.images_per_second),
        "of_the_recipe": one.is_own,
    }


def _json(value: Any) -> Any:
    if isinstance(value, Range) and value.is_exact:
        return value.value
    if is_dataclass(value):
        return {field.name: _json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [_json(one) for one in value]
    if isinstance(value, dict):
        return {key: _json(one) for key, one in value.items()}
    return value

"""The plan of a stage as JSON."""

from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel

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
        "dataset": json_value(plan.dataset),
        "parameters": plan.parameters,
        "multiply_adds": plan.multiply_adds,
        "steps": plan.steps,
        "step": _step(plan.step),
        "memory": _memory(plan.memory),
        "cost": json_value(plan.cost),
        "loader": json_value(plan.loader),
        "shards": json_value(plan.shards),
        "checkpoints": json_value(plan.checkpoints),
        "failures": {
            "save": json_value(plan.timing.save),
            "start_seconds": plan.timing.start,
            "useful": json_value(plan.useful),
            "intervals": json_value(plan.intervals),
        },
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
        **json_value(step),
        "seconds": json_value(step.seconds),
        "computing": json_value(step.computing),
        "images_per_second": json_value(step.images_per_second),
        "utilization": json_value(step.utilization),
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
        "seconds": None if one.step is None else json_value(one.step.seconds),
        "images_per_second": None if one.step is None else json_value(one.step.images_per_second),
        "of_the_recipe": one.is_own,
    }


def json_value(value: Any) -> Any:
    """A record of the planner for JSON; a range as an object, or as its value if it has no ends."""
    if isinstance(value, Range) and value.is_exact:
        return value.value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, range):
        return [value.start, value.stop]
    if is_dataclass(value):
        return {field.name: json_value(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [json_value(one) for one in value]
    if isinstance(value, dict):
        return {key: json_value(one) for key, one in value.items()}
    return value

"""Whether a rank's state and activations fit its GPU, and those of all ranks of a node its main memory."""

from data.text.counted import counted
from pipeline.memory_estimate import estimate_memory, host_need, host_remedies, remedies
from pipeline.planner.stage_memory import gpu_reserve
from pipeline.preflight.finding import Findings
from pipeline.preflight.machine import Machine
from pipeline.recipe.schema import TrainStage

_TIGHT = 0.9
"""Share of a machine's memory above which what the estimate omits may not fit."""


def assess_memory(
    name: str, stage: TrainStage, classes: int, *, begun: bool, machine: Machine | None = None
) -> Findings:
    """Assess the estimated memory of a stage with `classes` classes; `begun` once it has a checkpoint.

    `machine` is where it will run; None if that is another one, which only the recipe describes.
    """
    found, resources = Findings(name), stage.resources
    machine = machine.seen_by(stage) if machine else None
    on_gpus = bool(machine.gpus) if machine else resources.gpus_per_rank > 0
    if on_gpus:
        _assess_gpu(found, stage, classes, begun, machine)
    elif machine is None:
        found.ok("memory: the stage uses no GPUs, so their size is not checked")
    if machine is not None:
        _assess_host(found, stage, classes, begun, machine)
    if resources.memory_gigabytes is not None:
        memory = estimate_memory(stage, classes, resources.ranks, on_cpu=resources.gpus_per_rank == 0)
        # Pages of buckets in main memory that no gradient fills are never touched.
        need = resources.ranks_per_node * (
            memory.staging + (0 if resources.gpus_per_rank else memory.device - memory.buckets)
        )
        what = (
            f"memory of a node: {resources.ranks_per_node} ranks need at least {need / 2**30:.1f} of the "
            f"{resources.memory_gigabytes} GiB of resources.memory_gigabytes"
        )
        if need <= resources.memory_gigabytes * 2**30:
            found.ok(what)
        elif resources.gpus_per_rank:
            found.error(what, "raise it, or use more nodes")
        else:
            found.warning(what, "raise it, or use more nodes")  # on CPUs the activations are only a rough estimate
    return found


def _assess_gpu(found: Findings, stage: TrainStage, classes: int, begun: bool, machine: Machine | None) -> None:
    """The memory of a rank's GPU: the smallest of the machine, else that of the recipe."""
    resources = stage.resources
    memory = estimate_memory(stage, classes, resources.ranks)
    smallest = min(machine.gpus, key=lambda gpu: gpu.memory) if machine and machine.gpus else None
    size = smallest.memory if smallest else resources.gpu_gigabytes * 1e9
    whose = f"a GPU here ({smallest.name})" if smallest else "a GPU (resources.gpu_gigabytes)"
    reserve = gpu_reserve(memory.activations)
    what = (
        f"memory: a rank needs {(memory.device + reserve.value) / 1e9:.1f} of the {size / 1e9:.3g} GB of {whose}, by "
        f"estimate: {memory.kinds}, and {reserve.value / 1e9:.1f} GB for CUDA and fragmentation (assumed)"
    )
    if memory.device + reserve.most <= size:
        found.ok(what)
        return
    fix = remedies(stage, classes, resources.ranks, begun=begun)
    found.error(what, fix) if memory.device + reserve.value > size else found.warning(what, fix)


def _assess_host(found: Findings, stage: TrainStage, classes: int, begun: bool, machine: Machine) -> None:
    """The main memory of this machine, for all ranks that run here."""
    host, on_gpus = machine.host, bool(machine.gpus)
    need, held = host_need(stage, classes, on_gpus=on_gpus)
    limit = ", the limit of its cgroup," if host.limited else ""
    what = (
        f"memory of this machine: {counted(stage.resources.ranks_per_node, 'rank')} need {need / 1e9:.1f} of its "
        f"{host.memory / 1e9:.1f} GB{limit} by estimate; each: {held}"
    )
    if need <= _TIGHT * host.memory:
        found.ok(what)
        return
    fix = host_remedies(stage, classes, on_gpus=on_gpus, begun=begun)
    found.error(what, fix) if need > host.memory else found.warning(what, fix)

"""Whether a rank's state and activations fit its GPU, and those of all ranks of a node its main memory."""

from pipeline.memory_estimate import estimate_memory, remedies
from pipeline.preflight.finding import Findings
from pipeline.recipe.schema import TrainStage

_TIGHT = 0.9
"""Share of a GPU above which what the estimate omits may not fit: buffers of kernels and collectives, fragmentation."""


def assess_memory(name: str, stage: TrainStage, classes: int, *, begun: bool) -> Findings:
    """Assess the estimated memory of a stage with `classes` classes; `begun` once it has a checkpoint."""
    found, resources = Findings(name), stage.resources
    memory = estimate_memory(stage, classes, resources.ranks)
    if resources.gpus_per_rank:
        what = (
            f"memory: a rank needs {memory.device / 1e9:.1f} of the {resources.gpu_gigabytes:g} GB of a GPU "
            f"(resources.gpu_gigabytes), by estimate: {memory.kinds}"
        )
        share = memory.device / (resources.gpu_gigabytes * 1e9)
        if share <= _TIGHT:
            found.ok(what)
        else:
            fix = remedies(stage, classes, resources.ranks, begun=begun)
            found.error(what, fix) if share > 1 else found.warning(what, fix)
    else:
        found.ok("memory: the stage uses no GPUs, so their size is not checked")
    if resources.memory_gigabytes is not None:
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

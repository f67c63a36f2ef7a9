"""Whether a rank's state and the activations of its micro-batch fit the GPU, and those of a node its memory."""

from pipeline.memory_estimate import estimate_memory, remedies
from pipeline.preflight.finding import Findings
from pipeline.recipe.schema import TrainStage

_TIGHT = 0.9
"""Share of a GPU above which what is not counted may be too much: buffers of kernels and collectives, fragmentation."""


def assess_memory(name: str, stage: TrainStage, classes: int, *, begun: bool) -> Findings:
    """By estimate, for `classes` classes; `begun` once the stage has a checkpoint."""
    found, asked = Findings(name), stage.resources
    memory = estimate_memory(stage, classes, asked.ranks)
    if asked.gpus_per_rank:
        what = (
            f"memory: a rank needs {memory.device / 1e9:.1f} of the {asked.gpu_gigabytes:g} GB of a GPU "
            f"(resources.gpu_gigabytes), by estimate: {memory.kinds}"
        )
        share = memory.device / (asked.gpu_gigabytes * 1e9)
        if share <= _TIGHT:
            found.ok(what)
        else:
            fix = remedies(stage, classes, asked.ranks, begun=begun)
            found.error(what, fix) if share > 1 else found.warning(what, fix)
    else:
        found.ok("memory: no GPUs, so none is held against the needs of a rank")
    if asked.memory_gigabytes is not None:
        # Of buckets in main memory, only what gradients fill is ever touched.
        need = asked.ranks_per_node * (memory.staging + (0 if asked.gpus_per_rank else memory.device - memory.buckets))
        what = (
            f"memory of a node: {asked.ranks_per_node} ranks need at least {need / 2**30:.1f} of the "
            f"{asked.memory_gigabytes} GiB of resources.memory_gigabytes"
        )
        if need <= asked.memory_gigabytes * 2**30:
            found.ok(what)
        elif asked.gpus_per_rank:
            found.error(what, "raise it, or take more nodes")
        else:
            found.warning(what, "raise it, or take more nodes")  # activations of a processor are an estimate
    return found

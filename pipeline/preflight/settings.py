"""Whether the settings of a stage fit each other, as far as that can be checked without its data."""

from pathlib import Path

import numpy as np

from data.text.counted import counted
from pipeline.compiler import check_compiler
from pipeline.fused_kernels import check_fused_depthwise
from pipeline.model_check import check_model
from pipeline.plan import check_ranks, sample_order
from pipeline.preflight.finding import Findings
from pipeline.recipe.schema import SMALL_IMAGES, Recipe, TrainStage
from pipeline.runs.announcements import evaluation_view


def assess_settings(recipe: Recipe, name: str, *, elsewhere: bool) -> Findings:
    """Model, image size, compiler, and how a batch is split; with `elsewhere`, the stage runs on other machines."""
    found, stage = Findings(name), recipe.stages[name]
    resources = stage.resources
    with found.capture():
        check_model(recipe, stage, "")
        found.ok(f"model: {stage.model.name} at {stage.resolution} pixels, {stage.precision}")
    view = f"evaluation: {evaluation_view(stage)}"
    if stage.data.evaluation_crop == "center" and stage.resolution < SMALL_IMAGES:
        found.warning(view, "set data.evaluation_crop=whole, the default at this size")
    else:
        found.ok(view)
    if isinstance(stage, TrainStage):
        if stage.compile and not elsewhere:
            with found.capture():
                check_compiler("")
        with found.capture():
            check_fused_depthwise(stage, "", elsewhere=elsewhere)
        with found.capture():
            check_ranks(stage, resources.ranks, "")
            found.ok(
                f"batch: {counted(stage.batch.global_size, 'image')} as "
                f"{counted(stage.batch.micro_batches, 'micro-batch', 'micro-batches')} of "
                f"{stage.batch.micro_size} on {resources.nodes} x {counted(resources.ranks_per_node, 'rank')}, "
                f"{stage.batch.micro_batches // resources.ranks} each"
            )
        if stage.data.lanes is not None:
            with found.capture():  # assuming enough samples
                sample_order(stage, recipe.seed, np.array([stage.data.lanes]), "")
    if resources.cpus_per_rank is not None and resources.cpus_per_rank < stage.data.workers:
        found.warning(
            f"resources.cpus_per_rank: {resources.cpus_per_rank} processors for {stage.data.workers} reader threads",
            f"set it to {stage.busy_threads}, or data.workers to {resources.cpus_per_rank}",
        )
    if resources.container and resources.container.startswith("/") and not Path(resources.container).exists():
        found.warning(
            f"resources.container: {resources.container} is not on this machine", "make sure that the nodes have it"
        )
    return found

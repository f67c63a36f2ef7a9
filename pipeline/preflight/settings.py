"""Whether the settings of a stage go together, as far as that shows without its data."""

from pathlib import Path

import numpy as np

from pipeline.plan import check_compiler, check_model, check_ranks, sample_order
from pipeline.preflight.finding import Findings
from pipeline.recipe.schema import Recipe, TrainStage


def assess_settings(recipe: Recipe, name: str, *, elsewhere: bool) -> Findings:
    """Model, picture size, compiler, and how a batch is shared; with `elsewhere` the stage runs on other machines."""
    found, stage = Findings(name), recipe.stages[name]
    asked = stage.resources
    with found.capture():
        check_model(recipe, stage, "")
        found.ok(f"model: {stage.model.name} at {stage.resolution} pixels, {stage.precision}")
    if isinstance(stage, TrainStage):
        if stage.compile and not elsewhere:
            with found.capture():
                check_compiler("")
        with found.capture():
            check_ranks(stage, asked.ranks, "")
            found.ok(
                f"batch: {stage.batch.global_size:,} pictures as {stage.batch.micro_batches:,} micro-batches of "
                f"{stage.batch.micro_size} on {asked.nodes} x {asked.ranks_per_node} ranks, "
                f"{stage.batch.micro_batches // asked.ranks} each"
            )
        with found.capture():  # lanes against samples as many as could be wanted
            sample_order(stage, recipe.seed, np.array([stage.data.lanes]), "")
    if asked.cpus_per_rank is not None and asked.cpus_per_rank < stage.data.workers:
        found.warning(
            f"resources.cpus_per_rank: {asked.cpus_per_rank} processors for {stage.data.workers} reader threads",
            f"set it to {stage.busy_threads}, or data.workers to {asked.cpus_per_rank}",
        )
    if asked.container and asked.container.startswith("/") and not Path(asked.container).exists():
        found.warning(f"resources.container: {asked.container} is not on this machine", "see that the nodes have it")
    return found

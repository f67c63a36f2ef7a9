"""What the recipes of the paper need: GPUs, memory, time.

    python -m benchmarks.recipes                          # the table of docs/recipes.md; some minutes
    python -m benchmarks.recipes --recipe coatnet-5-in21k --gpu a100-80

Computed by the planner of `coatnet plan` from the recipes and the models; nothing is measured.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from jobs.bundled_recipes import bundled_recipes
from pipeline.planner.datasets import KNOWN, planned_dataset
from pipeline.planner.hardware import Cluster, find_cluster
from pipeline.planner.ranges import Range
from pipeline.planner.stage_memory import gpu_memory
from pipeline.planner.stage_plan import PlannedTime, plan_time
from pipeline.planner.step_estimate import parameters_of
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from pipeline.state_bytes import checkpoint_bytes

GPUS_OF_A_NODE = 8


def planned_stages(recipe: Path, gpu: str = "h100") -> Iterator[tuple[str, str, PlannedTime, Cluster, int]]:
    """Recipe, stage, plan, cluster and classes of each training stage on data whose size is known by its name."""
    loaded = load_recipe(recipe)
    for name, stage in loaded.stages.items():
        if not isinstance(stage, TrainStage) or Path(stage.data.train or "").parent.name not in KNOWN:
            continue
        cluster = find_cluster(gpu, stage.resources.ranks, GPUS_OF_A_NODE)
        dataset = planned_dataset(stage)
        yield loaded.name, name, plan_time(loaded, name, cluster, dataset), cluster, dataset.classes


def row(planned: PlannedTime, cluster: Cluster, classes: int) -> tuple[str, ...]:
    """The cells of a stage behind its name."""
    stage, step = planned.stage, planned.step
    memory = gpu_memory(stage, classes, cluster)
    hours = step.seconds * (planned.steps / 3600)
    minutes = stage.checkpoint.interval * step.seconds.value / 60
    return (
        f"{cluster.nodes} x {cluster.gpus_per_node}",
        str(stage.batch.micro_size),
        f"{stage.precision}, {stage.zero_stage}",
        str(stage.activation_checkpointing),
        f"{memory.needed / 1e9:.0f}",
        f"{planned.steps:,}",
        f"{step.utilization.value:.0%}",
        f"{stage.checkpoint.interval:,} = {minutes:.0f} min",
        f"{checkpoint_bytes(stage, parameters_of(stage, classes)) / 1e9:.1f}",
        _ranged(hours),
        _ranged(hours * (cluster.gpus / 24)),
    )


def markdown(recipes: list[Path], gpu: str) -> Iterator[str]:
    """The lines of the table, with the name of a recipe at its first stage."""
    headings = (
        "recipe", "stage", "nodes x GPUs", "micro-batch", "precision, ZeRO", "recomputed", "GB of a GPU", "steps",
        "MFU", "saved every", "GB of a save", "hours", "GPU-days",
    )  # fmt: skip
    yield _line(headings)
    yield _line(("---",) * 6 + ("---:",) * 7)
    before = ""
    for path in recipes:
        for recipe, name, planned, cluster, classes in planned_stages(path, gpu):
            yield _line((f"`{recipe}`" if recipe != before else "", f"`{name}`", *row(planned, cluster, classes)))
            before = recipe


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _ranged(value: Range) -> str:
    return f"{_rounded(value.value)} ({_rounded(value.least)} to {_rounded(value.most)})"


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = bundled_recipes()
    parser.add_argument("--recipe", choices=bundled, metavar="NAME", help="by default all")
    parser.add_argument("--gpu", default="h100", help="as for `coatnet plan`")
    arguments = parser.parse_args()
    paths = [bundled[arguments.recipe]] if arguments.recipe else list(bundled.values())
    for line in markdown(paths, arguments.gpu):
        print(line, flush=True)


if __name__ == "__main__":
    main()

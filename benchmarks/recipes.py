"""What the recipes of the paper need: GPUs, memory, time.

    python -m benchmarks.recipes                          # the table of docs/recipes.md
    python -m benchmarks.recipes --recipe coatnet-5-in21k --device A100 --utilization 0.3

Computed from the recipes and the models; nothing is measured.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.bundled_recipes import bundled_recipes
from models.complexity import count_parameters
from pipeline.memory_estimate import checkpoint_bytes, estimate_memory
from pipeline.ranks.gpus import PEAKS
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from pipeline.throughput import demand


@dataclass(frozen=True, slots=True)
class PaperDataset:
    """Training samples and classes, for an estimate before the shards exist."""

    samples: int
    classes: int


DATASETS = {
    "in1k": PaperDataset(1_281_167, 1000),
    "in21k": PaperDataset(12_720_275, 21_843),
    # The papers print rounded numbers: "300M" images with 18 thousand classes, "3B" with 30 thousand.
    "jft": PaperDataset(300_000_000, 18_000),
    "jft3b": PaperDataset(3_000_000_000, 30_000),
}
"""By the name of the folder that has their shards."""

SLACK = 1.2
"""Factor for what is not counted: gradients of activations, buckets of collectives, fragmentation."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One training stage of a recipe on GPUs of one kind."""

    recipe: str
    name: str
    stage: TrainStage
    steps: int
    memory: float
    """Gigabytes on each GPU, with `SLACK`."""
    saved: float
    """Gigabytes of a checkpoint."""
    seconds: float
    """Of a step."""

    @property
    def save_minutes(self) -> float:
        """Minutes between two saves."""
        return self.stage.checkpoint.interval * self.seconds / 60

    @property
    def hours(self) -> float:
        return self.steps * self.seconds / 3600

    @property
    def gpu_days(self) -> float:
        return self.hours * self.stage.resources.ranks / 24


def estimates(recipe: Path, device: str = "H100", utilization: float = 0.4) -> Iterator[Estimate]:
    """The training stages of `recipe` whose shards are those of a dataset in `DATASETS`."""
    loaded = load_recipe(recipe)
    for name, stage in loaded.stages.items():
        dataset = DATASETS.get(Path(stage.data.train or "").parent.name)
        if dataset is None or not isinstance(stage, TrainStage):
            continue
        batch = stage.batch.global_size
        parameters = count_parameters(stage.model.variant, stage.resolution, dataset.classes)
        yield Estimate(
            recipe=loaded.name,
            name=name,
            stage=stage,
            steps=stage.steps or math.ceil((stage.epochs or 0) * dataset.samples / batch),
            memory=SLACK * estimate_memory(stage, dataset.classes, stage.resources.ranks).device / 1e9,
            saved=checkpoint_bytes(stage, parameters) / 1e9,
            seconds=batch / (stage.resources.ranks * demand(stage, device, utilization)),
        )


def markdown(rows: list[Estimate]) -> str:
    """The rows as the table of docs/recipes.md, with the name of a recipe at its first stage."""
    headings = (
        "recipe", "stage", "nodes x GPUs", "micro-batch", "precision, ZeRO", "recomputed", "GB of a GPU", "steps",
        "saved every", "GB of a save", "hours", "GPU-days",
    )  # fmt: skip
    lines = [headings, ("---",) * 6 + ("---:",) * 6]
    before = ""
    for row in rows:
        stage, resources = row.stage, row.stage.resources
        lines.append(
            (
                f"`{row.recipe}`" if row.recipe != before else "",
                f"`{row.name}`",
                f"{resources.nodes} x {resources.ranks // resources.nodes}",
                str(stage.batch.micro_size),
                f"{stage.precision}, {stage.zero_stage}",
                str(stage.activation_checkpointing),
                f"{row.memory:.0f}",
                f"{row.steps:,}",
                f"{stage.checkpoint.interval:,} = {row.save_minutes:.0f} min",
                f"{row.saved:.1f}",
                _rounded(row.hours),
                _rounded(row.gpu_days),
            )
        )
        before = row.recipe
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=bundled_recipes(), metavar="NAME", help="by default all")
    parser.add_argument("--device", choices=PEAKS, default="H100")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of its peak that training reaches")
    arguments = parser.parse_args()
    bundled = bundled_recipes()
    paths = [bundled[arguments.recipe]] if arguments.recipe else bundled.values()
    rows = [row for path in paths for row in estimates(path, arguments.device, arguments.utilization)]
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()

"""Processor cores that each GPU needs for reading, by model and resolution.

    python -m benchmarks.cores                # the table of docs/benchmarks.md; two minutes
    python -m benchmarks.cores --gpu h200

Images per second are the planner's estimate for the bundled recipes; cores are that times the measured processor time
of an image, see `loader_milliseconds` in pipeline/planner/hardware.yaml.
"""

import argparse
from collections.abc import Iterator, Sequence

from benchmarks.recipes import planned_stages
from jobs.bundled_recipes import bundled_recipes
from pipeline.planner.hardware import figure_range
from pipeline.planner.ranges import Range
from pipeline.planner.stage_loads import loader_load

RECIPES = (
    "coatnet-0-in1k", "coatnet-1-in1k", "coatnet-2-in21k", "coatnet-3-in21k", "coatnet-4-in21k", "coatnet-5-in21k",
    "coatnet-6-in21k", "coatnet-7-in21k",
)  # fmt: skip
"""One for each variant."""
RECOMPRESSED = 1.63
"""Speed of shards with `--short-side 384 --quality 90 --subsampling 4:2:0 --recompress --restart-markers`, by
`shard_encodings`."""


def rows(gpu: str, recipes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Model, resolution, images per second of a GPU, and the cores that it needs for each kind of shards."""
    bundled = bundled_recipes()
    for name in recipes:
        for _, _, planned, cluster, _ in planned_stages(bundled[name], gpu):
            stage, step = planned.stage, planned.step
            images = step.images_per_second * (1 / cluster.gpus)
            local = loader_load(stage, step, cluster).cores_per_gpu
            download = figure_range(cluster.law.download_milliseconds)
            remote = Range(*(
                cores + speed * milliseconds / 1e3
                for cores, speed, milliseconds in zip(_ends(local), _ends(images), _ends(download), strict=True)
            ))  # fmt: skip
            yield (
                stage.model.name, str(stage.resolution), f"{images.value:,.0f}", _ranged(local), f"{remote.value:.1f}",
                f"{local.value / RECOMPRESSED:.1f}",
            )  # fmt: skip


def _ends(value: Range) -> tuple[float, float, float]:
    return value.value, value.least, value.most


def _ranged(value: Range) -> str:
    return f"{value.value:.1f} ({value.least:.1f} to {value.most:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100", help="as for `coatnet plan`")
    parser.add_argument("--recipe", choices=RECIPES, metavar="NAME", help="by default all of them")
    arguments = parser.parse_args()
    headings = ("model", "pixels", "images per second of a GPU", "cores, JPEGs as they are", "from S3", "recompressed")
    print(f"| {' | '.join(headings)} |\n|---|---|---:|---:|---:|---:|")
    before = None
    for row in rows(arguments.gpu, [arguments.recipe] if arguments.recipe else RECIPES):
        if row[:2] != before:  # stages of one model and resolution differ little
            print(f"| {' | '.join(row)} |", flush=True)
        before = row[:2]


if __name__ == "__main__":
    main()

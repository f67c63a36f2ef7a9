"""The tables of docs/scale.md: CoAtNet-7 on as many images as JFT-3B has, on 8 to 4,096 GPUs.

    python -m benchmarks.scale                        # pretraining of the recipe coatnet-7-jft3b on H100s, 8 in a node
    python -m benchmarks.scale --gpus 8 512 --remote  # with shards and checkpoints in an object store

Computed; nothing is measured on GPUs. Each figure names what it rests on: efficiencies.yaml, hardware.yaml and
cluster_figures.yaml in pipeline/planner/.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.remote.storage import PIECE
from jobs.bundled_recipes import bundled_recipes, load_recipe
from pipeline.planner.datasets import PlannedDataset, planned_dataset
from pipeline.planner.failures.run_timing import RunTiming, publishing_seconds, save_cost
from pipeline.planner.failures.save_interval import best_interval
from pipeline.planner.failures.useful_time import MONTH, simulate, useful_time
from pipeline.planner.hardware import Cluster, find_cluster
from pipeline.planner.scaling.limits import Limit, limits, loads
from pipeline.planner.scaling.load import ScaledRun, lanes_of_nodes
from pipeline.planner.stage_memory import with_micro_batch
from pipeline.planner.stage_timing import stage_timing
from pipeline.planner.step_estimate import StepEstimate, estimate_step
from pipeline.planner.trace.training_trace import Workload, build_on_meta
from pipeline.recipe.schema import TrainStage
from pipeline.state_bytes import checkpoint_bytes

RECIPE, STAGE = "coatnet-7-jft3b", "pretrain"
GPUS = (8, 64, 512, 1024, 4096)
GPU, GPUS_OF_A_NODE = "H100", 8


@dataclass(frozen=True, slots=True)
class ScaledStage:
    """The stage of the recipe, on GPUs whose number is open."""

    stage: TrainStage
    dataset: PlannedDataset
    parameters: int
    tensors: int

    @property
    def most_ranks(self) -> int:
        """On which the recipe runs as it is: one micro-batch each. More need smaller ones, which is another run."""
        return self.stage.batch.micro_batches

    def micro_batch(self, ranks: int) -> int:
        """Images of one forward."""
        return min(self.stage.batch.micro_size, self.stage.batch.global_size // ranks)

    def cluster(self, ranks: int) -> Cluster:
        """So many GPUs."""
        return find_cluster(GPU, ranks, GPUS_OF_A_NODE)

    def step(self, ranks: int) -> StepEstimate:
        """A step of the recipe's global batch, if the data is there in time."""
        changed = with_micro_batch(self.stage, self.micro_batch(ranks))
        return estimate_step(changed, self.dataset.classes, self.cluster(ranks))

    def step_seconds(self, ranks: int) -> float:
        """Seconds of `step`."""
        return self.step(ranks).seconds.value

    @property
    def state_bytes(self) -> int:
        """Of a checkpoint."""
        return checkpoint_bytes(self.stage, self.parameters)

    def scaled(self, remote: bool) -> ScaledRun:
        """As the loads of a run see it."""
        stage = self.stage
        return ScaledRun(
            parameters=self.parameters,
            tensors=self.tensors,
            state_bytes=self.state_bytes,
            zero_stage=stage.zero_stage,
            batch=stage.batch.global_size,
            samples=self.dataset.samples,
            sample_bytes=self.dataset.image_bytes.value,
            shards=self.dataset.shards,
            interval=stage.checkpoint.interval,
            kept_checkpoints=stage.checkpoint.keep_last,
            step_seconds=self.step_seconds,
            ranks_per_node=GPUS_OF_A_NODE,
            lanes=stage.data.lanes,
            log_every=stage.log.every_steps,
            remote=remote,
            verify_shards=stage.data.verify_shards,
        )

    def timing(self, ranks: int, remote: bool) -> RunTiming:
        """As failures see it."""
        seconds, interval = self.step_seconds(ranks), self.stage.checkpoint.interval
        cluster, dataset = self.cluster(ranks), self.dataset
        return stage_timing(self.stage, dataset.classes, dataset.shards, cluster, seconds, interval, remote=remote)


def stage_of_recipe() -> ScaledStage:
    """The stage that the tables are about."""
    stage = load_recipe(bundled_recipes()[RECIPE]).stages[STAGE]
    assert isinstance(stage, TrainStage)
    dataset = planned_dataset(stage)
    model = build_on_meta(Workload(stage.model.variant, stage.resolution, dataset.classes, 1))
    sizes = [parameter.numel() for parameter in model.parameters()]
    return ScaledStage(stage, dataset, sum(sizes), len(sizes))


def step_table(stage: ScaledStage, gpus: Sequence[int]) -> str:
    """Time of a step, and what the recipe needs for that many GPUs."""
    rows = []
    for ranks in gpus:
        micro = stage.micro_batch(ranks)
        step = stage.step(ranks)
        seconds, exposed = step.seconds, step.communication.exposed
        changed = "" if ranks <= stage.most_ranks else f"needs `micro_size: {micro}`, another run"
        rows.append(
            (f"{ranks:,}", str(micro), str(step.micro_batches),
             f"{_seconds(seconds.value)} ({_seconds(seconds.least)} to {_seconds(seconds.most)})",
             f"{_seconds(exposed.value)} = {exposed.value / seconds.value:.0%}",
             f"{step.images_per_second.value:,.0f}", f"{step.utilization.value:.1%}",
             _seconds(stage.stage.checkpoint.interval * seconds.value), changed)
        )  # fmt: skip
    headings = (
        "GPUs", "micro-batch", "a step has", "step", "exposed communication", "images/s", "MFU", "between saves", ""
    )  # fmt: skip
    return _markdown(headings, rows, right=range(8))


def load_table(stage: ScaledStage, gpus: Sequence[int], remote: bool) -> str:
    """The share of its limit that each part takes."""
    run = stage.scaled(remote)
    found = {ranks: {load.name: load for load in loads(run, ranks)} for ranks in gpus}
    rows = [
        (load.phase, load.name, *(_share(found[ranks][load.name].share) for ranks in gpus), load.basis.value)
        for load in loads(run, gpus[-1])
    ]
    headings = ("when", "part", *(f"{ranks:,}" for ranks in gpus), "basis")
    return _markdown(headings, rows, right=range(2, 2 + len(gpus)))


def limit_table(found: Sequence[Limit]) -> str:
    """Which part has too much first, what that rests on, and what the program does about it."""
    rows = [
        (limit.load.name, f"{limit.ranks:,}" if limit.ranks else "never", limit.load.origin, limit.load.design)
        for limit in found
    ]
    return _markdown(("part", "too much from", "the number is from", "the design"), rows, right=(1,))


def data_table(stage: ScaledStage, gpus: Sequence[int], remote: bool) -> str:
    """Reading shards and writing checkpoints; a shared file system has no downloads."""
    run, rows = stage.scaled(remote), []
    for ranks in gpus:
        lanes = lanes_of_nodes(run, ranks) / lanes_of_nodes(run, 1) if remote else 1.0
        per_second = run.images_per_second(ranks) * run.sample_bytes * lanes
        downloads = (f"{lanes:,.1f}", f"{per_second / PIECE:,.0f}") if remote else ()
        cost = save_cost(run.state_bytes, ranks, min(ranks, run.ranks_per_node), remote=remote)
        rows.append(
            (f"{ranks:,}", f"{per_second / 1e9:,.2f}", *downloads, f"{run.state_bytes / ranks / 1e6:,.0f}",
             f"{ranks + 3:,}", _seconds(cost.stall), _seconds(cost.write),
             _seconds(publishing_seconds(ranks, remote=remote)))
        )  # fmt: skip
    headings = (
        "GPUs", "GB/s of shards", *(("downloads of each", "GET/s") if remote else ()), "MB of a rank's file",
        "files of a save", "stall", "until it counts", "of which the leader alone",
    )  # fmt: skip
    return _markdown(headings, rows, right=range(len(headings)))


def failure_table(stage: ScaledStage, gpus: Sequence[int], remote: bool) -> str:
    """Useful time in a month, by formula and simulated, and the best interval."""
    rows = []
    for ranks in gpus:
        run = stage.timing(ranks, remote)
        by_formula, simulated, advice = useful_time(run), simulate(run, runs=40), best_interval(run)
        best = replace(run, interval=advice.best.steps)
        bound = ", as long as a save" if advice.write_binds else ""
        rows.append(
            (f"{ranks:,}", f"{by_formula.seconds_between_failures / 3600:,.1f} h", _seconds(run.downtime()),
             f"{100 * by_formula.exact:.2f} %", f"{100 * simulated.share:.2f} ± {100 * simulated.error:.2f} %",
             f"{advice.own.steps:,} = {_seconds(advice.own.seconds)}",
             f"{advice.best.steps:,} = {_seconds(best.work)}{bound}", f"{100 * advice.best.share:.2f} %")
        )  # fmt: skip
    headings = (
        "GPUs", "a failure every", "down after one", "useful", "simulated", "saves now, steps", "best, steps",
        "useful then",
    )  # fmt: skip
    return _markdown(headings, rows, right=range(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--remote", action="store_true", help="shards and checkpoints are in an object store")
    arguments = parser.parse_args()
    stage, gpus, remote = stage_of_recipe(), arguments.gpus, arguments.remote
    place = "an object store" if remote else "a shared file system"
    batch = stage.stage.batch
    dataset = stage.dataset
    print(
        f"Stage `{STAGE}` of `{RECIPE}`: {stage.parameters / 1e9:.2f} billion parameters, {dataset.samples:,} images "
        f"of {dataset.image_bytes.value:,.0f} bytes (assumed), {dataset.classes:,} classes, {dataset.shards:,} shards, "
        f"on {GPU}s, "
        f"{GPUS_OF_A_NODE} in a node, with its data in {place}. The recipe itself runs on at most "
        f"{stage.most_ranks:,} GPUs: its {batch.global_size:,} images are {batch.micro_batches:,} micro-batches of "
        f"{batch.micro_size}.\n"
    )
    tables = {
        "A step": step_table(stage, gpus),
        "Shards and saves": data_table(stage, gpus, remote),
        f"Failures, in {MONTH / 86400:.0f} days": failure_table(stage, gpus, remote),
        "Share of each limit": load_table(stage, gpus, remote),
        "What breaks first": limit_table(limits(stage.scaled(remote), max(gpus))),
    }
    print("\n".join(f"## {title}\n\n{table}" for title, table in tables.items()), end="")


def _share(value: float) -> str:
    """In per cent, with two digits that count, or as less than a hundredth."""
    percent = 100 * value
    if percent < 0.01:
        return "< 0.01 %"
    return f"{percent:,.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _seconds(value: float) -> str:
    if value >= 5400:
        return f"{value / 3600:,.1f} h"
    if value >= 90:
        return f"{value / 60:,.1f} min"
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    line = ["---:" if number in right else "---" for number in range(len(headings))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, line, *rows))


if __name__ == "__main__":
    main()

"""Runs that are killed and stopped at random moments, compared with an uninterrupted one.

`python -m tests.end_to_end.fault_driver --kills 1000` is the long form of test_faults.py; `--help` lists its variants.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.building.build import build_shards
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from tests.conftest import write_pictures
from tests.end_to_end.checkpoint_places import CheckpointPlace, InBucket
from tests.end_to_end.faulty_run import Run, make_recipe
from tests.end_to_end.random_faults import Fault, Setup, draw_faults, steps_for
from tests.servers.fault_proxy import FaultProxy
from tests.servers.s3 import S3Server
from tests.support.recipes import checkpoint_bytes, curves, events

TAGS = (
    "train/loss", "train/gradient_norm", "train/learning_rate", "train/skipped_samples",
    "validation/loss", "validation/top1", "validation/top5",
)  # fmt: skip


_Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Parameter -> difference and reference."""


def undisturbed(folder: Path, shards: Path, steps: int, setup: Setup, *, fresh: bool = False) -> Run:
    """An uninterrupted run with its checkpoints in the run folder."""
    run = Run(make_recipe(folder, shards, setup), steps, setup)
    run.finish(fresh=fresh)
    rolled_back = [entry["step"] for entry in events(run.folder) if entry["event"] == "roll_back"]
    assert rolled_back == [step for step in range(1, steps + 1) if setup.rolls_back(step)]
    return run


def disturbed(
    folder: Path, shards: Path, faults: list[Fault], setup: Setup, place: CheckpointPlace | None = None
) -> Run:
    """A finished run that survived `faults`."""
    run = Run(make_recipe(folder, shards, setup), steps_for(len(faults)), setup)
    run.place = place or run.place
    for number, fault in enumerate(faults):
        run.survive(fault)
        if sys.stdout.isatty():
            print(f"{number + 1}/{len(faults)}", end="\r", flush=True)
    run.finish()
    return run


@contextlib.contextmanager
def in_bucket(server: S3Server, scratch: Path) -> Iterator[InBucket]:
    """A place for checkpoints in the S3 server, behind a proxy that makes requests fail."""
    with FaultProxy(server.port) as proxy:
        yield InBucket(server, proxy, scratch)
        assert all(fault.fired for fault in proxy.faults), [fault for fault in proxy.faults if not fault.fired]


def assert_equal(run: Run, reference: Run) -> None:
    """Every curve and every byte of the last checkpoint."""
    ours, others = curves(run.folder), curves(reference.folder)
    for tag in TAGS:
        assert ours[tag].keys() == others[tag].keys(), tag
        # Losses that are not finite are equal, too.
        assert np.array_equal(list(ours[tag].values()), list(others[tag].values()), equal_nan=True), tag
    assert checkpoint_bytes(run.final) == checkpoint_bytes(reference.final)


@dataclass(frozen=True)
class Differences:
    """The greatest relative differences between two runs."""

    train_loss: float
    validation_loss: float
    weights: float
    """Of the vector of all weights, by its norm."""
    largest: tuple[str, float]
    """Name and relative difference of the parameter that differs most."""

    def __str__(self) -> str:
        name, by = self.largest
        return (
            f"training loss {self.train_loss:.1e}, validation loss {self.validation_loss:.1e}, weights {self.weights:.1e} "
            f"(most {name}: {by:.1e})"
        )


def greatest_differences(run: Run, reference: Run) -> Differences:
    """How much two runs differ that may only differ by rounding."""
    losses = []
    ours, others = curves(run.folder), curves(reference.folder)
    for tag in ("train/loss", "validation/loss"):
        assert ours[tag].keys() == others[tag].keys()
        mine, theirs = (np.array(list(points[tag].values())) for points in (ours, others))
        assert np.array_equal(np.isfinite(mine), np.isfinite(theirs))
        losses.append(float(np.nanmax(abs(mine - theirs) / theirs)))
    weights, expected = (open_checkpoint(one.final).parameters() for one in (run, reference))
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    changes: _Pairs = {name: (weights[name] - expected[name], expected[name]) for name in expected}
    return Differences(
        train_loss=losses[0],
        validation_loss=losses[1],
        weights=_relative(changes),
        largest=_most_different(changes),
    )


def _relative(pairs: _Pairs) -> float:
    """The norm of all differences relative to that of all weights."""
    squares = [(float(change.norm()) ** 2, float(size.norm()) ** 2) for change, size in pairs.values()]
    return float((sum(change for change, _ in squares) / sum(size for _, size in squares)) ** 0.5)


def _most_different(pairs: _Pairs) -> tuple[str, float]:
    found = {name: _relative({name: pair}) for name, pair in pairs.items() if float(pair[1].norm()) > 0}
    name = max(found, key=lambda name: found[name])
    return name, found[name]


def _plan(run: Run) -> TrainPlan:
    plan = plan_stage(load_recipe(run.recipe, run.settings), "pretrain")
    assert isinstance(plan, TrainPlan)
    return plan


def assert_audit_is_exact(run: Run) -> None:
    """Every line of the sample logs has the samples of the sample order, and together they have all of the applied steps."""
    plan = _plan(run)
    seen = np.zeros((run.steps, plan.order.batch), bool)
    for path in sorted((run.folder / "samples").glob("rank-*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            span = slice(line["start"], line["start"] + len(line["ids"]))
            samples = plan.order.at(line["step"], span.start, span.stop)
            assert (line["ids"], line["epochs"]) == (samples.id.tolist(), samples.epoch.tolist()), path
            seen[line["step"], span] = True
    left_out = run.setup.not_finite(run.steps)
    assert not seen[left_out].any(), "samples of steps that were not applied are logged"
    missing = ~np.delete(seen, left_out, axis=0)
    assert not missing.any(), f"{int(missing.sum())} positions of the sample order that no rank logged"


def main() -> None:
    """Starts a small training stage again and again, ends each start at a random moment, and compares the finished run with
    an uninterrupted one: to the bit if all starts have the same number of ranks and ZeRO stage. Without --worlds there are two
    runs: one on two ranks, and one on 1, 2, 3, 4 and 6 in turn with a third of the faults.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="number of faults")
    parser.add_argument("--worlds", type=int, nargs="+", help="numbers of ranks, drawn for each start")
    parser.add_argument("--zero", type=int, nargs="+", default=[1], help="ZeRO stages, drawn for each start")
    parser.add_argument(
        "--storage", choices=("disk", "s3"), default="disk", help="s3: a real server, some requests fail"
    )
    parser.add_argument("--row", type=int, default=0, help="steps in a row that are not finite, and then rolled back")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--fresh", type=int, default=20, help="faults in new interpreters; none with --row")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    changing = arguments.kills // 3
    runs = [(arguments.kills - changing, (2,)), (changing, (1, 2, 3, 4, 6))]
    if arguments.worlds:
        runs = [(arguments.kills, tuple(arguments.worlds))]
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="coatnet-faults-") as name, contextlib.ExitStack() as stack:
        folder, shards = Path(name), Path(name) / "shards"
        build_shards(write_pictures(folder / "pictures", 20), shards, samples_per_shard=7, validation_per_class=5)
        server = None
        if arguments.storage == "s3":
            server = S3Server(folder / "server")
            stack.callback(server.stop)
        for count, worlds in runs:
            setup = Setup(worlds, tuple(arguments.zero), arguments.row, arguments.compile)
            title = " ".join(map(str, worlds))
            reference = undisturbed(folder / f"{title} undisturbed", shards, steps_for(count), setup)
            fresh = 0 if arguments.row else arguments.fresh // len(runs)
            faults = draw_faults(count, setup, fresh, rng)
            there = in_bucket(server, folder / f"{title} copies") if server else contextlib.nullcontext(None)
            with there as place:
                run = disturbed(folder / title, shards, faults, setup, place)
                assert_audit_is_exact(run)
                if setup.is_exact:
                    assert_equal(run, reference)
                print(f"ranks {title}: {run.steps} steps, {dict(run.counts)}; {greatest_differences(run, reference)}")


if __name__ == "__main__":
    main()

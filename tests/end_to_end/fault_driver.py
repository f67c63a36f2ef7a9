"""Runs that are killed and stopped at random moments, compared with an uninterrupted one.

`python -m tests.end_to_end.fault_driver --kills 1000` is the long form of test_faults.py.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch

from data.building.build import build_shards
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from tests.conftest import write_pictures
from tests.support.command import Process, coatnet, ranks, start
from tests.support.recipes import checkpoint_bytes, curves, write_recipe

NO_PROGRESS = "starts in a row ended without a new checkpoint"
EVERY = 3
"""Steps between saves."""
MARGIN = 20
"""Steps between the last fault and the end."""
STEPS_PER_FAULT = 4
TAGS = (
    "train/loss", "train/gradient_norm", "train/learning_rate", "train/skipped_samples",
    "validation/loss", "validation/top1", "validation/top5",
)  # fmt: skip

Moment = Literal["start", "step", "save"]
Victim = Literal["rank", "everyone", "launcher"]
KINDS: tuple[tuple[Victim, signal.Signals], ...] = (
    ("rank", signal.SIGKILL),
    ("everyone", signal.SIGKILL),
    ("launcher", signal.SIGKILL),
    ("rank", signal.SIGTERM),
    ("launcher", signal.SIGTERM),
)


_SECONDS: dict[Moment, float] = {"start": 1.5, "step": 0.05, "save": 0.005}


@dataclass(frozen=True)
class Fault:
    """What happens to one start of a run."""

    victim: Victim
    signal: signal.Signals
    moment: Moment
    """During the start, after a step, or after the save of a step has begun."""
    step: int
    """That step, or a later one."""
    delay: float
    """Seconds after that moment, at most about as long as a start, a step or a save takes."""
    ranks: int
    """Number of ranks of the start."""
    rank: int
    """The victim, modulo the number of ranks."""
    fresh: bool
    """Whether the command starts in a new interpreter instead of a fork (`tests/support/prefork.py`)."""


def steps_for(faults: int) -> int:
    """Length of a run that survives that many faults."""
    return faults * STEPS_PER_FAULT + MARGIN


def draw_faults(count: int, worlds: tuple[int, ...], fresh: int, rng: random.Random) -> list[Fault]:
    """`count` faults in the order of their steps, every kind equally often, `fresh` of them in new interpreters.

    Their moments are steps of the run rather than times, so that a slow machine does not change what is tested.
    """
    steps = sorted(rng.randint(1, steps_for(count) - MARGIN) for _ in range(count))
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    real = [number < fresh for number in range(count)]
    moments: list[Moment] = [("step", "save", "save", "step", "start")[number % 5] for number in range(count)]
    for order in (kinds, real, moments):
        rng.shuffle(order)
    return [
        Fault(
            victim,
            number,
            moment,
            step,
            delay=rng.uniform(0, _SECONDS[moment]),
            ranks=rng.choice(worlds),
            rank=rng.randrange(max(worlds)),
            fresh=is_real,
        )
        for (victim, number), moment, step, is_real in zip(kinds, moments, steps, real, strict=True)
    ]


@dataclass
class Run:
    """A training stage that is started again and again by the same command."""

    recipe: Path
    steps: int
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def folder(self) -> Path:
        return self.recipe.parent / "runs" / "test" / "pretrain"

    @property
    def settings(self) -> list[str]:
        """Settings on top of the recipe."""
        return [
            f"pretrain.steps={self.steps}",
            f"pretrain.checkpoint.every_steps={EVERY}",
            # Small, because differences in rounding between numbers of ranks grow with the steps.
            "pretrain.optimizer.peak_learning_rate=3e-4",
            "pretrain.data.random_augment={layers: 2, magnitude: 15}",
            "log.samples=true",
        ]

    def command(self, world: int) -> list[str]:
        return ["train", str(self.recipe), "pretrain", *self.settings, f"resources.ranks={world}"]

    def survive(self, fault: Fault) -> None:
        """Start until `fault` has ended a start."""
        while not self._struck(fault):
            self.counts["stopped without progress"] += 1

    def finish(self, world: int = 2) -> None:
        """Repeat the command until the run is done."""
        while (done := coatnet(*self.command(world))).returncode == 70:
            assert NO_PROGRESS in done.stderr, done.stderr
            self.counts["stopped without progress"] += 1
        assert done.returncode == 0, done.stderr

    def _struck(self, fault: Fault) -> bool:
        """Start once; whether `fault` ended it, or it stopped by itself after three starts without progress."""
        log, left_over = Tail(self.folder / "logs" / "rank-00000.log"), self._unpublished()
        process = start(*self.command(fault.ranks), fresh=fault.fresh)
        self._wait_for(fault, process, log, left_over)
        time.sleep(fault.delay)
        started = ranks(process)
        ended_before = process.poll() is not None
        if ended_before:
            pass
        elif fault.victim == "rank" and started:
            started[fault.rank % len(started)].send_signal(fault.signal)
        elif fault.victim == "everyone":
            os.killpg(process.pid, fault.signal)
        else:
            process.send_signal(fault.signal)
        code = process.wait(300)
        _, alive = psutil.wait_procs(started, 60)
        assert not alive, f"{fault}: ranks outlived their launcher"
        assert process.stderr is not None
        errors = process.stderr.read().decode()
        assert "Traceback" not in errors, f"{fault}: {errors}"
        for checkpoint in (self.folder / "checkpoints").glob("step-*"):
            assert_whole(checkpoint)
        assert not (self.folder / "result.json").exists(), f"{fault}: the run was over"
        if code == 70 and NO_PROGRESS in errors:
            return False
        assert not ended_before, f"{fault}: ended with {code}: {errors}"
        self._expect_code(fault, code, errors)
        self.counts[f"{fault.signal.name} of {fault.victim}"] += 1
        self.counts[f"with {fault.ranks} ranks"] += 1
        self.counts["new interpreters"] += fault.fresh
        published = [int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*")]
        begun = [step_of(name) for name, _ in self._unpublished() - left_over]
        self.counts["inside a save"] += max(begun, default=0) > max(published, default=0)
        return True

    def _wait_for(self, fault: Fault, process: Process, log: "Tail", left_over: set[tuple[str, int]]) -> None:
        """Wait for the moment of `fault`, or for the end of the process."""
        deadline = time.monotonic() + 300
        while process.poll() is None:
            step = log.step()
            if fault.moment == "start":
                if ranks(process):
                    return
            elif fault.moment == "save" and step < fault.step + 4 * EVERY:
                begun = self._unpublished() - left_over
                if any(step_of(name) >= fault.step for name, _ in begun):
                    return
            elif step >= fault.step:
                return
            assert time.monotonic() < deadline, f"{fault}: no such moment came"
            time.sleep(0.001 if fault.moment == "save" else 0.005)

    def _unpublished(self) -> set[tuple[str, int]]:
        """Names of saves that have begun but are not published, with the time of their last change."""
        found = set()
        for path in (self.folder / "checkpoints").glob(".step-*.writing"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def _expect_code(self, fault: Fault, code: int, errors: str) -> None:
        if fault.signal == signal.SIGTERM:
            # Before its handlers are installed, the signal kills a launcher.
            expected = {75, -signal.SIGTERM} if (fault.moment, fault.victim) == ("start", "launcher") else {75}
            assert code in expected, f"{fault}: ended with {code}: {errors}"
        elif fault.victim == "rank":
            assert code not in (0, 70, 75, 78), f"{fault}: ended with {code}: {errors}"
        else:
            assert code == -signal.SIGKILL, f"{fault}: ended with {code}: {errors}"


def step_of(unpublished: str) -> int:
    """The step in a name such as `.step-00000012.writing`."""
    return int(re.findall(r"\d+", unpublished)[0])


class Tail:
    """The last step in a log since this object was created."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._step = 0

    def step(self) -> int:
        """0 before the first."""
        if self._path.exists():
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                lines = file.read().rpartition(b"\n")[0]
            self._offset += len(lines)
            found = re.findall(rb"  step (\d+)/", lines)
            self._step = int(found[-1]) if found else self._step
        return self._step


def assert_whole(checkpoint: Path) -> None:
    """Check every file of a published checkpoint against its manifest."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        data = (checkpoint / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["bytes"], facts["sha256"]), checkpoint / name


def assert_equal(run: Run, reference: Run) -> None:
    """Every curve and every byte of the last checkpoint."""
    ours, others = curves(run.folder), curves(reference.folder)
    for tag in TAGS:
        assert ours[tag] == others[tag], tag
    final = f"checkpoints/step-{run.steps:08d}"
    assert checkpoint_bytes(run.folder / final) == checkpoint_bytes(reference.folder / final)


def greatest_differences(run: Run, reference: Run) -> dict[str, float]:
    """Relative differences of training loss, validation loss and weights between two runs."""
    found = {}
    ours, others = curves(run.folder), curves(reference.folder)
    for tag in ("train/loss", "validation/loss"):
        assert ours[tag].keys() == others[tag].keys()
        found[tag] = max(abs(ours[tag][step] - value) / value for step, value in others[tag].items())
    final = f"checkpoints/step-{run.steps:08d}"
    mine, theirs = (open_checkpoint(one.folder / final).parameters() for one in (run, reference))
    norms = [(float((mine[name] - theirs[name]).norm()), float(theirs[name].norm())) for name in theirs]
    found["weights"] = sum(a**2 for a, _ in norms) ** 0.5 / sum(b**2 for _, b in norms) ** 0.5
    assert all(torch.isfinite(tensor).all() for tensor in mine.values())
    return found


def assert_audit_is_exact(run: Run) -> None:
    """Every line of the sample logs has the samples of the sample order, and together they have all of them."""
    plan = plan_stage(load_recipe(run.recipe, run.settings), "pretrain")
    assert isinstance(plan, TrainPlan)
    batch = plan.order.batch
    seen = np.zeros((run.steps, batch), bool)
    for path in sorted((run.folder / "samples").glob("rank-*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            span = slice(line["start"], line["start"] + len(line["ids"]))
            samples = plan.order.at(line["step"], span.start, span.stop)
            assert (line["ids"], line["epochs"]) == (samples.id.tolist(), samples.epoch.tolist()), path
            seen[line["step"], span] = True
    assert seen.all(), f"{int((~seen).sum())} positions of the sample order that no rank logged"


def make_recipe(folder: Path, shards: Path) -> Path:
    """A recipe with all sources of randomness, saves every few steps, and steps of some ten milliseconds."""
    return write_recipe(
        folder,
        shards,
        batch={"global_size": 8, "micro_size": 2},
        model={"name": "coatnet_debug", "drop_path_rate": 0.2},
        mixup_alpha=0.8,
        ema_decay=0.99,
        evaluation={"every_steps": 5 * EVERY},
    )


def undisturbed(folder: Path, shards: Path, steps: int, *, fresh: bool = False) -> Run:
    """An uninterrupted run on two ranks."""
    run = Run(make_recipe(folder, shards), steps)
    done = coatnet(*run.command(2), fresh=fresh)
    assert done.returncode == 0, done.stderr
    return run


def disturbed(folder: Path, shards: Path, faults: list[Fault]) -> Run:
    """A finished run that survived `faults`."""
    run = Run(make_recipe(folder, shards), steps_for(len(faults)))
    for number, fault in enumerate(faults):
        run.survive(fault)
        if sys.stdout.isatty():
            print(f"{number + 1}/{len(faults)}", end="\r", flush=True)
    run.finish()
    return run


def main() -> None:
    """Two runs, one on two ranks and one on changing numbers of them, the latter with a third of the faults."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--fresh", type=int, default=20, help="of them in new interpreters")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="coatnet-faults-") as name:
        folder, shards = Path(name), Path(name) / "shards"
        build_shards(write_pictures(folder / "pictures", 20), shards, samples_per_shard=7, validation_per_class=5)
        changing = arguments.kills // 3
        for title, count, worlds in (("two", arguments.kills - changing, (2,)), ("changing", changing, (1, 2, 4))):
            reference = undisturbed(folder / f"{title}-undisturbed", shards, steps_for(count))
            run = disturbed(folder / title, shards, draw_faults(count, worlds, arguments.fresh // 2, rng))
            assert_audit_is_exact(run)
            if worlds == (2,):
                assert_equal(run, reference)
            print(f"{title} ranks, {run.steps} steps: {dict(run.counts)}, {greatest_differences(run, reference)}")


if __name__ == "__main__":
    main()

"""A training stage that is started again and again, and what a fault does to one of its starts."""

import hashlib
import json
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.end_to_end.checkpoint_places import CheckpointPlace, InRunFolder
from tests.end_to_end.random_faults import PERIOD, SAVE_EVERY, Fault, Setup
from tests.support.command import Process, coatnet, ranks, start
from tests.support.recipes import events, write_recipe

NO_PROGRESS = "starts in a row ended without a new checkpoint"
_SECONDS = 600
"""A limit for what never happens."""


@dataclass
class Run:
    """A training stage that is started again and again by the same command."""

    recipe: Path
    steps: int
    setup: Setup = field(default_factory=Setup)
    place: CheckpointPlace = None  # type: ignore[assignment]
    """Of its checkpoints; by default the run folder."""
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.place = self.place or InRunFolder(self.folder)

    @property
    def folder(self) -> Path:
        return self.recipe.parent / "runs" / "test" / "pretrain"

    @property
    def final(self) -> Path:
        """The last checkpoint, in a local folder."""
        return self.place.local(self.steps)

    @property
    def settings(self) -> list[str]:
        """Settings on top of the recipe."""
        return [
            f"pretrain.steps={self.steps}",
            f"pretrain.checkpoint.every_steps={SAVE_EVERY}",
            # Small, because differences in rounding between numbers of ranks grow with the steps.
            "pretrain.optimizer.peak_learning_rate=3e-4",
            "pretrain.data.random_augment={layers: 2, magnitude: 15}",
            "pretrain.data.color_jitter={brightness: 0.2, saturation: 0.2}",
            "pretrain.data.random_erasing={probability: 0.3}",
            "pretrain.cutmix_alpha=1.0",
            f"pretrain.non_finite={{in_a_row: {self.setup.row or 10}, roll_backs: 1000000}}",
            f"pretrain.compile={str(self.setup.compile).lower()}",
            "log.samples=true",
            *self.place.settings,
        ]

    @property
    def variables(self) -> dict[str, Any]:
        """What the environment of the command needs."""
        steps = " ".join(map(str, self.setup.not_finite(self.steps)))
        broken = {"TEST_IMPORTS": "tests.support.not_finite", "TEST_STEPS_NOT_FINITE": steps}
        return self.place.variables | (broken if self.setup.row else {})

    def command(self, world: int, zero: int) -> list[str]:
        resources = [f"resources.ranks={world}", f"pretrain.zero_stage={zero}"]
        return ["train", str(self.recipe), "pretrain", *self.settings, *resources]

    def survive(self, fault: Fault) -> None:
        """Start until `fault` has ended a start."""
        while not self._struck(fault):
            self.counts["stopped without progress"] += 1

    def finish(self, *, fresh: bool = False) -> None:
        """Repeat the command on two ranks, or on those of every start, until the run is done."""
        world = 2 if 2 in self.setup.worlds else self.setup.worlds[0]
        command = self.command(world, self.setup.zero[0])
        while (done := coatnet(*command, fresh=fresh, **self.variables)).returncode == 70:
            assert NO_PROGRESS in done.stderr, done.stderr
            self.counts["stopped without progress"] += 1
        assert done.returncode == 0, done.stderr

    def _struck(self, fault: Fault) -> bool:
        """Start once; whether `fault` ended it, or it stopped by itself after three starts without progress."""
        self.place.mark()
        log, rolled_back = Tail(self.folder / "logs" / "rank-00000.log"), self._roll_backs()
        process = start(*self.command(fault.ranks, fault.zero), fresh=fault.fresh, **self.variables)
        self._wait_for(fault, process, log)
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
        code = process.wait(_SECONDS)
        _, alive = psutil.wait_procs(started, 60)
        assert not alive, f"{fault}: ranks outlived their launcher"
        assert process.stderr is not None
        errors = process.stderr.read().decode()
        assert "Traceback" not in errors, f"{fault}: {errors}"
        self.place.settle()
        for step in self.place.published():
            assert_whole(self.place.local(step))
        assert not (self.folder / "result.json").exists(), f"{fault}: the run was over"
        if code == 70 and NO_PROGRESS in errors:
            return False
        assert not ended_before, f"{fault}: ended with {code}: {errors}"
        self._expect_code(fault, code, errors)
        self._count(fault, log, rolled_back)
        return True

    def _wait_for(self, fault: Fault, process: Process, log: "Tail") -> None:
        """Wait for the moment of `fault`, or for the end of the process."""
        deadline = time.monotonic() + _SECONDS
        while process.poll() is None:
            step = log.step()
            if fault.moment == "start":
                if ranks(process):
                    return
            elif fault.moment == "save" and step < fault.step + PERIOD:
                if any(begun >= fault.step for begun in self.place.begun()):
                    return
            elif fault.is_at(step, self.setup):
                return
            assert time.monotonic() < deadline, f"{fault}: no such moment came"
            time.sleep(0.005 if fault.moment in ("start", "step") else 0.001)

    def _roll_backs(self) -> Counter[int]:
        """How often each step was rolled back."""
        recorded = events(self.folder) if (self.folder / "events.jsonl").exists() else []
        return Counter(entry["step"] for entry in recorded if entry["event"] == "roll_back")

    def _count(self, fault: Fault, log: "Tail", rolled_back: Counter[int]) -> None:
        """Count what `fault` was, and what it struck."""
        step = log.step()
        begun, published = self.place.begun(), self.place.published()
        self.counts.update(
            {
                f"{fault.signal.name} of {fault.victim}": 1,
                f"with {fault.ranks} ranks": 1,
                f"with ZeRO {fault.zero}": 1,
                "new interpreters": fault.fresh,
                "inside a save": max(begun, default=0) > max(published, default=0),
                "inside an evaluation": log.is_training and self.setup.evaluates(step),
                "inside a roll-back": self.setup.rolls_back(step) and self._roll_backs()[step] == rolled_back[step],
            }
        )

    def _expect_code(self, fault: Fault, code: int, errors: str) -> None:
        if fault.signal != signal.SIGKILL:
            expected = {130 if fault.signal == signal.SIGINT else 75}
            if (fault.moment, fault.victim) == ("start", "launcher"):
                expected.add(-fault.signal)  # before its handlers are installed
            assert code in expected, f"{fault}: ended with {code}: {errors}"
        elif fault.victim == "rank":
            assert code not in (0, 70, 75, 78), f"{fault}: ended with {code}: {errors}"
        else:
            assert code == -signal.SIGKILL, f"{fault}: ended with {code}: {errors}"


class Tail:
    """The last step in a log since this object was created."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._step = 0
        self.is_training = False
        """Whether the last line about a step is of the training, and not of the evaluation after it."""

    def step(self) -> int:
        """0 before the first."""
        if self._path.exists():
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                lines = file.read().rpartition(b"\n")[0]
            self._offset += len(lines)
            found = re.findall(rb"  step (\d+)/\d+  (\S+)", lines)
            if found:
                self._step, self.is_training = int(found[-1][0]), found[-1][1] == b"loss"
        return self._step


def assert_whole(checkpoint: Path) -> None:
    """Check every file of a published checkpoint against its manifest."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        data = (checkpoint / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["bytes"], facts["sha256"]), checkpoint / name


def make_recipe(folder: Path, shards: Path, setup: Setup) -> Path:
    """A recipe with all sources of randomness, saves every few steps, and steps of some ten milliseconds."""
    return write_recipe(
        folder,
        shards,
        batch=setup.batch,
        model={"name": "coatnet_debug", "drop_path_rate": 0.2},
        mixup_alpha=0.8,
        ema_decay=0.99,
        evaluation={"every_steps": PERIOD},
    )

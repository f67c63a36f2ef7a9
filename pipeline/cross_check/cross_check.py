"""The cross-check of a step: each rank also computes the first micro-batch of its neighbour, and all compare the bits.

A run is a pure function of recipe and step, and its micro-batch is the unit of computation: equal GPUs that compute the
same one on the same weights get equal bits, unless one of them computes wrong.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from data.stream import MicroBatch
from pipeline.cross_check.checksums import Checksums
from pipeline.cross_check.computation import computed_beside
from pipeline.cross_check.devices import RankDevice, devices_of, refuse_different_devices
from pipeline.cross_check.exchange import from_next_rank, from_rank
from pipeline.cross_check.verdict import Disagreement, Values, Verdict, verdict
from pipeline.faults.watchdog import Watchdog
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.zero.engine import ZeroEngine


class ValuesDiffer(Exception):
    """Two ranks computed different values of a micro-batch; all ranks raise this together.

    Args:
        found: who is wrong.
        names: of the values.
        devices: of all ranks.
    """

    def __init__(self, found: Verdict, names: tuple[str, ...], devices: list[RankDevice]) -> None:
        super().__init__("two ranks computed different values of a micro-batch")
        self.found, self.names, self.devices = found, names, devices


class CrossChecks:
    """The cross-checks of one start; all ranks call its methods in the same order.

    Args:
        engine: in training.
        plan: of the stage.
        ranks: of the run.
        watchdog: of this rank.
        first_step: of the start, from 0.
        node: name of this machine, as the scheduler knows it.

    Raises:
        ConfigError: checks are wanted, and the ranks have different devices.

    Attributes:
        every_steps: `verify.every_steps`.
        devices: of all ranks; empty without checks.
        passed: number of checks in which all values were equal.
        last_passed: steps taken with the last one of them; None before there is one.
    """

    def __init__(
        self, engine: ZeroEngine, plan: TrainPlan, ranks: Ranks, watchdog: Watchdog, first_step: int, node: str
    ) -> None:
        self._engine, self._plan, self._ranks, self._watchdog = engine, plan, ranks, watchdog
        self._first_step = first_step
        self.every_steps = plan.stage.verify.every_steps
        self.devices = devices_of(ranks, node) if self.every_steps else []
        refuse_different_devices(self.devices)
        self._checksums = Checksums(engine, ranks.device)
        self.passed = 0
        self.last_passed: int | None = None

    def check_of(self, step: int, own: MicroBatch) -> "StepCheck | None":
        """The check of step `step`, from 0, begun with this rank's first micro-batch of it; None if none is due.

        That is one every `verify.every_steps` steps, and in the first step of a start, so that a machine that is
        wrong all the time is found at once.
        """
        if self.every_steps is None or not ((step + 1) % self.every_steps == 0 or step == self._first_step):
            return None
        check = StepCheck(self, self._engine, self._checksums, self._plan, self._ranks, self._watchdog, step, own)
        check.compute_neighbours()
        return check


@dataclass
class StepCheck:
    """The check of one step."""

    checks: CrossChecks
    engine: ZeroEngine
    checksums: Checksums
    plan: TrainPlan
    ranks: Ranks
    watchdog: Watchdog
    step: int
    own: MicroBatch

    def __post_init__(self) -> None:
        self.seconds = 0.0
        """That the step took longer, without the checksums of this rank's own gradient."""
        nothing = torch.zeros(len(self.checksums.names), dtype=torch.int64, device=self.ranks.device)
        self._owned = self._checked = nothing

    def compute_neighbours(self) -> None:
        """Compute the first micro-batch of the next rank, which with one rank is this one's."""
        with self._timed():
            batch = from_next_rank(self.own, self.plan, self.ranks)
            self._checked = self._computed(batch, (self.ranks.rank + 1) % self.ranks.world_size)

    @contextmanager
    def observed(self, loss: Tensor) -> Iterator[None]:
        """The body is the backward of this rank's first micro-batch, whose forward gave `loss`."""
        self._owned = self.checksums.of_forward(loss.detach())
        with self.checksums.add_gradients(self._owned):
            yield

    def compare(self) -> None:
        """Compare with all ranks.

        Raises:
            ValuesDiffer: two of them differ.
        """
        with self._timed():
            world_size, rank = self.ranks.world_size, self.ranks.rank
            table = torch.zeros(world_size, 2, len(self.checksums.names), dtype=torch.int64, device=self.ranks.device)
            table[rank, 0], table[(rank + 1) % world_size, 1] = self._owned, self._checked
            # Of each micro-batch, what its owner and its checker have; read once.
            rows = [(tuple(owned), tuple(checked)) for owned, checked in self.ranks.sum(table).tolist()]
            if wrong := [owner for owner, (owned, checked) in enumerate(rows) if owned != checked]:
                self._decide(wrong, rows)
        self.checks.passed += 1
        self.checks.last_passed = self.step + 1

    def _decide(self, owners: list[int], rows: list[tuple[Values, Values]]) -> NoReturn:
        """Have the micro-batches of `owners` computed by all ranks; they take part together, as ZeRO 3 demands."""
        world_size = self.ranks.world_size
        disagreements = []
        for owner in owners:
            again: list[Values] = []
            if world_size > 1:
                values = torch.zeros(world_size, len(self.checksums.names), dtype=torch.int64, device=self.ranks.device)
                batch = from_rank(owner, self.own, self.plan, self.ranks)
                values[self.ranks.rank] = self._computed(batch, owner)
                again = [tuple(row) for row in self.ranks.sum(values).tolist()]
            owned, checked = rows[owner]
            disagreements.append(Disagreement(owner, owned, (owner - 1) % world_size, checked, again))
        raise ValuesDiffer(verdict(disagreements, world_size), self.checksums.names, self.checks.devices)

    def _computed(self, batch: MicroBatch, owner: int) -> Tensor:
        rounds = self.plan.stage.batch.micro_batches // self.ranks.world_size
        return computed_beside(
            self.engine, self.checksums, batch, self.plan, self.ranks, self.step, number=owner * rounds
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """The body is a part of the check: a section of the watchdog, and counted in `seconds`."""
        with self.watchdog.section("cross-check"):
            began = self._now()
            yield
            self.seconds += self._now() - began

    def _now(self) -> float:
        """Once the device has done what it was given; a step that is checked may wait for it."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        return time.monotonic()

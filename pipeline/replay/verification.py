"""`coatnet verify` on one rank: random steps of a run recomputed, and compared with its log and its checkpoints."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from data.files.atomic_file import write_atomically
from data.files.json_records import parse_json, to_json
from data.remote.storage import Storage
from data.text.counted import counted
from pipeline.checkpoints.resume import open_verified
from pipeline.errors import ConfigError
from pipeline.faults.preemption import EndProcess
from pipeline.faults.watchdog import Watchdog
from pipeline.monitoring.event_reader import read_stage_events
from pipeline.ranks.distributed import Ranks
from pipeline.replay.comparison import Agreement, ComparedStep, compare, verdict
from pipeline.replay.logged_steps import LoggedStep, computations, differences, logged_steps, of_steps
from pipeline.replay.recorded_stage import RecordedStage, check_training_shards, open_recorded_stage
from pipeline.replay.replay_ranks import rank_of_replay, scratch_folder
from pipeline.replay.report import LoggedRow, Number, number
from pipeline.replay.start_points import published, recorded_roll_backs
from pipeline.replay.state_comparison import ComparedState, compare_state, own_weights
from pipeline.replay.step_replay import StepReplay
from pipeline.replay.verification_plan import KeptState, Stretch, VerificationPlan, verification_plan
from pipeline.runs.continuation import computed_with
from pipeline.runs.run_folder import RunFolder

REPORT = "verification.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationRequest:
    """What is to be verified."""

    folder: Path
    """The run folder of the stage."""
    out: Path
    """Where the result goes."""
    sample: int
    """Logged steps to draw."""
    within: int | None
    """The most steps from a kept state to a step that is verified; by default those between two saves."""
    seed: int
    overrides: tuple[str, ...] = ()
    """`KEY=VALUE` of settings that any start may change."""


@dataclass(frozen=True, slots=True)
class VerifiedStep:
    """A `ComparedStep` as JSON can hold it."""

    step: int
    replayed: LoggedRow | None
    logged: LoggedRow | None
    agreement: Agreement | None
    difference: Number

    @classmethod
    def of(cls, one: ComparedStep) -> Self:
        """As JSON can hold it."""
        rows = LoggedRow.of(one.replayed), LoggedRow.of(one.logged)
        return cls(one.step, *rows, one.agreement, number(one.difference))


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """What was verified, and what came of it."""

    run: str
    stage: str
    run_id: str | None
    ranks: int
    logged: int
    """Steps that the run has logged."""
    within_reach: int
    recomputed: int
    why_not_bits: tuple[str, ...]
    steps: tuple[VerifiedStep, ...]
    states: tuple[ComparedState, ...]
    problems: tuple[str, ...]
    """What does not hold; empty if the log and the checkpoints are what the recipe and the data lead to."""
    remarks: tuple[str, ...]
    """What could not be verified."""
    verdict: str

    @property
    def holds(self) -> bool:
        """Whether nothing contradicts the log."""
        return not self.problems


def verify_here(
    request: VerificationRequest, say: Callable[[str], None], node: str, end: EndProcess
) -> VerificationReport | None:
    """Verify as one rank of the group that the environment describes; the leader writes and returns the report.

    Args:
        request: what is wanted.
        say: shows a line to the user; called on the leader.
        node: name of this machine.
        end: ends this process.

    Raises:
        ConfigError: no such stage, data of another run, or nothing to verify.
        DataError: shards that cannot be read.
        StorageDown, StorageRefused: a remote store that cannot be read.
        LostRank, DeviceFailed: as for `name_lost_ranks`.
    """
    recorded = open_recorded_stage(RunFolder(request.folder), request.overrides)
    if recorded.branch is not None:
        raise ConfigError(f"{recorded.branched[0]}: a run is verified with its own settings")
    with rank_of_replay(recorded, request.out, node, end) as (ranks, watchdog), scratch_folder(request.out, ranks) as s:
        return _Verification(request, recorded, ranks, watchdog, say).run(s)


@dataclass(frozen=True, slots=True)
class _Verification:
    """The sequence, on one rank."""

    request: VerificationRequest
    recorded: RecordedStage
    ranks: Ranks
    watchdog: Watchdog
    say: Callable[[str], None]

    def run(self, scratch: Path) -> VerificationReport | None:
        """Recompute stretch after stretch; returns the report on the leader."""
        recorded, ranks = self.recorded, self.ranks
        plan = recorded.plan()
        logged, agreed = dict[int, LoggedStep](), VerificationPlan((), 0, 0)
        if ranks.is_leader:
            check_training_shards(plan)
            logged = logged_steps(read_stage_events(recorded.folder))
            agreed = self._plan(logged, plan.stage.checkpoint.interval)
            self._announce(agreed)
        agreed = parse_json(VerificationPlan, ranks.broadcast_text(0, json.dumps(to_json(agreed))))
        now = computed_with(plan, ranks)
        past = computations(recorded.folder.events.entries())
        steps, states = list[ComparedStep](), list[ComparedState]()
        problems, reasons, remarks = list[str](), list[str](), list[str]()
        replay = StepReplay(plan, recorded.folder, ranks, self.watchdog, scratch, recorded.starting_weights)
        with closing(replay):
            for stretch in agreed.stretches:
                takers = of_steps(past, stretch.start.step, stretch.until)
                why = [reason for one in takers for reason in differences(one, ranks.world_size, now)]
                why = why if takers else ["the run has recorded no start of these steps"]
                reasons += why
                try:
                    self._recompute(replay, stretch, logged, steps, states, bits=not why, scratch=scratch)
                except ConfigError as error:  # the same on all ranks
                    gone = self._removed(stretch) if ranks.is_leader else []
                    if gone:
                        remarks.append(f"not verified, as the run has removed it meanwhile: {', '.join(gone)}")
                    else:
                        problems.append(str(error))
        if not ranks.is_leader:
            return None
        return self._report(agreed, steps, states, problems, list(dict.fromkeys(reasons)), remarks)

    def _plan(self, logged: dict[int, LoggedStep], interval: int) -> VerificationPlan:
        stage, request = self.recorded.checkpoints, self.request
        checkpoints = published(stage)
        within = request.within or interval
        found = verification_plan(
            logged,
            checkpoints,
            recorded_roll_backs(stage, checkpoints),
            sample=request.sample,
            within=within,
            seed=request.seed,
        )
        if not found.stretches:
            raise ConfigError(
                f"{self.recorded.folder.path}: none of its {counted(len(logged), 'logged step')} is within "
                f"{within:,} steps after a kept checkpoint or the beginning; give more steps with --within"
            )
        return found

    def _announce(self, plan: VerificationPlan) -> None:
        drawn = sum(len(stretch.steps) for stretch in plan.stretches)
        states = sum(len(stretch.states) for stretch in plan.stretches)
        self.say(
            f"verifies {drawn:,} of {counted(plan.logged, 'logged step')} and {counted(states, 'checkpoint')}: "
            f"recomputes {counted(plan.steps, 'step')} from {counted(len(plan.stretches), 'kept state')}, on "
            f"{counted(self.ranks.world_size, 'rank')}"
        )
        if far := plan.logged - plan.within_reach:
            self.say(
                f"{counted(far, 'logged step')} cannot be drawn, as no kept state is near; --within reaches farther"
            )

    def _recompute(
        self,
        replay: StepReplay,
        stretch: Stretch,
        logged: dict[int, LoggedStep],
        steps: list[ComparedStep],
        states: list[ComparedState],
        *,
        bits: bool,
        scratch: Path,
    ) -> None:
        """Take the steps of `stretch`, and add what is compared.

        Raises:
            ConfigError: a checkpoint is damaged, or gone.
        """
        replay.begin(stretch.start)
        began = own_weights(replay.state)
        to_compare = {state.step: state for state in stretch.states}
        while replay.step < stretch.until:
            replay.change_settings_if_due()
            taken = replay.take_step()
            if taken.step in stretch.steps and self.ranks.is_leader:
                ours = LoggedStep(taken.result.loss, taken.result.gradient_norm, taken.learning_rate)
                precision = replay.plan.stage.precision
                steps.append(compare(taken.step, ours, logged[taken.step], precision, bits=bits))
            if state := to_compare.get(taken.step):
                states.append(self._compare_state(replay, began, state, scratch, bits=bits))
                self.say(f"{state.location.rpartition('/')[2]}: {states[-1].text}")

    def _compare_state(
        self, replay: StepReplay, began: Sequence[Tensor], state: KeptState, scratch: Path, *, bits: bool
    ) -> ComparedState:
        storage = Storage(**self.recorded.stage.data.storage.model_dump())
        with self.watchdog.section("inspection"):
            saved = open_verified(state.location, self.ranks, storage, scratch)
            found = compare_state(replay.state, saved, began, self.ranks, bits=bits)
            saved.close()
        return found

    def _removed(self, stretch: Stretch) -> list[str]:
        """The checkpoints of `stretch` that a run which goes on has removed meanwhile."""
        left = published(self.recorded.checkpoints)
        states = [*((stretch.start.saved_at,) if stretch.start.location else ()), *(one.step for one in stretch.states)]
        return [f"step {step:,}" for step in states if step not in left]

    def _report(
        self,
        plan: VerificationPlan,
        steps: Sequence[ComparedStep],
        states: Sequence[ComparedState],
        problems: list[str],
        reasons: Sequence[str],
        remarks: Sequence[str],
    ) -> VerificationReport:
        found = verdict(steps, bits=not reasons)
        if not found.holds:
            problems.append(f"the log is not what was recomputed: {found.text}")
        problems += [f"{one.location}: {one.text}" for one in states if not one.holds]
        report = VerificationReport(
            run=self.recorded.folder.path.parent.name,
            stage=self.recorded.name,
            run_id=self.recorded.run_id,
            ranks=self.ranks.world_size,
            logged=plan.logged,
            within_reach=plan.within_reach,
            recomputed=plan.steps,
            why_not_bits=tuple(reasons),
            steps=tuple(map(VerifiedStep.of, steps)),
            states=tuple(states),
            problems=tuple(problems),
            remarks=tuple(remarks),
            verdict=found.text,
        )
        content = {"holds": report.holds, **to_json(report)}
        write_atomically(self.request.out / REPORT, json.dumps(content, indent=1) + "\n")
        return report

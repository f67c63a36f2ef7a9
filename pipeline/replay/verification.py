"""`coatnet verify` on one rank: random steps of a run recomputed, and compared with its log and its checkpoints."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from data.files.atomic_file import write_atomically
from data.files.json_records import parse_json, to_json
from data.text.counted import counted
from pipeline.errors import CheckpointRemoved, ConfigError
from pipeline.faults.preemption import EndProcess
from pipeline.faults.watchdog import Watchdog
from pipeline.monitoring.event_reader import read_stage_events
from pipeline.ranks.distributed import Ranks
from pipeline.replay.comparison import Agreement, ComparedStep, compare, log_comparison
from pipeline.replay.logged_steps import LoggedStep, logged_steps, why_not_equal
from pipeline.replay.recorded_stage import RecordedStage, check_training_shards, open_recorded_stage
from pipeline.replay.replay_ranks import rank_of_replay, scratch_folder
from pipeline.replay.report import LoggedRow, Number, number
from pipeline.replay.run_checkpoint import naming_removal, run_checkpoint
from pipeline.replay.start_points import published, recorded_roll_backs
from pipeline.replay.state_comparison import ComparedState, compare_state, own_weights
from pipeline.replay.step_replay import StepReplay
from pipeline.replay.verification_plan import Stretch, VerificationPlan, verification_plan
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
        CheckpointRemoved: the run has removed a checkpoint while it was read, or all of them.
        LostRank, DeviceFailed: as for `name_lost_ranks`.
    """
    recorded = open_recorded_stage(RunFolder(request.folder), request.overrides)
    if recorded.branch is not None:
        raise ConfigError(f"{recorded.branched[0]}: a run is verified with its own settings")
    with rank_of_replay(recorded, request.out, node, end) as (ranks, watchdog), scratch_folder(request.out, ranks) as s:
        return _Verification(request, recorded, ranks, watchdog, say).run(s)


@dataclass(slots=True)
class _Found:
    """What was compared so far; on the leader, but for counts and reasons."""

    logged: dict[int, LoggedStep] = field(default_factory=dict)
    steps: list[ComparedStep] = field(default_factory=list)
    states: list[ComparedState] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    reasons: dict[str, None] = field(default_factory=dict)
    """Why bits are not expected: each one once, in their order."""
    recomputed: int = 0


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
        agreed, found = VerificationPlan((), 0, 0), _Found()
        if ranks.is_leader:
            check_training_shards(plan)
            log = read_stage_events(recorded.folder)
            found.logged, found.remarks = logged_steps(log), log.problems
            agreed = self._plan(found.logged, plan.stage.checkpoint.interval)
            self._announce(agreed)
        agreed = parse_json(VerificationPlan, ranks.broadcast_text(0, json.dumps(to_json(agreed))))
        now, entries = computed_with(plan, ranks), recorded.folder.events.entries()
        with closing(
            StepReplay(plan, recorded.folder, ranks, self.watchdog, scratch, recorded.starting_weights)
        ) as replay:
            for stretch in agreed.stretches:
                why = why_not_equal(entries, stretch.start.step, stretch.until, ranks.world_size, now)
                found.reasons |= dict.fromkeys(why)
                try:
                    self._recompute(replay, stretch, found, scratch, bits=not why)
                except ConfigError as error:  # the same on all ranks
                    gone = self._removed(stretch) if ranks.is_leader else []
                    if gone:
                        found.remarks.append(f"not verified, as the run has removed it meanwhile: {', '.join(gone)}")
                    else:
                        found.problems.append(str(error))
        if not ranks.is_leader:
            return None
        if not (found.steps or found.states or found.problems):
            raise CheckpointRemoved(f"{recorded.folder.path}: nothing was verified: {'; '.join(found.remarks)}")
        return self._report(agreed, found)

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
                f"{self.recorded.folder.path}: nothing to verify: {found.within_reach:,} of its "
                f"{counted(len(logged), 'logged step')} are within {within:,} steps after a kept checkpoint or the "
                f"beginning, and --sample {request.sample} draws from these; give more steps with --within"
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

    def _recompute(self, replay: StepReplay, stretch: Stretch, found: _Found, scratch: Path, *, bits: bool) -> None:
        """Take the steps of `stretch`, and add what is compared.

        Raises:
            ConfigError: a checkpoint is damaged, or gone.
            CheckpointRemoved: one is removed while it is read.
        """
        with naming_removal(stretch.start.location):
            replay.begin(stretch.start)
        began = own_weights(replay.state.fragments)
        to_compare = {state.step: state for state in stretch.states}
        while replay.step < stretch.until:
            replay.change_settings_if_due()
            taken = replay.take_step()
            found.recomputed += 1
            if taken.step in stretch.steps and self.ranks.is_leader:
                ours = LoggedStep(taken.result.loss, taken.result.gradient_norm, taken.learning_rate)
                precision = replay.plan.stage.precision
                found.steps.append(compare(taken.step, ours, found.logged[taken.step], precision, bits=bits))
            if saved := to_compare.get(taken.step):
                with (
                    self.watchdog.section("inspection"),
                    naming_removal(saved.location),
                    run_checkpoint(saved.location, replay.whole, self.ranks, scratch) as checkpoint,
                ):
                    state = compare_state(replay.live(), checkpoint, began, self.ranks, bits=bits)
                if state:
                    found.states.append(state)
                    self.say(f"{checkpoint.name}: {state.text}")

    def _removed(self, stretch: Stretch) -> list[str]:
        """The checkpoints of `stretch` that a run which goes on has removed meanwhile."""
        left = published(self.recorded.checkpoints)
        states = [*((stretch.start.saved_at,) if stretch.start.location else ()), *(one.step for one in stretch.states)]
        return [f"step {step:,}" for step in states if step not in left]

    def _report(self, plan: VerificationPlan, found: _Found) -> VerificationReport:
        of_log = log_comparison(found.steps, bits=not found.reasons)
        problems = [] if of_log.holds else [f"the log is not what was recomputed: {of_log.text}"]
        problems += [f"{one.location}: {one.text}" for one in found.states if not one.holds]
        report = VerificationReport(
            run=self.recorded.folder.path.parent.name,
            stage=self.recorded.name,
            run_id=self.recorded.run_id,
            ranks=self.ranks.world_size,
            logged=plan.logged,
            within_reach=plan.within_reach,
            recomputed=found.recomputed,
            why_not_bits=tuple(found.reasons),
            steps=tuple(map(VerifiedStep.of, found.steps)),
            states=tuple(found.states),
            problems=(*found.problems, *problems),
            remarks=tuple(found.remarks),
            verdict=of_log.text,
        )
        content = {"holds": report.holds, **to_json(report)}
        write_atomically(self.request.out / REPORT, json.dumps(content, indent=1) + "\n")
        return report

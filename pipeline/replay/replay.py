"""`coatnet replay` on one rank: steps of a run recomputed from a checkpoint, looked into, and held against the log."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.files.atomic_file import write_atomically
from data.files.json_records import parse_json, to_json, to_record
from data.stream import MicroBatch
from data.text.counted import counted
from pipeline.faults.preemption import EndProcess
from pipeline.faults.watchdog import Watchdog
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.replay.branch_run import BranchRun
from pipeline.replay.comparison import LogComparison, log_comparison
from pipeline.replay.inspection import Inspection, inspect_step
from pipeline.replay.logged_steps import LoggedStep
from pipeline.replay.memory_advice import memory_advice, replay_out_of_memory
from pipeline.replay.observation import ObservedModel
from pipeline.replay.progress import ReplayProgress
from pipeline.replay.recorded_stage import RecordedStage, check_training_shards, open_recorded_stage
from pipeline.replay.replay_ranks import begin_with, load_into, rank_of_replay, scratch_folder
from pipeline.replay.report import LoggedRow, ReplayReport, StepRow, number
from pipeline.replay.results import open_results
from pipeline.replay.running_comparison import RunningComparison, with_inspection
from pipeline.replay.start_points import ReplayStart, known_starts, roll_backs_after
from pipeline.replay.step_replay import StepReplay, skipped_samples
from pipeline.runs.continuation import computed_with
from pipeline.runs.run_folder import RunFolder
from pipeline.training.training_batches import open_stream

REPORT = "replay.json"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """What is to be recomputed."""

    folder: Path
    """The run folder of the stage."""
    step: int
    """The first step of interest, from 1."""
    until: int
    """The last one."""
    out: Path
    """Where results go."""
    overrides: tuple[str, ...] = ()
    """`KEY=VALUE`; settings that belong to the run make a branch from `step` on."""
    without: tuple[str, ...] = ()
    """Samples that the branch leaves out, as `shard/key`."""
    look_inside: bool = True
    """Whether samples and activations of the steps of interest are looked at, or only losses and norms."""
    forward_only: bool = False
    """Look at the forward of `step` with the weights of the newest checkpoint before it, however old they are."""
    bisect: bool = False
    """Whether the smallest cause of what is not finite is looked for."""
    branch_run: Path | None = None
    """The folder `runs/NAME` of a run that continues the branch after `until`."""


def replay_here(request: ReplayRequest, say: Say, node: str, end: EndProcess) -> ReplayReport | None:
    """Recompute as one rank of the group that the environment describes; the leader writes and returns the report.

    Args:
        request: what is wanted.
        say: shows a line to the user; called on the leader.
        node: name of this machine.
        end: ends this process.

    Raises:
        ConfigError: no such stage or step, a checkpoint or data of another run, or settings that cannot be.
        DataError: shards that cannot be read.
        StorageDown, StorageRefused: a remote store that cannot be read.
        RunFailed: a branch that cannot be saved, or memory that is full.
        CheckpointRemoved: the run has removed the checkpoint that was being read.
        LostRank, DeviceFailed: as for `name_lost_ranks`.
    """
    folder = RunFolder(request.folder)
    recorded = open_recorded_stage(folder, request.overrides, request.without, step=request.step - 1)
    if request.branch_run:
        recorded = recorded.alone()
    joined = rank_of_replay(recorded, request.out, node, end, bisects=request.bisect)
    with joined as (ranks, watchdog), scratch_folder(request.out, ranks) as scratch:
        replay = _Replay(request, recorded, ranks, watchdog, say)
        try:
            return replay.look(scratch) if request.forward_only else replay.recompute(scratch)
        except (MemoryError, RuntimeError) as error:
            advice = memory_advice(
                recorded.stage,
                ranks.world_size,
                look_inside=request.look_inside,
                forward_only=request.forward_only,
            )
            if full := replay_out_of_memory(error, advice):
                raise full from error
            raise


@dataclass(frozen=True, slots=True)
class _Replay:
    """The sequences, on one rank."""

    request: ReplayRequest
    recorded: RecordedStage
    ranks: Ranks
    watchdog: Watchdog
    say: Say

    def recompute(self, scratch: Path) -> ReplayReport | None:
        """Recompute the steps of interest and those before them; returns the report on the leader."""
        request, recorded, ranks = self.request, self.recorded, self.ranks
        first = request.step - 1
        plan, branch, history = recorded.plans(first, request.until)
        replay = StepReplay(plan, recorded.folder, ranks, self.watchdog, scratch, recorded.starting_weights)
        start, passed_over = begin_with(self._known_starts(plan), ranks, replay.begin)
        end = first if branch else request.until  # a branch has no roll-backs
        returns = {one.step: one for one in self._roll_backs(start.step, end)}
        comparison = RunningComparison(recorded, start, request.until, ranks, computed_with(replay.plan, ranks))
        if ranks.is_leader:
            self._announce(start, passed_over, comparison)
        run = None
        if request.branch_run and branch:
            run = BranchRun.begin(request.branch_run, recorded, branch, history, ranks)
        curves = run.folder.tensorboard if run else request.out
        model: ObservedModel | None = None
        progress = ReplayProgress(request.until, self.say)
        with closing(replay), open_results(request.out, curves, start.step + 1, ranks, self.say) as results:
            while replay.step < request.until:
                of_interest = replay.step >= first
                if replay.step in returns:
                    replay.begin(returns[replay.step])
                if branch and replay.step == first:
                    replay.continue_with(branch)
                    if run:
                        run.save(replay)
                replay.change_settings_if_due()
                if of_interest and request.look_inside:
                    model = self._loaded(model, replay)
                replayed = replay.take_step()
                inspection = None
                if of_interest and model is not None:
                    inspection = self._inspect(model, replay.plan, replayed.step - 1, replayed.result.batches)
                if results:
                    is_branch = branch is not None and of_interest
                    progress.step(replayed)
                    results.add(comparison.row(replayed, replay.plan, inspection, is_branch=is_branch), inspection)
            if run:
                run.finish(replay)
        return self._report(start, passed_over, comparison, results.rows, run) if results else None

    def look(self, scratch: Path) -> ReplayReport | None:
        """Look at the forward of the step of interest with the weights of the nearest checkpoint before it."""
        request, recorded, ranks = self.request, self.recorded, self.ranks
        step = request.step - 1
        whole, _, _ = recorded.plans(step, request.until)
        plan = whole.at(step)
        model = ObservedModel(plan, ranks.device)
        start, passed_over = begin_with(
            self._known_starts(whole),
            ranks,
            lambda start: load_into(model, start, recorded, whole, ranks, scratch),
        )
        comparison = RunningComparison(recorded, start, request.step, ranks, computed_with(plan, ranks))
        comparison.why_not_bits.append("computed without the engine")
        if ranks.is_leader:
            self._announce(start, passed_over, comparison)
        rounds, began = plan.stage.batch.micro_batches // ranks.world_size, time.monotonic()
        with closing(open_stream(plan, ranks.rank, ranks.world_size, step, ranks.device)) as stream:
            batches = list(islice(stream, rounds))
        skipped = skipped_samples(batches, ranks)
        inspection = self._inspect(model, plan, step, batches)
        with open_results(request.out, request.out, request.step, ranks, self.say) as results:
            if results and inspection:
                loss, are_own = inspection.loss, start.step == step
                row = StepRow(
                    step=request.step,
                    loss=number(loss),
                    gradient_norm=None,
                    learning_rate=None,
                    applied=None,
                    seconds=round(time.monotonic() - began, 3),
                    logged=LoggedRow.of(comparison.logged.get(request.step)),
                    agreement=comparison.agreement(request.step, LoggedStep(loss), plan) if are_own else None,
                    skipped=skipped,
                )
                results.add(with_inspection(row, inspection, plan), inspection)
        return self._report(start, passed_over, comparison, results.rows, None) if results else None

    def _known_starts(self, plan: TrainPlan) -> list[ReplayStart]:
        """Of the leader, which looks for all; empty on the others."""
        if not self.ranks.is_leader:
            return []
        check_training_shards(plan)
        return known_starts(self.recorded.checkpoints, self.request.step - 1)

    def _roll_backs(self, first: int, until: int) -> list[ReplayStart]:
        """The states to which the run returned between `first` and `until` steps, on all ranks."""
        found = roll_backs_after(self.recorded.checkpoints, first, until) if self.ranks.is_leader else []
        text = self.ranks.broadcast_text(0, json.dumps([to_json(one) for one in found]))
        return [to_record(ReplayStart, one) for one in parse_json(list[Any], text)]

    def _loaded(self, model: ObservedModel | None, replay: StepReplay) -> ObservedModel:
        """A model for the plan of the next step, with the weights from before it."""
        with self.watchdog.section("inspection"):
            if model is None or model.plan is not replay.plan:
                model = ObservedModel(replay.plan, self.ranks.device)
            model.load(replay.weights(), replay.buffers())
        return model

    def _inspect(
        self, model: ObservedModel, plan: TrainPlan, step: int, batches: Sequence[MicroBatch]
    ) -> Inspection | None:
        request = self.request
        with self.watchdog.section("inspection"):
            return inspect_step(
                model, plan, self.ranks, step, batches, backward=not request.forward_only, bisect=request.bisect
            )

    def _announce(self, start: ReplayStart, passed_over: Sequence[str], comparison: RunningComparison) -> None:
        request, before = self.request, self.request.step - 1 - start.step
        for reason in passed_over:
            self.say(f"passed over: {reason}")
        for change in self.recorded.changed:
            if not _has_no_effect(change):
                self.say(f"computes with {change}")
        what = f"step {request.step:,}" + (f" to {request.until:,}" if request.until > request.step else "")
        if request.forward_only:
            age = f"{counted(before, 'step')} older than those of the step" if before else "those of the step"
            self.say(f"looks at the forward of {what} with the weights of {start.text}, {age}")
            return
        total = counted(request.until - start.step, "step")
        earlier = f", {before:,} of them before step {request.step:,}" if before else ""
        self.say(f"recomputes {what} from {start.text}: {total}{earlier}, on {counted(self.ranks.world_size, 'rank')}")
        for change in self.recorded.branched:
            self.say(f"from step {request.step:,} on with {change}")
        if comparison.why_not_bits:
            self.say(f"values may differ by rounding: {'; '.join(comparison.why_not_bits)}")
        else:
            self.say("computes with what the run computed with: values must be equal to the bit")

    def _report(
        self,
        start: ReplayStart,
        passed_over: Sequence[str],
        comparison: RunningComparison,
        rows: Sequence[StepRow],
        run: BranchRun | None,
    ) -> ReplayReport:
        request, recorded = self.request, self.recorded
        found = log_comparison(comparison.compared, bits=not comparison.why_not_bits)
        report = ReplayReport(
            run=recorded.folder.path.parent.name,
            stage=recorded.name,
            run_id=recorded.run_id,
            first=request.step,
            until=request.until,
            start=start.text,
            start_step=start.step,
            passed_over=tuple(passed_over),
            ranks=self.ranks.world_size,
            computed_with=comparison.now,
            why_not_bits=tuple(comparison.why_not_bits),
            changed=recorded.changed,
            branched=recorded.branched,
            verdict=_verdict_text(request, recorded, start, found, comparison.logged),
            holds=found.holds,
            remarks=(*comparison.damage, *_remarks(request, recorded, rows)),
            steps=tuple(rows),
            branch_run=None if run is None else str(run.folder.path.parent),
        )
        write_atomically(request.out / REPORT, json.dumps(to_json(report), indent=1) + "\n")
        return report


def _verdict_text(
    request: ReplayRequest,
    recorded: RecordedStage,
    start: ReplayStart,
    found: LogComparison,
    logged: Mapping[int, LoggedStep],
) -> str:
    older = request.step - 1 - start.step
    if request.forward_only and older:
        return f"not compared with the log: the weights are {counted(older, 'step')} older than those of the step"
    if recorded.branch is None:
        following = next((step for step in sorted(logged) if step > request.until), None)
        hint = f"; the next one that was is {following:,}" if not found.values and following else ""
        return f"{found.text}{hint}"
    if not found.values:
        return "the steps of a branch have no log to be compared with, and none before it was recomputed"
    return f"before the branch: {found.text}"


def _remarks(request: ReplayRequest, recorded: RecordedStage, rows: Sequence[StepRow]) -> Iterator[str]:
    """What had no effect."""
    skipped = [text for row in rows for text in row.skipped]
    for name in request.without:
        if not any(text.startswith(f"{name}: ") for text in skipped):
            yield f"--without {name}: none of the steps {request.step:,} to {request.until:,} has it"
    if request.branch_run is None:
        for change in filter(_has_no_effect, recorded.changed):
            yield f"{change}: without effect, as a replay does not evaluate, save, log or submit as a run does"
    for row in rows:
        if row.applied is False and row.samples and not row.not_finite:
            yield (
                f"step {row.step:,}: not applied, though everything that was looked into is finite: the norm of its "
                f"gradient is {row.gradient_norm}, and the squares of its elements may be beyond float32"
            )
    if request.overrides and not recorded.changed and not recorded.branched:
        yield f"{', '.join(request.overrides)}: as the run had it, so nothing is different"
    if request.bisect and all(row.applied for row in rows):
        yield "--bisect: everything that was looked into is finite, so no sample is to blame"


def _has_no_effect(change: str) -> bool:
    """Of a setting that any start may change, as `key: old -> new`."""
    section, _, key = change.partition(":")[0].partition(".")
    if section == "resources":
        return key not in ("gpus_per_rank", "threads_per_rank")
    return section in ("checkpoint", "evaluation", "log", "non_finite")

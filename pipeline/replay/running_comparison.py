"""What a run has logged of the steps that are recomputed, held against them as they come."""

from collections.abc import Mapping
from dataclasses import replace

from pipeline.monitoring.event_reader import read_stage_events
from pipeline.monitoring.norms import block_names
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.replay.comparison import Agreement, ComparedStep, compare
from pipeline.replay.inspection import Inspection
from pipeline.replay.logged_steps import LoggedStep, logged_steps, why_not_equal
from pipeline.replay.recorded_stage import RecordedStage
from pipeline.replay.report import BlockRow, LoggedRow, StepRow, number
from pipeline.replay.start_points import ReplayStart
from pipeline.replay.step_replay import ReplayedStep


class RunningComparison:
    """What the run has logged of the steps, and how the recomputed ones compare; empty on all ranks but the leader."""

    def __init__(
        self, recorded: RecordedStage, start: ReplayStart, until: int, ranks: Ranks, now: Mapping[str, str]
    ) -> None:
        self.now = now
        """What this replay computes with."""
        self.logged: dict[int, LoggedStep] = {}
        self.damage: list[str] = []
        """What of the log cannot be read."""
        self.why_not_bits: list[str] = []
        self.compared: list[ComparedStep] = []
        if ranks.is_leader:
            log = read_stage_events(recorded.folder)
            self.logged, self.damage = logged_steps(log), log.problems
            entries = recorded.folder.events.entries()
            self.why_not_bits = why_not_equal(entries, start.step, until, ranks.world_size, now)

    def row(
        self, replayed: ReplayedStep, plan: TrainPlan, inspection: Inspection | None, *, is_branch: bool
    ) -> StepRow:
        """A recomputed step beside the logged one."""
        result, logged = replayed.result, self.logged.get(replayed.step)
        ours = LoggedStep(result.loss, result.gradient_norm, replayed.learning_rate)
        agreement = None if is_branch else self.agreement(replayed.step, ours, plan)
        row = StepRow(
            step=replayed.step,
            loss=number(result.loss),
            gradient_norm=number(result.gradient_norm),
            learning_rate=replayed.learning_rate,
            applied=result.applied,
            seconds=round(replayed.seconds, 3),
            branch=is_branch,
            logged=LoggedRow.of(logged),
            agreement=agreement,
            skipped=replayed.skipped,
            blocks=tuple(
                BlockRow(
                    name,
                    number(replayed.weight_norms[name]),
                    number(gradient),
                    number(replayed.update_norms[name]) if result.applied else None,
                )
                for name, gradient in replayed.gradient_norms.items()
            ),
        )
        return with_inspection(row, inspection, plan) if inspection else row

    def agreement(self, step: int, ours: LoggedStep, plan: TrainPlan) -> Agreement | None:
        """Compare what was recomputed of a step with what was logged; None if nothing was."""
        logged = self.logged.get(step)
        if logged is None:
            return None
        self.compared.append(compare(step, ours, logged, plan.stage.precision, bits=not self.why_not_bits))
        return self.compared[-1].agreement


def with_inspection(row: StepRow, inspection: Inspection, plan: TrainPlan) -> StepRow:
    """The row with what was found inside the step."""
    names = block_names(plan.stage.model.variant)
    blocks = row.blocks or tuple(BlockRow(name) for name in names)
    gradients = inspection.output_gradients or (None,) * len(names)
    return replace(
        row,
        blocks=tuple(
            replace(block, output=number(output), output_gradient=None if gradient is None else number(gradient))
            for block, output, gradient in zip(blocks, inspection.outputs, gradients, strict=True)
        ),
        not_finite=inspection.not_finite,
        causes=inspection.causes,
        samples=inspection.samples,
        picture=f"step-{row.step:08d}.png",
    )

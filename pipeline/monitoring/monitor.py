"""What the leader shows of a stage: a progress bar or plain lines, a log file, TensorBoard."""

import logging
import os
import resource
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.tensorboard.summary import image

from pipeline.checkpoints.saver import SaveReport
from pipeline.evaluate import Accuracy
from pipeline.monitoring import charts
from pipeline.monitoring.console import styled_text
from pipeline.monitoring.event_file import EventFile
from pipeline.monitoring.histograms import Histogram
from pipeline.monitoring.progress import StageProgress
from pipeline.monitoring.progress_bar import StepState, progress_bar
from pipeline.monitoring.rank_times import RankTimes
from pipeline.monitoring.step_clock import Interval, StepClock
from pipeline.monitoring.utilization import Utilization
from pipeline.plan import Plan, TrainPlan
from pipeline.preflight.class_mixing import assess_mixing, lanes_in_use
from pipeline.ranks.distributed import Ranks
from pipeline.runs.announcements import StartingWeights, announcements, banner, changes_of_settings
from pipeline.runs.continuation import Change
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder

log = logging.getLogger(__name__)


class Monitor:
    """Shows one stage, on the leader; on other ranks only its clock is in use.

    Args:
        folder: of the run.
        plan: of the stage.
        first_step: steps taken before this start. TensorBoard drops points beyond it that an earlier start wrote, so
            that a curve never goes back in time.
        steps: of the whole stage.
        ranks: this process among those of the run.
        console: for the user; None on all ranks but the leader.
    """

    def __init__(
        self, folder: RunFolder, plan: Plan, first_step: int, steps: int, ranks: Ranks, console: Console | None
    ) -> None:
        self.clock = StepClock(ranks.device)
        self._folder = folder
        self._plan = plan
        self._first_step = first_step
        self._steps = steps
        self._ranks = ranks
        self._leads = console is not None
        if console is None:
            return
        self._console = console
        self._events = EventFile(folder.tensorboard, first_step + 1, self.notify)
        self._validation = EventFile(folder.validation, first_step + 1, self.notify)
        self._intervals = 0
        self._speed: float | None = None
        """Images per second of the last interval in which a step was timed."""
        self._rank_times = RankTimes(ranks.world_size)
        self._histograms_requested = False
        self._utilization = Utilization(plan, ranks) if isinstance(plan, TrainPlan) else None
        self._progress = progress_bar(console)
        self._task = self._progress.add_task(plan.name, total=steps, completed=first_step, state=None)
        self._progress.start()

    def begin(self, checkpoint: str | None, damaged: list[str], computed_with: Mapping[str, str] | None = None) -> None:
        """Show where this start begins, which checkpoints were skipped as damaged, and record what it computes with."""
        if not self._leads:
            return
        self.damaged_checkpoints(damaged)
        self._folder.events.record(
            Event.RESUME if checkpoint else Event.START,
            step=self._first_step,
            ranks=self._ranks.world_size,
            **({"computed_with": dict(computed_with)} if computed_with else {}),
        )
        if checkpoint:
            self.notify(f"continues from checkpoint {checkpoint}")
        for line in (*banner(self._plan, self._ranks, self._folder), *announcements(self._plan)):
            self.notify(line)
        if isinstance(self._plan, TrainPlan):
            self._note_mixing(self._plan, first=not checkpoint)
        # At the step after the first, which the next start purges: one that fails before its first save leaves no copy.
        for summary in (charts.layout(), charts.recipe_text(self._plan), charts.settings_of_stage(self._plan)):
            self._events.add(summary, self._first_step + 1)
        for change in changes_of_settings(self._plan) if isinstance(self._plan, TrainPlan) else ():
            if change.step == self._first_step:
                self._events.add(charts.change_text(change), self._first_step + 1)
        self._events.flush()

    def _note_mixing(self, plan: TrainPlan, *, first: bool) -> None:
        if not first:
            self.notify(f"data.lanes: {lanes_in_use(plan)}", show=False)
            return
        mixing = assess_mixing(plan)
        warns = mixing.level == "warning"
        fix = f"; {mixing.fix}" if mixing.fix else ""
        self.notify(f"{'warning: ' if warns else ''}{mixing.what}{fix}", show=warns)

    def starting_weights(self, weights: StartingWeights) -> None:
        """Show what the stage takes from weights that it did not train."""
        if self._leads:
            self._folder.events.record(Event.WEIGHTS, **weights.facts(self._plan))
            for line in weights.announcements(self._plan):
                self.notify(line)

    def changes(self, changes: Sequence[Change]) -> None:
        """Show what this start computes with that the one that saved its checkpoint did not."""
        for change in changes if self._leads else []:
            self._folder.events.record(Event.CHANGE, **asdict(change))
            self.notify(str(change))

    def damaged_checkpoints(self, damaged: Sequence[str]) -> None:
        """Show which checkpoints were skipped as damaged, and why."""
        for reason in damaged if self._leads else []:
            self._folder.events.record(Event.CHECKPOINT_DAMAGED, reason=reason)
            self.notify(f"skipped a damaged checkpoint: {reason}")

    def add_rank_times(self, seconds: Sequence[float]) -> None:
        """Add the sum over the ranks of `clock.contribution`: the times of the ranks' last steps."""
        if self._leads:
            self._rank_times.add(seconds)

    def step(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show the state after `step` steps; `scalars` are TensorBoard tags and values and include `train/loss`
        and `train/learning_rate`."""
        interval = self.clock.interval()
        if not self._leads:
            return
        assert isinstance(self._plan, TrainPlan)
        batch = self._plan.stage.batch.global_size
        times, slow_ranks = self._times(interval, batch) if interval else ({}, [])
        points = {
            **scalars,
            "train/samples": float(self._plan.samples_after(step)),
            **times,
            **_memory_in_use(self._ranks.device),
        }
        self._events.add(charts.scalars(points), step)
        self._events.flush()
        # The first steps of a start include the warm-up and say little about later ones.
        left = (self._steps - step) * batch / max(1e-9, self._speed) if self._speed and self._intervals else None
        eta = str(timedelta(seconds=round(left))) if left is not None else "-"
        loss = scalars["train/loss"]
        published = StageProgress.now(step, self._steps, loss=loss, images_per_second=self._speed, seconds_left=left)
        published.write(self._folder.progress)
        self._intervals += 1
        in_epochs = [f"{batch * count / self._plan.train.samples:.1f}" for count in (step, self._steps)]
        state = StepState(
            loss=f"loss {loss:.4f}",
            rate=f"lr {scalars['train/learning_rate']:.2e}",
            epoch=f"epoch {'/'.join(in_epochs)}",
            speed=f"{self._speed:,.0f} images/s" if self._speed else "- images/s",
            left=f"ETA {eta}",
        )
        self._progress.update(self._task, completed=step, state=state)
        self.notify(f"step {step}/{self._steps}  {state.text()}", show=not self._console.is_terminal)
        for message in slow_ranks:
            self.notify(message)
        self._histograms_requested = self._histograms_requested or os.path.exists(self._histogram_request)

    def _times(self, interval: Interval, batch: int) -> tuple[dict[str, float], list[str]]:
        """TensorBoard tags and values for the times of an interval of steps, and messages about slow ranks."""
        self._speed = interval.steps * batch / max(1e-9, interval.seconds)
        of_ranks, slow_ranks = self._rank_times.interval(interval.seconds)
        points = {
            "train/images_per_second": self._speed,
            "wall_time/step_p50_seconds": interval.step_p50,
            "wall_time/step_p90_seconds": interval.step_p90,
            "wall_time/step_p99_seconds": interval.step_p99,
            **of_ranks,
        }
        utilization = self._utilization.at(self._speed) if self._utilization else None
        return points | ({} if utilization is None else {"train/mfu": utilization}), slow_ranks

    def cross_checked(self, step: int, scalars: Mapping[str, float], line: str | None) -> None:
        """Show the cross-check of step `step`, from 1; `line` goes to the log, if there is one."""
        if self._leads:
            self._events.add(charts.scalars(dict(scalars)), step)
        if line:
            self.notify(line)

    def paused(self) -> AbstractContextManager[None]:
        """Exclude the body, such as a save, from step times and images per second."""
        return self.clock.paused()

    def saved(self, reports: Sequence[SaveReport], *, stopping: bool = False) -> None:
        """Show the outcome of saves; if `stopping`, the run ends after them."""
        for report in reports if self._leads else []:
            points = {"wall_time/checkpoint_stall_seconds": report.stall}
            if report.failure is None:
                points["wall_time/checkpoint_write_seconds"] = report.seconds
            else:
                then = "" if stopping else "; the run continues"
                self.notify(f"the checkpoint of step {report.step} was not saved: {report.failure}{then}")
            self._events.add(charts.scalars(points), report.step)
            self._events.flush()

    def evaluation(self, step: int, accuracy: Accuracy) -> None:
        """Show the accuracy after `step` steps."""
        if not self._leads:
            return
        # The paper's metric if samples may have several labels.
        best = "precision_at_1" if self._plan.stage.loss.kind == "sigmoid" else "top1"
        points = {best: accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}
        self._validation.add(charts.scalars({f"validation/{name}": value for name, value in points.items()}), step)
        if step == self._steps:
            self._events.add(charts.end_of_stage(), step)
        # In this order: an evaluation that is in the event log is not repeated after a kill.
        self.flush()
        self._folder.events.record(Event.EVALUATION, step=step, **asdict(accuracy.figures))
        self.notify(f"step {step}/{self._steps}  {accuracy.text(self._plan.stage.loss.kind)}")

    def images(self, canvas: NDArray[np.uint8]) -> None:
        """Show images (H, W, 3) uint8 as the model sees them in its first step."""
        if self._leads:
            summary = image("train/images", canvas, dataformats="HWC")  # type: ignore[no-untyped-call]
            self._events.add(summary, 1)

    def histograms_due(self, step: int) -> bool:
        """On the leader, whether all ranks must make histograms after step `step`; False on the others.

        They are due every `log.histograms_every_steps` steps, and once if there is a file `histograms` in the run
        folder, which is checked whenever a step is shown.
        """
        every = self._plan.stage.log.histograms_every_steps
        return self._leads and (self._histograms_requested or (every is not None and step % every == 0))

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Show the weights of each parameter after `step` steps."""
        if not self._leads:
            return
        for parameter, histogram in histograms.items():
            self._events.add(histogram.summary(f"weights/{parameter}"), step)
        self._events.flush()
        if self._histograms_requested:
            with suppress(OSError):
                self._histogram_request.unlink()
            self._histograms_requested = False
            self.notify(f"histograms of the weights after step {step} are in TensorBoard")

    def flush(self) -> None:
        """Write the TensorBoard events to disk; called before a save, or a kill right after it would leave a gap."""
        if self._leads:
            self._events.flush()
            self._validation.flush()

    def notify(self, message: str, *, show: bool = True) -> None:
        """Write a line to the log and, if `show`, above the progress bar."""
        log.info("%s  %s", self._plan.name, message)
        if show and self._leads:
            self._console.print(styled_text((self._plan.name, "bold"), f"  {message}"), soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._leads:
            self._progress.stop()
            self._events.close()
            self._validation.close()

    @property
    def _histogram_request(self) -> Path:
        return self._folder.path / "histograms"


def _memory_in_use(device: torch.device) -> dict[str, float]:
    """Memory of this process on the host and on its GPU, if it has one, in GB (1e9 bytes); peaks are of this start."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    memory = {"usage/host_gigabytes": resident / 1e9}
    if device.type == "cuda":
        memory |= {
            "usage/device_allocated_gigabytes": torch.cuda.memory_allocated(device) / 1e9,
            "usage/device_allocated_peak_gigabytes": torch.cuda.max_memory_allocated(device) / 1e9,
            "usage/device_reserved_peak_gigabytes": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    return memory

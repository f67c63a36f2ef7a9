"""What a person watching sees: a progress bar or plain lines, a log file, TensorBoard."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from pipeline.checkpoints.saver import SaveReport
from pipeline.evaluate import Accuracy
from pipeline.run_folder import RunFolder

log = logging.getLogger(__name__)


def divert_output(folder: RunFolder, rank: int) -> Console:
    """Send log messages, and what libraries print, to the log of this rank; returns the standard output as it was."""
    people = Console(file=os.fdopen(os.dup(1), "w"), highlight=False)
    with open(folder.log_file(rank), "ab") as log_file:
        os.dup2(log_file.fileno(), 1)
    logging.basicConfig(
        filename=folder.log_file(rank),
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        force=True,
    )
    return people


class Monitor:
    """The leader's view of one stage; on other ranks it only exists.

    Args:
        folder: of the run.
        stage: the stage's name.
        first_step: steps taken before this start. TensorBoard drops points beyond it that an earlier start wrote, so
            that a curve never goes back in time.
        steps: of the whole stage.
        images_per_step: the global batch.
        console: where a person looks; None on ranks that show nothing.
    """

    def __init__(
        self, folder: RunFolder, stage: str, first_step: int, steps: int, images_per_step: int, console: Console | None
    ) -> None:
        self._folder = folder
        self._stage = stage
        self._first_step = first_step
        self._steps = steps
        self._images_per_step = images_per_step
        self._leads = console is not None
        self._counted = (time.monotonic(), first_step)
        if console is None:
            return
        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1)
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(stage, total=steps, completed=first_step, state="")
        self._progress.start()

    def begin(self, checkpoint: str | None, damaged: list[str], ranks: int) -> None:
        """Say where the run starts, and which checkpoints were passed over."""
        if not self._leads:
            return
        for reason in damaged:
            self._folder.diary.note("checkpoint_damaged", reason=reason)
            self._say(f"passed over a checkpoint: {reason}")
        self._folder.diary.note("resume" if checkpoint else "start", step=self._first_step, ranks=ranks)
        if checkpoint:
            self._say(f"continues from checkpoint {checkpoint}")

    def step(self, step: int, scalars: dict[str, float]) -> None:
        """Show the state after `step` steps; `scalars` are TensorBoard tags and values and include `train/loss`."""
        if not self._leads:
            return
        now = time.monotonic()
        since, since_step = self._counted
        self._counted = (now, step)
        speed = (step - since_step) * self._images_per_step / max(1e-9, now - since)
        for tag, value in {**scalars, "train/images_per_second": speed}.items():
            self._writer.add_scalar(tag, value, step)
        # The first steps of a start also warm everything up and say little about the others.
        seconds = (self._steps - step) * self._images_per_step / max(1e-9, speed)
        eta = str(timedelta(seconds=round(seconds))) if since_step > self._first_step else "-"
        state = f"loss {scalars['train/loss']:.4f}  {speed:,.0f} images/s  ETA {eta}"
        self._progress.update(self._task, completed=step, state=state)
        self._say(f"step {step}/{self._steps}  {state}", show=not self._console.is_terminal)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep what happens inside out of the images per second."""
        before = time.monotonic()
        yield
        since, step = self._counted
        self._counted = (since + time.monotonic() - before, step)

    def saved(self, reports: list[SaveReport]) -> None:
        """Show how saves went."""
        for report in reports if self._leads else []:
            self._writer.add_scalar("checkpoint/stall_seconds", report.stall, report.step)
            if report.failure is None:
                self._writer.add_scalar("checkpoint/write_seconds", report.seconds, report.step)
                self._writer.add_scalar("checkpoint/bytes", report.bytes, report.step)
            else:
                self._say(f"the checkpoint of step {report.step} was not saved: {report.failure}; the run goes on")

    def evaluation(self, step: int, accuracy: Accuracy) -> None:
        """Show the accuracy after `step` steps."""
        if not self._leads:
            return
        self._folder.diary.note("evaluation", step=step, **accuracy.as_dict())
        for name in ("top1", "top5", "loss"):
            self._writer.add_scalar(f"validation/{name}", getattr(accuracy, name), step)
        self._say(f"step {step}/{self._steps}  {accuracy}")

    def pictures(self, canvas: NDArray[np.uint8]) -> None:
        """Show pictures (H, W, 3) uint8 as the model sees them in its first step."""
        if self._leads:
            self._writer.add_image("train/images", canvas, 1, dataformats="HWC")

    def flush(self) -> None:
        """Write to the disk what TensorBoard is to see: before a save, or a kill after it would leave a gap."""
        if self._leads:
            self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._leads:
            self._progress.stop()
            self._writer.close()

    def _say(self, message: str, *, show: bool = True) -> None:
        """A line in the log and, unless told otherwise, above the progress bar."""
        log.info("%s  %s", self._stage, message)
        if show:
            self._console.print(Text.assemble((self._stage, "bold"), f"  {message}"), soft_wrap=True)

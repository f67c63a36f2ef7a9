"""How far a replay is."""

import torch

from pipeline.replay.progress import ReplayProgress
from pipeline.replay.step_replay import ReplayedStep
from pipeline.training.step import StepResult
from pipeline.training.step_message import StepMessage


def replayed(step: int) -> ReplayedStep:
    result = StepResult(0.25, 1.0, 0, StepMessage([], 0.0, []), [], torch.empty(0), torch.empty(0))
    return ReplayedStep(step, result, 1e-3, {}, {}, {}, (), 0.0)


def test_progress_is_said_twice_a_minute_and_not_of_the_last_step() -> None:
    said: list[str] = []
    now = 100.0
    progress = ReplayProgress(1004, said.append, lambda: now)
    for step in range(1000, 1005):
        now += 20.0
        progress.step(replayed(step))
    assert said == ["step 1,001 of 1,004: loss 0.2500", "step 1,003 of 1,004: loss 0.2500"]

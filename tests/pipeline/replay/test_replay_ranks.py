"""With which state a replay begins, how long it may take, and what it says if memory does not suffice."""

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.errors import CheckpointRemoved, ConfigError
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from pipeline.replay.memory_advice import memory_advice, replay_out_of_memory
from pipeline.replay.replay_ranks import begin_with, patience
from pipeline.replay.start_points import ReplayStart
from tests.support.recipes import write_recipe
from tests.support.trained import save_trained

ALONE = Ranks(0, 1, torch.device("cpu"))


def saved(folder: Path) -> list[ReplayStart]:
    """The checkpoints of a run, newest first."""
    return [ReplayStart(step, str(save_trained(folder, step)), step) for step in (6, 4)]


def read(start: ReplayStart) -> None:
    assert start.location is not None
    open_checkpoint(start.location).parameters()


def test_the_nearest_state_that_is_intact_is_taken(tmp_path: Path) -> None:
    def begin(start: ReplayStart) -> None:
        if start.step > 3:
            raise ConfigError(f"{start.location}: damaged")

    starts = [*saved(tmp_path), ReplayStart(3), ReplayStart(2)]
    found, passed_over = begin_with(starts, ALONE, begin)
    assert found == ReplayStart(3)
    assert passed_over == [f"{start.location}: damaged" for start in starts[:2]]
    with pytest.raises(
        ConfigError, match="no state to recompute the step from is intact: .*step-00000006: damaged; .*"
    ):
        begin_with(starts[:2], ALONE, begin)


def test_a_checkpoint_that_the_run_removed_before_it_is_read_is_passed_over(tmp_path: Path) -> None:
    starts = saved(tmp_path)
    assert starts[0].location is not None
    shutil.rmtree(starts[0].location)
    found, passed_over = begin_with(starts, ALONE, read)
    assert found == starts[1]
    why = "removed since this command began, as the run has saved newer ones"
    assert passed_over == [f"{starts[0].location}: {why}"]


def test_a_checkpoint_that_the_run_removes_while_it_is_read_asks_to_repeat_the_command(tmp_path: Path) -> None:
    def begin(start: ReplayStart) -> None:
        assert start.location is not None
        opened = open_checkpoint(start.location)
        shutil.rmtree(start.location)
        opened.parameters()

    with pytest.raises(
        CheckpointRemoved, match="step-00000006: removed since this command began, as the run"
    ) as raised:
        begin_with(saved(tmp_path), ALONE, begin)
    assert raised.value.retryable
    assert raised.value.exit_code == 75


def test_other_files_that_are_missing_are_no_fault_of_the_run(tmp_path: Path) -> None:
    def begin(start: ReplayStart) -> None:
        raise FileNotFoundError(2, "No such file or directory", "classes.csv")

    with pytest.raises(FileNotFoundError, match="classes.csv"):
        begin_with(saved(tmp_path), ALONE, begin)


@pytest.fixture
def stage(shards: Path, tmp_path: Path) -> TrainStage:
    plan = plan_stage(load_recipe(write_recipe(tmp_path, shards), ["watchdog.setup_seconds=100"]), "pretrain", 1)
    assert isinstance(plan, TrainPlan)
    return plan.stage


def test_the_watchdog_is_as_patient_as_at_the_start_and_more_during_a_search(stage: TrainStage) -> None:
    assert (patience(stage, bisects=False).setup_seconds, patience(stage, bisects=False).least_seconds) == (100, 100)
    assert patience(stage, bisects=True).least_seconds == 300  # micro-batches of three samples


def test_memory_that_is_full_comes_with_advice(stage: TrainStage) -> None:
    everything = memory_advice(stage, 2, look_inside=True, forward_only=False)
    assert everything == (
        "To need less: --curves-only, which has no second model beside the engine; --without-optimizer, which has the "
        "model alone and only a forward; activation_checkpointing=every_block; more ranks than 2 (--ranks) on a machine "
        "with more GPUs; a machine with more memory"
    )
    assert "--curves-only" not in memory_advice(stage, 2, look_inside=False, forward_only=False)
    assert "more ranks" not in memory_advice(stage, 4, look_inside=True, forward_only=False)
    assert memory_advice(stage, 4, look_inside=True, forward_only=True) == "To need less: a machine with more memory"
    full = replay_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "Advice")
    assert str(full) == "the GPU's memory is full (CUDA out of memory. Tried). Advice"
    assert str(replay_out_of_memory(MemoryError(), "Advice")) == "the machine's memory is full. Advice"
    assert replay_out_of_memory(RuntimeError("shapes differ"), "Advice") is None

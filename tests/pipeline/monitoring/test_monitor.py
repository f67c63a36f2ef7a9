"""What a monitor writes to TensorBoard: over several starts, on request by a file, and on disks that were full."""

import io
import logging
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata

from pipeline.checkpoints.saver import SaveReport
from pipeline.evaluate import Accuracy
from pipeline.monitoring.histograms import weight_histograms
from pipeline.monitoring.monitor import Monitor
from pipeline.monitoring.progress import StageProgress
from pipeline.plan import Plan, TrainPlan, plan_stage
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.loader import load_recipe
from pipeline.runs.run_folder import RunFolder
from pipeline.zero.fragments import Fragment
from tests.support.event_files import points, steps
from tests.support.recipes import events, write_recipe

ALONE = Ranks(0, 1, torch.device("cpu"))
ACCURACY = Accuracy(top1=0.5, top5=0.75, loss=1.5, samples=15, skipped=0, of_classes=np.zeros((0, 3), np.int64))


class Started:
    """A monitor with its console output."""

    def __init__(self, folder: RunFolder, plan: Plan, first_step: int, steps: int, ranks: Ranks) -> None:
        self.output = io.StringIO()
        console = Console(file=self.output, width=200) if ranks.is_leader else None
        self.monitor = Monitor(folder, plan, first_step, steps, ranks, console)
        self.monitor.begin(None, [])


@pytest.fixture
def planned(shards: Path, tmp_path: Path) -> Callable[..., Plan]:
    recipe = write_recipe(tmp_path, shards)
    return lambda *changes, stage="pretrain": plan_stage(load_recipe(recipe, list(changes)), stage, 1)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def take_steps(monitor: Monitor, first: int, last: int, value: float) -> None:
    """As the training loop does, with everything that TensorBoard can show in every step."""
    fragment = Fragment("stem.conv1.weight", 0, 4, {"master": torch.full((4,), value)}, True)
    if first == 0:
        monitor.images(np.zeros((4, 4, 3), np.uint8))
    for step in range(first + 1, last + 1):
        monitor.clock.step_done()
        monitor.add_rank_times([0.0, 0.0])
        monitor.step(step, {"train/loss": value, "train/learning_rate": 0.1, "update_ratio/stem": value})
        monitor.histograms(step, weight_histograms([fragment], ["stem.conv1.weight"], ALONE))
        monitor.saved([SaveReport(step, f"step-{step:08d}", stall=0.1, seconds=0.2, bytes=1, failure=None)])
        monitor.evaluation(step, ACCURACY)


def test_no_tag_of_any_kind_goes_back_in_time_over_several_starts(
    planned: Callable[..., Plan], folder: RunFolder
) -> None:
    plan = planned()
    for first, last in ((0, 3), (0, 8), (4, 9), (6, 7), (6, 40)):
        with Started(folder, plan, first, 40, ALONE).monitor as monitor:
            take_steps(monitor, first, last, float(first))
    found = points(folder.tensorboard)
    of_starts = {"recipe", "custom_scalars__config__"}
    once = {"train/images", *(f"_hparams_/{name}" for name in ("experiment", "session_start_info", "session_end_info"))}
    curves = {
        *(
            "train/loss",
            "train/learning_rate",
            "train/images_per_second",
            "train/samples",
            "update_ratio/stem",
            "usage/host_gigabytes",
        ),
        *(f"wall_time/step_p{share}_seconds" for share in (50, 90, 99)),
        *("wall_time/data_wait_share", "wall_time/checkpoint_stall_seconds", "wall_time/checkpoint_write_seconds"),
        *("validation/top1", "validation/top5", "validation/loss", "weights/stem.conv1.weight"),
    }
    assert set(found) == of_starts | once | curves
    for tag in curves:
        assert [step for step, _ in found[tag]] == list(range(1, 41)), tag
    # Each step has the value of the last start that took it.
    assert [value for _, value in found["train/loss"]] == [0.0] * 4 + [4.0] * 2 + [6.0] * 34
    # One for each start that continued from a different step.
    assert {tag: [step for step, _ in found[tag]] for tag in of_starts} == {tag: [1, 5, 7] for tag in of_starts}
    assert [step for step, _ in found["train/images"]] == [1]


def test_steps_that_are_left_out_are_shown_without_times(planned: Callable[..., Plan], folder: RunFolder) -> None:
    started = Started(folder, planned(), 0, 40, ALONE)
    with started.monitor as monitor:
        for step, is_left_out in ((1, True), (2, False), (3, True)):
            if is_left_out:
                monitor.clock.leave_out_step()
            monitor.clock.step_done()
            monitor.step(step, {"train/loss": 1.0, "train/learning_rate": 0.1})
            speed = (StageProgress.read(folder.progress) or pytest.fail("no progress")).images_per_second
            assert (speed is None) == (step == 1)
    found = points(folder.tensorboard)
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    assert [step for step, _ in found["train/images_per_second"]] == [2]
    lines = [line for line in started.output.getvalue().splitlines() if "  step " in line]
    assert ["  - images/s" in line for line in lines] == [True, False, False]


def test_the_complete_recipe_is_shown_as_a_block_of_yaml(planned: Callable[..., Plan], folder: RunFolder) -> None:
    plan = planned("pretrain.optimizer.weight_decay=0.123")
    with Started(folder, plan, 0, 40, ALONE).monitor:
        pass
    ((_, text),) = points(folder.tensorboard)["recipe"]
    lines = text[()].decode().splitlines()
    assert all(line.startswith("    ") for line in lines)
    written = yaml.safe_load("\n".join(line[4:] for line in lines))
    assert written == {"stage": "pretrain", "seed": 0, **plan.stage.model_dump(mode="json")}
    assert written["optimizer"]["weight_decay"] == 0.123


def test_the_layout_expands_the_first_six_charts(planned: Callable[..., Plan], folder: RunFolder) -> None:
    with Started(folder, planned(), 0, 40, ALONE).monitor:
        pass
    ((_, content),) = points(folder.tensorboard)["custom_scalars__config__"]
    first, *others = Layout.FromString(content[()]).category
    assert (len(first.chart), first.closed, {category.closed for category in others}) == (6, False, {True})


def hparams(folder: RunFolder) -> dict[str, Any]:
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    contents = {tag: events.SummaryMetadata(tag).plugin_data.content for tag in events.PluginTagToContent("hparams")}
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    return {
        "values": {name: value.string_value or value.number_value for name, value in start.hparams.items()},
        "columns": {info.name for info in experiment.hparam_infos},
        "metrics": {info.name.tag for info in experiment.metric_infos},
        "done": metadata.SESSION_END_INFO_TAG in contents,
    }


def test_settings_are_shown_beside_results_and_a_stage_is_done_after_its_last_evaluation(
    planned: Callable[..., Plan], folder: RunFolder
) -> None:
    plan = planned(
        "data.random_augment={layers: 2, magnitude: 15}", "pretrain.cutmix_alpha=1",
        "data.color_jitter={brightness: 0.4, hue: 0.1}", "data.random_erasing={probability: 0.25}",
    )  # fmt: skip
    with Started(folder, plan, 0, 40, ALONE).monitor as monitor:
        monitor.evaluation(20, ACCURACY)
    found = hparams(folder)
    assert found["values"].items() >= {
        "stage": "pretrain", "model": "coatnet_debug", "resolution": 32, "steps": 40, "global_size": 12,
        "peak_learning_rate": 3e-3, "random_augment": "2 x 15, pillow", "precision": "fp32",
        "cutmix_alpha": 1, "color_jitter": "brightness 0.4 hue 0.1", "random_erasing": "0.25, pixel",
    }.items()  # fmt: skip
    assert found["columns"] >= found["values"].keys()
    assert found["metrics"] >= {"validation/top1", "validation/top5", "validation/loss"}
    assert not found["done"]
    with Started(folder, plan, 20, 40, ALONE).monitor as monitor:
        monitor.evaluation(40, ACCURACY)
    assert hparams(folder)["done"]


def test_an_evaluation_stage_has_the_same_columns(planned: Callable[..., Plan], folder: RunFolder) -> None:
    other = RunFolder(folder.path / "other")
    other.create()
    with Started(folder, planned(), 0, 40, ALONE).monitor:
        pass
    with Started(other, planned(stage="evaluate"), 6, 6, ALONE).monitor as monitor:
        monitor.evaluation(6, ACCURACY)
    assert hparams(other)["columns"] == hparams(folder)["columns"]
    assert hparams(other)["done"]


def test_with_the_sigmoid_loss_the_accuracy_is_precision_at_1(planned: Callable[..., Plan], folder: RunFolder) -> None:
    with Started(folder, planned("loss.kind=sigmoid"), 0, 40, ALONE).monitor as monitor:
        monitor.evaluation(1, ACCURACY)
    found = points(folder.tensorboard)
    assert found["validation/precision_at_1"] == [(1, 0.5)]
    assert "validation/top1" not in found
    assert found["validation/top5"] == [(1, 0.75)]


def test_a_file_requests_histograms_which_are_made_once(planned: Callable[..., Plan], folder: RunFolder) -> None:
    started = Started(folder, planned(), 0, 40, ALONE)
    request = folder.path / "histograms"
    due = []
    with started.monitor as monitor:
        for step in range(1, 7):
            due.append(monitor.histograms_due(step))
            if due[-1]:
                monitor.histograms(step, {})
            if step == 3:
                request.touch()
            if step % 2 == 0:  # log.every_steps
                monitor.clock.step_done()
                monitor.step(step, {"train/loss": 0.0, "train/learning_rate": 0.0})
    assert due == [False, False, False, False, True, False]
    assert not request.exists()
    assert "histograms of the weights after step 5 are in TensorBoard" in started.output.getvalue()


def test_the_recipe_sets_the_steps_between_histograms(planned: Callable[..., Plan], folder: RunFolder) -> None:
    with Started(folder, planned("log.histograms_every_steps=3"), 0, 40, ALONE).monitor as monitor:
        assert [step for step in range(1, 10) if monitor.histograms_due(step)] == [3, 6, 9]


def test_other_ranks_write_and_request_nothing(planned: Callable[..., Plan], folder: RunFolder) -> None:
    follower = Ranks(1, 2, torch.device("cpu"))
    (folder.path / "histograms").touch()
    with Started(folder, planned("log.histograms_every_steps=1"), 0, 40, follower).monitor as monitor:
        take_steps(monitor, 0, 3, 1.0)
        assert not monitor.histograms_due(4)
    assert not list(folder.path.rglob("*.tfevents.*"))
    assert (folder.path / "histograms").exists()
    assert not (folder.path / "events.jsonl").exists()


def test_speed_and_samples_follow_from_the_steps_of_the_interval(
    planned: Callable[..., Plan], folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("pipeline.monitoring.step_clock.time.perf_counter", lambda: now)
    started = Started(folder, planned(), 10, 40, ALONE)
    with started.monitor as monitor:
        for step in range(11, 15):
            now += 0.5
            monitor.clock.step_done()
            with monitor.paused():
                now += 100.0
            if step % 2 == 0:
                monitor.step(step, {"train/loss": 0.25, "train/learning_rate": 1e-3})
    found = points(folder.tensorboard)
    assert found["train/images_per_second"] == [(12, 24.0), (14, 24.0)]
    assert found["train/samples"] == [(12, 144.0), (14, 168.0)]
    assert found["wall_time/step_p50_seconds"] == [(12, 0.5), (14, 0.5)]
    # Thirteen seconds for 26 steps; the first interval of a start includes the warm-up.
    assert started.output.getvalue().splitlines()[5:] == [  # after what the start announces
        "pretrain  step 12/40  loss 0.2500  lr 1.00e-03  epoch 3.2/10.7  24 images/s  ETA -",
        "pretrain  step 14/40  loss 0.2500  lr 1.00e-03  epoch 3.7/10.7  24 images/s  ETA 0:00:13",
    ]


def test_a_rank_that_stays_slow_is_named(planned: Callable[..., Plan], folder: RunFolder) -> None:
    started = Started(folder, planned(), 0, 40, Ranks(0, 4, torch.device("cpu")))
    with started.monitor as monitor:
        for step in range(1, 4):
            monitor.clock.step_done()
            monitor.add_rank_times([0.0, 0.0, 1e6, 0.0] + [1.0] * 4)
            monitor.step(step, {"train/loss": 0.0, "train/learning_rate": 0.0})
    assert steps(folder.tensorboard)["wall_time_of_ranks/data_wait_slowest_rank"] == [1, 2, 3]
    assert started.output.getvalue().count("rank 2 waits longest for data") == 1


def test_a_disk_without_room_for_tensorboard_ends_nothing_and_is_reported_once(
    planned: Callable[..., Plan], folder: RunFolder
) -> None:
    started = Started(folder, planned(), 0, 40, ALONE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with started.monitor as monitor:
        take_steps(monitor, 0, 3, 1.0)
        # The event log is smaller than the event file, so it alone has room.
        (file,) = folder.tensorboard.glob("*.tfevents.*")
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, hard))
        try:
            take_steps(monitor, 3, 6, 1.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        take_steps(monitor, 6, 8, 1.0)
    assert steps(folder.tensorboard)["train/loss"] == list(range(1, 9))
    shown = started.output.getvalue()
    assert (shown.count("cannot be written (File too large)"), shown.count("is written again")) == (1, 1)
    assert [entry["step"] for entry in events(folder.path) if entry["event"] == "evaluation"] == list(range(1, 9))


def test_host_memory_is_that_of_this_process(planned: Callable[..., Plan], folder: RunFolder) -> None:
    plan = planned()
    assert isinstance(plan, TrainPlan)
    with Started(folder, plan, 0, 40, ALONE).monitor as monitor:
        take_steps(monitor, 0, 1, 1.0)
        kept = np.ones(10**8, np.uint8)
        take_steps(monitor, 1, 2, 1.0)
    (_, before), (_, after) = points(folder.tensorboard)["usage/host_gigabytes"]
    assert 0.09 < after - before < 0.2
    assert kept.size


@pytest.mark.parametrize(
    ("sorted_by_class", "line"),
    [
        (False, "data.lanes: 12 lanes (derived from the batch); a batch of 12 has on average 3.0 classes"),
        (
            True,
            "warning: data.train: the samples are sorted: with 12 lanes (derived from the batch), a batch of 12 has on average",
        ),
    ],
)
def test_a_run_starts_with_its_lanes_and_what_its_batches_mix(
    shards: Path,
    sorted_shards: Path,
    tmp_path: Path,
    folder: RunFolder,
    caplog: pytest.LogCaptureFixture,
    sorted_by_class: bool,
    line: str,
) -> None:
    train = sorted_shards if sorted_by_class else shards / "train"
    overrides = [f"data.train={train}", f"data.validation={train}", "data.lanes=null", "data.shuffle_window=1"]
    plan = plan_stage(load_recipe(write_recipe(tmp_path, shards), overrides), "pretrain", 1)
    shown = io.StringIO()
    with caplog.at_level(logging.INFO), Monitor(folder, plan, 0, 40, ALONE, Console(file=shown)) as monitor:
        monitor.begin(None, [])
        monitor.begin("step-00000001", [])
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("monitor")]
    first, again = [message for message in messages if "lanes" in message]
    assert first.startswith(f"pretrain  {line}")
    assert again == "pretrain  data.lanes: 12 lanes (derived from the batch)"
    assert ("warning" in shown.getvalue()) == sorted_by_class

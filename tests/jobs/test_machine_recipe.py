"""Recipes that are written for a machine: what is chosen on which one, and that it trains."""

from pathlib import Path

import pytest

from data.errors import DataError
from jobs.machine_recipe import TrainingData, machine_recipe, training_data
from pipeline.host import Host
from pipeline.memory_estimate import estimate_memory
from pipeline.preflight.machine import Machine
from pipeline.ranks.gpus import Gpu
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import Recipe, TrainStage
from tests.support.command import coatnet

GB = 10**9
RATE = 25e9


def written(folder: Path, machine: Machine, samples: int = 10_000, hours: float | None = None) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(machine_recipe("own_images", machine, RATE, TrainingData(samples, "Found."), hours))
    return load_recipe(path)


def of_cpus(cores: int, memory: int = 64 * GB) -> Machine:
    return Machine(Host(cores, memory, False), ())


@pytest.mark.parametrize(
    ("machine", "samples", "hours", "chosen"),
    [
        # model, pixels, ranks, threads, global batch, micro-batch, precision, epochs
        (of_cpus(2), 10_000, None, ("coatnet_micro", 128, 2, 1, 128, 64, "fp32", 34)),
        (of_cpus(2), 10_000, 0.15, ("coatnet_micro", 64, 2, 1, 128, 64, "fp32", 20)),
        (of_cpus(2), 10_000, 0.1, ("coatnet_nano", 32, 2, 1, 128, 64, "fp32", 48)),
        (of_cpus(2), 600, None, ("coatnet_0", 128, 2, 1, 16, 8, "fp32", 37)),
        (of_cpus(2), 10_000_000, None, ("coatnet_nano", 32, 2, 1, 128, 64, "fp32", 1)),
        (of_cpus(64), 10_000, None, ("coatnet_micro", 128, 16, 4, 128, 8, "fp32", 100)),
        (of_cpus(12, 4 * GB), 10_000, None, ("coatnet_micro", 128, 4, 3, 128, 8, "fp32", 68)),
        (Machine(Host(64, 512 * GB, False), (Gpu("NVIDIA H100 80GB HBM3", 80 * GB),) * 8), 1_300_000, None,
         ("coatnet_0", 224, 8, 1, 1024, 128, "bf16", 300)),
        (Machine(Host(8, 32 * GB, False), (Gpu("GeForce", 8 * GB),) * 3), 10_000, None,
         ("coatnet_0", 224, 2, 1, 256, 8, "bf16", 300)),
    ],
)  # fmt: skip
def test_model_size_ranks_and_batch_follow_from_the_machine_and_the_images(
    tmp_path: Path, machine: Machine, samples: int, hours: float | None, chosen: tuple[object, ...]
) -> None:
    recipe = written(tmp_path, machine, samples, hours)
    stage = recipe.stages["pretrain"]
    assert isinstance(stage, TrainStage)
    resources, batch = stage.resources, stage.batch
    assert chosen == (
        stage.model.name, stage.resolution, resources.ranks, resources.threads_per_rank, batch.global_size,
        batch.micro_size, stage.precision, stage.epochs,
    )  # fmt: skip
    for one in recipe.stages.values():
        assert one.batch.global_size // one.batch.micro_size % one.resources.ranks == 0
        if isinstance(one, TrainStage):
            memory = estimate_memory(one, 100, one.resources.ranks, on_cpu=not machine.gpus)
            assert memory.host * resources.ranks < machine.host.memory
            assert all(memory.device < gpu.memory for gpu in machine.gpus)


def test_shards_that_are_there_are_counted_and_missing_ones_assumed(shards: Path, tmp_path: Path) -> None:
    assert training_data(shards / "train").samples == 45
    assumed = training_data(tmp_path / "shards/train")
    assert (assumed.samples, assumed.found) == (
        10_000, f"10,000 images are assumed, since {tmp_path}/shards/train has no shards yet.",
    )  # fmt: skip


def test_a_damaged_index_is_not_taken_for_missing_shards(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match="index.json"):
        training_data(tmp_path)


def test_every_choice_has_its_reason_and_the_time_is_estimated(tmp_path: Path) -> None:
    text = machine_recipe("own_images", of_cpus(2), RATE, TrainingData(10_000, "Found."))
    assert "# For your own images on this machine: 2 cores, 64.0 GB of memory, no GPU.\n" in text
    assert "# By estimate: 72 minutes: 34 epochs of 10,000 images, 3 of fine-tuning.\n" in text
    assert "    ranks: 2 # the largest power of two for 2 cores and 64 GB\n" in text
    assert "    resolution: 128 # pixels: the most that 2 cores can train on for 30 epochs in 1 h\n" in text


@pytest.mark.slow
def test_the_command_writes_one_that_the_doctor_accepts_and_that_trains(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(shards)
    done = coatnet("recipes", "copy", "own_images", "--for-this-machine", "--hours", "0.01", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "wrote own_images.yaml"
    assert "shards/train has 45 images of 3 classes." in done.stdout
    checked = coatnet("doctor", "own_images.yaml", folder=tmp_path, PATH="/nowhere")
    assert checked.stdout.splitlines()[-1] == "0 errors, 0 warnings", checked.stdout
    run = coatnet("run", "own_images.yaml", "model.name=coatnet_debug", "resolution=32", "epochs=1",
                  "pretrain.optimizer.warmup_epochs=0", folder=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "│ evaluate │" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--for-this-machine"], "the settings of demo do not depend on a machine; only own_images is"),
        (["own_images", "--hours", "1"], "--hours: has no effect without --for-this-machine"),
    ],
)
def test_what_cannot_be_adapted_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = coatnet("recipes", "copy", *arguments, folder=tmp_path)
    assert done.returncode == 78
    assert message in done.stderr
    assert not list(tmp_path.iterdir())

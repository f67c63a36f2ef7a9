"""A recipe for one's own images that trains on this machine in sensible time: model, image size, ranks and batch."""

import os
from dataclasses import dataclass
from pathlib import Path
from string import Template

from data.index import FILE_NAME, read_index
from data.text.counted import counted
from models.complexity import count_parameters, count_training_cost
from models.variants import VARIANTS
from pipeline.planner.step_estimate import computing_speed
from pipeline.preflight.machine import Machine
from pipeline.ranks.gpus import Gpu
from pipeline.recipe.schema import TrainStage

_ASSUMED_SAMPLES = 10_000
_UNKNOWN_GPU = "RTX 3090"  # as which one that is not in the table counts: the slowest there
_RANK_BYTES = 10**9  # on CPUs, with room for activations
_MOST_RANKS = 16
_CPU_HOURS, _GPU_HOURS = 1.0, 24.0
_CPU_CHOICES = (("coatnet_0", 224, 30), ("coatnet_0", 128, 30), ("coatnet_micro", 128, 30), ("coatnet_micro", 96, 30),
                ("coatnet_micro", 64, 15), ("coatnet_nano", 32, 15))  # fmt: skip
"""Model, image size and least number of epochs of pretraining, the best first: the first that has time is taken, else
the last one. timm cannot express `coatnet_nano`, so it is for images of which there is no time to see more."""
_CPU_EPOCHS = 100
_GPU_EPOCHS = (30, 300)

_TEXT = Template("""\
# For your own images on this machine: $machine.
# Written by `coatnet recipes copy own_images --for-this-machine`; copy it next to the `shards` folder, then run
# `coatnet run FILE`. All settings, with their defaults: docs/recipe.md.
#
# By estimate: $time_text
# $data_text

name: $name

defaults: # of every stage
  data:
    train: shards/train # written by: coatnet shards build IMAGES shards --validation-per-class 50
    validation: shards/validation
    evaluation_crop: whole
    workers: $workers # reader threads of each rank$augment
  model:
    name: $model # $model_why
    drop_path_rate: $drop_path
  batch:
    global_size: $batch # $batch_why
    micro_size: $micro # $micro_why
  loss:
    label_smoothing: 0.1
  precision: $precision # $precision_why
  zero_stage: 1
  checkpoint:
    every_epochs: 1
  resources:
    ranks: $ranks # $ranks_why
    gpus_per_rank: $gpus
    threads_per_rank: $threads

stages:
  pretrain:
    resolution: $resolution # pixels: $resolution_why
    epochs: $epochs # $epochs_why
    optimizer:
      peak_learning_rate: $rate
      minimum_learning_rate: 1e-5
      schedule: cosine
      warmup_epochs: $warmup

  finetune: # at a larger size; the relative bias tables are resized
    start_from: pretrain
    resolution: $larger
    epochs: $finetune_epochs
    data:
      crop: whole
    optimizer:
      peak_learning_rate: $finetune_rate
      minimum_learning_rate: 1e-6
      schedule: cosine
      warmup_epochs: 0

  evaluate:
    task: evaluate
    start_from: finetune
    resolution: $larger
""")


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is known of the images that the recipe will train on."""

    samples: int
    found: str
    """Where that is from, as a sentence."""


def training_data(folder: Path) -> TrainingData:
    """The size of the shards in `folder`, or an assumption where there are none yet.

    Raises:
        DataError: their index is damaged or cannot be read.
    """
    if not os.path.lexists(folder / FILE_NAME):
        assumed = f"{_ASSUMED_SAMPLES:,} images are assumed, since {folder} has no shards yet."
        return TrainingData(_ASSUMED_SAMPLES, assumed)
    index = read_index(folder)
    return TrainingData(
        index.samples, f"{folder} has {index.samples:,} images of {counted(len(index.classes), 'class', 'classes')}."
    )


def machine_recipe(name: str, machine: Machine, rate: float, data: TrainingData, hours: float | None = None) -> str:
    """The text of a recipe.

    Args:
        name: of the run.
        machine: where it will run.
        rate: operations per second at which one of its cores trains; not used if it has GPUs.
        data: what it will train on.
        hours: that pretraining may take; by default one on CPUs, and 24 on GPUs.
    """
    on_gpus = bool(machine.gpus)
    ranks = _power_of_two(min(len(machine.gpus), _MOST_RANKS)) if on_gpus else _cpu_ranks(machine)
    batch = 1024 if on_gpus else 128
    while batch > 2 * ranks and data.samples < 20 * batch:
        batch //= 2
    if on_gpus:
        speed = ranks * min(_gpu_speed(gpu) for gpu in machine.gpus)
        hours, (least, most) = hours or _GPU_HOURS, _GPU_EPOCHS
        model, resolution = "coatnet_0", 224
        micro = min(batch // ranks, _fitting_micro_batch(model, 384, min(gpu.memory for gpu in machine.gpus)))
    else:
        speed, hours, most = ranks * rate, hours or _CPU_HOURS, _CPU_EPOCHS
        in_time = (choice for choice in _CPU_CHOICES if _least_seconds(*choice, speed, data) <= 3600 * hours)
        model, resolution, least = next(in_time, _CPU_CHOICES[-1])
        micro = min(64, batch // ranks)
        while micro > 1 and ranks * _host_bytes(model, _larger(resolution), micro) > 0.8 * machine.host.memory:
            micro //= 2
    seconds = _epoch_seconds(model, resolution, speed, data)
    epochs = max(1, min(most, int(3600 * hours / seconds)))
    larger = _larger(resolution)
    finetune_epochs = max(1, epochs // 10)
    total = epochs * seconds + finetune_epochs * _epoch_seconds(model, larger, speed, data)
    augmented = resolution >= 128 and epochs >= least
    cores_each = max(1, machine.host.cores // ranks)
    return _TEXT.substitute(
        name=name,
        machine=machine.text,
        time_text=f"{_duration(total)}: {epochs} epochs of {data.samples:,} images, {finetune_epochs} of fine-tuning.",
        data_text=f"{data.found} Another number of images takes proportionally long.",
        workers=max(1, min(8, cores_each - 1)) if on_gpus else 1,
        augment="\n    random_augment: {layers: 2, magnitude: 15} # the paper's for ImageNet-1K" if augmented else "",
        model=model,
        model_why="the paper's smallest" if model == "coatnet_0" else "small, for CPUs; `coatnet models` lists others",
        drop_path=0.2 if model == "coatnet_0" else 0.05,
        batch=batch,
        batch_why="samples of one step, over all ranks; at least 20 steps an epoch",
        micro=micro,
        micro_why="samples of one forward; BatchNorm sees them, so it cannot change within a run",
        precision="bf16" if on_gpus else "fp32",
        precision_why="with float32 master weights" if on_gpus else "most CPUs compute bf16 several times slower",
        ranks=ranks,
        ranks_why=_why_ranks(machine, ranks),
        gpus=int(on_gpus),
        threads=1 if on_gpus else cores_each,
        resolution=resolution,
        resolution_why=_why_resolution(resolution, ranks, least, hours),
        epochs=epochs,
        epochs_why=f"as many as take {hours:g} h by estimate, at most {most}",
        rate="1e-3" if model == "coatnet_0" else "2e-3",
        warmup=round(min(10.0, epochs / 10), 1),
        larger=larger,
        finetune_epochs=finetune_epochs,
        finetune_rate="5e-5" if model == "coatnet_0" else "5e-4",
    )


def _larger(resolution: int) -> int:
    """The image size of fine-tuning: the paper's 384 after 224, else about half as much again."""
    return {32: 48, 224: 384}.get(resolution, resolution * 3 // 2 // 32 * 32)


def _host_bytes(model: str, resolution: int, micro: int) -> int:
    """Main memory of a rank without a GPU, as `pipeline.memory_estimate` counts it but for small parts."""
    variant = VARIANTS[model]
    activations = 2 * count_training_cost(variant, resolution).activation_bytes  # counted in bf16
    return 500_000_000 + 20 * count_parameters(variant, resolution, 1000) + micro * activations


def _gpu_speed(gpu: Gpu) -> float:
    """Operations per second at which a GPU trains coatnet_0 at 224 pixels, by the planner's estimate."""
    stage = TrainStage.model_validate(
        {
            "resolution": 224, "epochs": 1, "data": {"train": "none", "validation": "none"},
            "model": {"name": "coatnet_0"}, "batch": {"global_size": 128, "micro_size": 128}, "precision": "bf16",
            "optimizer": {"peak_learning_rate": 1e-3},
        }
    )  # fmt: skip
    images = computing_speed(stage, 1000, gpu.name if gpu.peak else _UNKNOWN_GPU).value
    return 2 * count_training_cost(VARIANTS["coatnet_0"], 224).multiply_adds * images


def _epoch_seconds(model: str, resolution: int, speed: float, data: TrainingData) -> float:
    """Seconds of an epoch at `speed` operations per second."""
    return 2 * count_training_cost(VARIANTS[model], resolution).multiply_adds * data.samples / speed


def _least_seconds(model: str, resolution: int, least: int, speed: float, data: TrainingData) -> float:
    return least * _epoch_seconds(model, resolution, speed, data)


def _cpu_ranks(machine: Machine) -> int:
    """One for each core, as a power of two, as far as the memory allows."""
    return _power_of_two(max(1, min(machine.host.cores, _MOST_RANKS, machine.host.memory // _RANK_BYTES)))


def _why_ranks(machine: Machine, ranks: int) -> str:
    host, gpus = machine.host, len(machine.gpus)
    if gpus:
        idle = f"; {gpus - ranks} stay idle, since ranks must divide the batch" if gpus > ranks else ""
        return f"one for each of {counted(gpus, 'GPU')}{idle}"
    return f"the largest power of two for {counted(host.cores, 'core')} and {host.memory / 1e9:.0f} GB"


def _why_resolution(resolution: int, ranks: int, epochs: int, hours: float) -> str:
    if resolution == 224:
        return "the paper's"
    if resolution == _CPU_CHOICES[-1][1]:
        return "the least of this model"
    return f"the most that {counted(ranks, 'core')} can train on for {epochs} epochs in {hours:g} h"


def _fitting_micro_batch(model: str, resolution: int, memory: int) -> int:
    """The largest power of two up to 128 whose activations, beside weights and buckets, fit in 70 % of a GPU."""
    variant = VARIANTS[model]
    room = 0.7 * memory - 16 * count_parameters(variant, resolution, 1000) - 2e9
    per_image = count_training_cost(variant, resolution).activation_bytes
    return next((size for size in (128, 64, 32, 16, 8, 4, 2) if size * per_image <= room), 1)


def _power_of_two(number: int) -> int:
    """The largest up to `number`."""
    return 1 << (number.bit_length() - 1)


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} minutes"
    return f"{seconds / 3600:.1f} hours"

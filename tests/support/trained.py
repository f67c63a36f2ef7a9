"""Run folders with trained models, made in a moment: checkpoints of one rank without an engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files.digest import json_sha256
from models.coatnet import CoAtNet
from models.model_facts import Preprocessing
from models.registry import create_model
from pipeline.checkpoints.checkpoint import AVERAGED
from pipeline.checkpoints.host_copy import LiveState
from pipeline.checkpoints.manifest import RunFacts
from pipeline.training.images import imagenet_preprocessing
from pipeline.weights import persistent_buffers
from pipeline.zero.fragments import Fragment
from tests.pipeline.checkpoints.small import freeze, saver
from tests.support.records import RUN, checkpoint_facts

MODEL: dict[str, Any] = {"name": "coatnet_debug", "num_classes": 3, "image_size": 32, "depths": [1, 1, 2, 1]}
CLASSES = ("tench", "goldfish", "[red]shark[/]")
PREPROCESSING: Preprocessing = imagenet_preprocessing(32, "whole")


def trained_model(seed: int, **arguments: Any) -> CoAtNet:
    """A model whose weights and statistics depend on the seed, of the `arguments`, by default `MODEL`."""
    made = create_model(**arguments or MODEL, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for buffer in persistent_buffers(made).values():
        buffer += torch.rand(buffer.shape, generator=generator)
    return made.eval()


def run_facts(classes: tuple[str, ...] = CLASSES, **changes: Any) -> RunFacts:
    """What a stage that trained `MODEL` for these classes writes into its checkpoints."""
    digests = replace(RUN.digests, classes_digest=json_sha256(classes))
    facts = replace(RUN, model=MODEL, digests=digests, preprocessing=PREPROCESSING, loss="softmax")
    return replace(facts, **changes)


def save_trained(
    run: Path, step: int, *, averaged: bool = False, classes: tuple[str, ...] | None = CLASSES, **changes: Any
) -> Path:
    """A checkpoint in the run folder of a stage with the weights of `trained_model(step)`, and those of
    `trained_model(step + 1)` as their average; `changes` replace some of its `run_facts`. Returns its folder."""
    facts = run_facts(classes or CLASSES, **changes)
    arguments = dict(facts.model)
    raw, average = trained_model(step, **arguments), trained_model(step + 1, **arguments)
    own, other = dict(raw.named_parameters()), dict(average.named_parameters())
    fragments = []
    for name, parameter in own.items():
        tensors = {kind: parameter.detach().view(-1) for kind in ("master", "exp_avg", "exp_avg_sq")}
        if averaged:
            tensors["ema"] = other[name].detach().view(-1)
        fragments.append(Fragment(name, 0, parameter.numel(), tensors, True))
    buffers = persistent_buffers(raw)
    if averaged:
        buffers |= {AVERAGED + name: buffer for name, buffer in persistent_buffers(average).items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    with saver(run, keep_last=9) as one:
        one.save(
            LiveState(
                checkpoint_facts(step, facts, ema_updates=step if averaged else None),
                fragments,
                buffers,
                shapes,
                classes,
            )
        )
        assert one.finish()
    freeze(run)
    return run / "checkpoints" / f"step-{step:08d}"


def assert_same_model(one: CoAtNet, other: CoAtNet, pictures: Tensor | None = None) -> None:
    """Their weights, statistics and logits are equal to the bit; `pictures` must be of another size than 32 x 32 where
    that is the models'."""
    wanted = other.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in one.state_dict().items())
    if pictures is None:
        pictures = torch.randn(2, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one.eval()(pictures), other.eval()(pictures))

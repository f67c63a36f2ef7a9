"""A checkpoint's weights as one safetensors file, for use of the model outside training."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data.atomic_file import atomic_path
from data.storage import is_remote
from models.registry import create_model
from pipeline.checkpoints.listing import find_runs
from pipeline.checkpoints.manifest import MANIFEST
from pipeline.checkpoints.resume import open_verified
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError
from pipeline.recipe.sections import WhichWeights
from pipeline.run_folder import absolute_location
from pipeline.weights import chosen_weights


def export(source: str, destination: Path, which: WhichWeights = "auto") -> dict[str, str]:
    """Write whole float32 weights and buffers, by the model's own names, to the safetensors file `destination`.

    Args:
        source: a checkpoint, or the run folder of a stage: the checkpoint of its result, or else its newest one.
        destination: replaced if it exists, once everything is written.
        which: the raw weights, their moving average, or `auto`: the average where there is one.

    Returns:
        The file's metadata: `model`, the arguments of `models.registry.create_model` as JSON; `weights`, `raw` or
        `ema`; `step`, steps trained; `source`, the checkpoint.

    Raises:
        ConfigError: no checkpoint there, a damaged one, one without the requested average, or a destination that
            cannot be written.
    """
    checkpoint = open_verified(_checkpoint_of(source), Ranks(0, 1, torch.device("cpu")))
    chosen = chosen_weights(checkpoint, which)
    model = checkpoint.manifest.facts.run.model
    tensors = checkpoint.parameters(chosen) | checkpoint.buffers(chosen)
    # The metadata must be enough to load the file.
    expected = create_model(**model, device="meta").state_dict()
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in expected.items()}
    metadata = {
        "format": "pt",  # by which other programs recognize tensors of PyTorch
        "model": json.dumps(model),
        "weights": chosen,
        "step": str(checkpoint.step),
        "source": checkpoint.location,
    }
    _publish(tensors, metadata, destination)
    return metadata


def _checkpoint_of(source: str) -> str:
    """The path or URL of the checkpoint that `source` names."""
    if is_remote(source) or (Path(source) / MANIFEST).exists():
        return source
    stages = find_runs(Path(source))
    if len(stages) > 1:
        names = ", ".join(stage.stage for stage in stages)
        raise ConfigError(f"{source}: has several stages ({names}); give the folder of one")
    result = stages[0].folder.result()
    if result is not None:
        return absolute_location(result.checkpoint, stages[0].folder)
    steps = [(step, store) for store in stages[0].stores for step in store.contents().steps]
    if not steps:
        raise ConfigError(f"{source}: no checkpoint yet; train the stage until it has saved one")
    step, store = max(steps, key=lambda found: found[0])
    return store.at(step)


def _publish(tensors: dict[str, Any], metadata: dict[str, str], destination: Path) -> None:
    try:
        with atomic_path(destination) as unfinished:
            save_file(tensors, unfinished, metadata)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{destination}: cannot be written ({error}); give another file, or free some space"
        ) from None

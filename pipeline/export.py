"""A checkpoint's weights as one safetensors file, for whoever wants the model and not the training."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from data.atomic_file import atomic_path
from data.storage import is_remote
from models.registry import create_model
from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.checkpoints.listing import find_runs
from pipeline.checkpoints.manifest import MANIFEST
from pipeline.errors import ConfigError
from pipeline.recipe.sections import WhichWeights
from pipeline.run_folder import absolute_location
from pipeline.weights import chosen_weights


def export(source: str, destination: Path, which: WhichWeights = "auto") -> dict[str, str]:
    """Write whole float32 weights and buffers, by the model's own names, to the safetensors file `destination`.

    Args:
        source: a checkpoint, or the run folder of a stage: what its result names, or its newest checkpoint.
        destination: replaced if it exists, once all is written.
        which: the raw weights, their moving average, or `auto`: the average where there is one.

    Returns:
        The file's metadata: `model`, the arguments of `models.registry.create_model` as JSON; `weights`, `raw` or
        `ema`; `step`, steps trained; `source`, the checkpoint.

    Raises:
        ConfigError: no checkpoint there, a damaged one, one without the average that is asked for, or a destination
            that cannot be written.
    """
    checkpoint = _whole(_checkpoint_of(source))
    chosen = chosen_weights(checkpoint, which)
    model = checkpoint.manifest.get("model")
    if model is None:
        raise ConfigError(f"{checkpoint.location}: does not say which model it holds, since no training stage wrote it")
    tensors = checkpoint.parameters(chosen) | checkpoint.buffers(chosen)
    # What the file says of itself must be enough to load it.
    wanted = create_model(**model, device="meta").state_dict()
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in wanted.items()}
    metadata = {
        "format": "pt",  # by which other programs know whose tensors they are
        "model": json.dumps(model),
        "weights": chosen,
        "step": str(checkpoint.step),
        "source": checkpoint.location,
    }
    _publish(tensors, metadata, destination)
    return metadata


def _checkpoint_of(source: str) -> str:
    """The path or URL of the checkpoint that `source` means."""
    if is_remote(source) or (Path(source) / MANIFEST).exists():
        return source
    runs = find_runs(Path(source))
    if len(runs) > 1:
        raise ConfigError(f"{source}: has several stages ({', '.join(run.stage for run in runs)}); name one's folder")
    result = runs[0].folder.result()
    if result is not None:
        return absolute_location(str(result["checkpoint"]), runs[0].folder)
    steps = [(step, place) for place in runs[0].places for step in place.contents().steps]
    if not steps:
        raise ConfigError(f"{source}: no checkpoint yet")
    step, place = max(steps, key=lambda found: found[0])
    return place.at(step)


def _whole(location: str) -> Checkpoint:
    checkpoint = open_checkpoint(location)
    damage = checkpoint.damage()
    if damage:
        raise ConfigError(f"{location}: damaged: {damage}; restore it from a copy, or export another checkpoint")
    return checkpoint


def _publish(tensors: dict[str, Any], metadata: dict[str, str], destination: Path) -> None:
    try:
        with atomic_path(destination) as unfinished:
            save_file(tensors, unfinished, metadata)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{destination}: cannot be written ({error}); name another file, or make room") from None

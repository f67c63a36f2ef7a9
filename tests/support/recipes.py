"""Small recipes for tests, and reading what their runs wrote."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.checkpoints.manifest import signed

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about every restart of a run


def write_recipe(folder: Path, shards: Path, **changes: Any) -> Path:
    """A chain of three stages of the debug model in `folder`; `changes` replace settings of all stages."""
    settings = {
        "data": {
            "train": str(shards / "train"),
            "validation": str(shards / "validation"),
            "lanes": 4,
            "crop_area": [0.5, 1.0],
            "evaluation_crop": "whole",
            "workers": 1,
        },
        "model": {"name": "coatnet_debug", "drop_path_rate": 0.2},
        "batch": {"global_size": 12, "micro_size": 3},
        "precision": "fp32",
        "log": {"every_steps": 1},
        "evaluation": {"every_steps": 10**6},  # at the end alone: tests that want more say so
        "resources": {"ranks": 2},
    } | changes
    pretrain = {
        "resolution": 32,
        "steps": 40,
        "optimizer": {"peak_learning_rate": 3e-3, "warmup_steps": 4},
        "checkpoint": {"every_steps": 5},
    }
    finetune = {
        "start_from": "pretrain",
        "resolution": 48,
        "steps": 6,
        "optimizer": {"peak_learning_rate": 1e-3, "schedule": "constant"},
    }
    evaluate = {"task": "evaluate", "start_from": "finetune", "resolution": 48}
    recipe = {
        "name": "test",
        "defaults": settings,
        "stages": {"pretrain": pretrain, "finetune": finetune, "evaluate": evaluate},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def curves(run_folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value of all scalars, as TensorBoard shows them across the starts of a run."""
    found = {}
    for folder in filter(Path.is_dir, (run_folder, run_folder / "validation")):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            points = events.Scalars(tag)
            assert [p.step for p in points] == sorted({p.step for p in points}), f"{tag} goes back in time"
            found[tag] = {point.step: point.value for point in points}
    return found


def scalars(run_folder: Path, tag: str) -> dict[int, float]:
    """Step -> value of one of `curves`."""
    return curves(run_folder)[tag]


def events(run_folder: Path) -> list[dict[str, Any]]:
    """The entries of the event log."""
    return [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]


def sign_again(checkpoint: Path, **changes: Any) -> None:
    """Make the manifest match the files of a checkpoint that a test has edited; `changes` replace its entries."""
    manifest = json.loads((checkpoint / "manifest.json").read_text()) | changes
    for name in manifest["files"]:
        data = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(signed(manifest)))


def checkpoint_bytes(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint, its manifest without what and which run wrote it."""
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    manifest = json.loads(files["manifest.json"])
    assert signed(manifest) == manifest
    for key in ("run_id", "computed_with"):
        manifest.pop(key, None)
    return files | {"manifest.json": json.dumps(signed(manifest)).encode()}


def settings_of(section: type[BaseModel]) -> set[str]:
    """Dotted keys of all settings below a section."""
    found = set()
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found |= {f"{name}.{below}" for below in settings_of(nested[0])} if nested else {name}
    return found

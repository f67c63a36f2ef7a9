"""Class names of checkpoints, exported models and names for people, which may have come from somebody else."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from data.classes.display_names import match_display_names
from pipeline.exports.export import export
from pipeline.trained_model import open_trained_model
from tests.fuzzing.campaign import Fuzz, SilentAcceptance, Target
from tests.fuzzing.mutation import damaged_bytes, damaged_json, damaged_tensors
from tests.support.recipes import sign_again
from tests.support.trained import CLASSES, save_trained


def _opened(location: Path) -> None:
    """A model that is accepted has what it says it has."""
    with open_trained_model(str(location)) as trained:
        facts = trained.facts
        for names in (facts.classes, facts.display_names):
            if names is not None and len(names) != facts.arguments["num_classes"]:
                raise SilentAcceptance("another number of names than of classes")
        trained.parameters()
        trained.buffers()


def _exported(folder: Path) -> Path:
    save_trained(folder / "pretrain", 5)
    export(str(folder / "pretrain"), folder / "model")
    export(str(folder / "pretrain"), folder / "model.safetensors")
    return folder


def _config(folder: Path) -> Fuzz:
    path = _exported(folder) / "model" / "config.json"
    seed = json.loads(path.read_bytes())
    seed["display_names"] = list(CLASSES)
    without_digest = seed | {"training": {k: v for k, v in seed["training"].items() if k != "classes_digest"}}

    def read(content: bytes) -> None:
        path.write_bytes(content)
        _opened(path.parent)

    return Fuzz(lambda rng: damaged_json(rng, rng.choice([seed, without_digest])), read)


def _weights(name: str) -> Callable[[Path], Fuzz]:
    def target(folder: Path) -> Fuzz:
        path = _exported(folder) / name
        seed = path.read_bytes()

        def read(content: bytes) -> None:
            path.write_bytes(content)
            _opened(folder / name.partition("/")[0])

        return Fuzz(lambda rng: damaged_tensors(rng, seed), read)

    return target


def _class_names(folder: Path) -> Fuzz:
    """`classes.json` of a checkpoint, whose checksum in the manifest is made to agree."""
    checkpoint = save_trained(folder / "pretrain", 5)
    path = checkpoint / "classes.json"
    seed = json.loads(path.read_bytes())

    def read(content: bytes) -> None:
        path.write_bytes(content)
        sign_again(checkpoint)
        with open_trained_model(str(checkpoint)) as trained:
            if trained.facts.classes != CLASSES:
                raise SilentAcceptance("other classes than the manifest's")

    return Fuzz(lambda rng: damaged_json(rng, seed), read)


def _display_names(folder: Path) -> Fuzz:
    path = folder / "names.txt"
    seed = b"n01 tench, Tinca tinca\nred apple\tApple\n\nn02 goldfish\n"

    def mutate(rng: random.Random) -> bytes:
        return damaged_bytes(rng, seed)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        found = match_display_names(path, ["n01", "red apple"])
        if len(found.names) != 2:
            raise SilentAcceptance("another number of names than of classes")

    return Fuzz(mutate, read)


TARGETS: list[Target] = [
    Target("exported-config", _config),
    Target("exported-folder", _weights("model/model.safetensors")),
    Target("exported-file", _weights("model.safetensors")),
    Target("class-names", _class_names),
    Target("display-names", _display_names),
]

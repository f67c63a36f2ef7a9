"""Reading exported models, which may have come from somebody else."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import create_model, load_pretrained
from pipeline.errors import ConfigError
from pipeline.exports.export import export
from pipeline.trained_model import open_trained_model
from tests.support.trained import CLASSES, PREPROCESSING, assert_same_model, save_trained, trained_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder, and the same as one file beside it."""
    folder = tmp_path_factory.mktemp("exported")
    save_trained(folder / "pretrain", 5, averaged=True)
    export(str(folder / "pretrain"), folder / "model", "raw")
    export(str(folder / "pretrain"), folder / "model.safetensors", "raw")
    return folder


def test_a_model_is_loaded_in_one_line_with_its_classes_and_preprocessing(exported: Path) -> None:
    for name in ("model", "model.safetensors"):
        model = load_pretrained(exported / name)
        assert not model.training
        assert_same_model(model, trained_model(5))
        assert model.facts is not None
        assert (model.facts.classes, model.facts.preprocessing) == (CLASSES, PREPROCESSING)
        assert (model.facts.weights, model.facts.step, model.facts.source.given) == ("raw", 5, str(exported / name))
    assert create_model("coatnet_debug").facts is None


def test_another_image_size_resizes_the_relative_tables(exported: Path) -> None:
    model = load_pretrained(exported / "model", image_size=64)
    with open_trained_model(str(exported / "model")) as trained:
        same = trained.build("cpu", 64)
    images = torch.randn(1, 64, 64, 3)
    assert torch.equal(model(images), same(images))
    with pytest.raises(ValueError, match="image size 33 x 33: each side must be a multiple of 16"):
        load_pretrained(exported / "model", image_size=33)


def test_other_weights_than_were_exported_are_refused(exported: Path) -> None:
    assert open_trained_model(str(exported / "model"), "raw").facts.weights == "raw"
    with pytest.raises(ConfigError, match="model: exported with the raw weights alone; leave --weights out"):
        open_trained_model(str(exported / "model"), "ema")


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(values)


def inside(key: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config[key].update(values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(format="other"), "its config has the format 'other', version 1"),
        (changed(version=2), "its config has the format 'coatnet-model', version 2"),
        (changed(architecture="coatnet_0_224", pretrained_cfg={}), "its config is timm's"),
        (lambda c: c.pop("model"), "its config has no object model"),
        (inside("model", num_classes=4), "classes: must be a list of 4 names"),
        (inside("model", depths=[10**9] * 4), "no model can be made of its arguments .*more blocks than there are"),
        (inside("model", name="resnet50"), "no model can be made of its arguments .unknown model resnet50"),
        (inside("model", device="cuda"), "no model can be made of its arguments"),
        (inside("model", depths=[1, 1, 1, 1]), "blocks.4.* is F32 .* there and absent in the model"),
        (inside("model", image_size=64), "its preprocessing has another image_size than the model"),
        (changed(classes=["a", "b", "c"]), "its classes are not those of its classes_digest"),
        (changed(classes=[1, 2, 3]), "classes: must be a list of 3 names"),
        (changed(display_names=["one"]), "display_names: must be a list of 3 names"),
        (inside("preprocessing", std=[0, 1, 1]), "std: must be three positive numbers"),
        (inside("preprocessing", mean=[10**400, 0, 0]), "mean: must be a list of numbers of at most 1.8e308"),
        (
            inside("preprocessing", crop="left"),
            "its preprocessing has no image_size, no crop of center or whole, or is not bilinear",
        ),
        (changed(loss="hinge"), "its config has no loss of softmax or sigmoid"),
        (inside("training", step="5"), "its config has no step"),
        (inside("training", samples="60"), "samples: must be int, not '60'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], Any], reason: str, exported: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported / "model", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"model.safetensors: {reason}.*; export it again"):
        load_pretrained(folder)
    with pytest.raises(ConfigError, match=reason):
        open_trained_model(str(folder))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "its config is not JSON"),
        (b"[" * 100_000, "its config is nested too deeply"),
        (b"[]", "its config is not a JSON object"),
        (b'"\xff"', "its config is not JSON"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(text: bytes, reason: str, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "model", tmp_path / "model"))
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"config.json: {reason}"):
        load_pretrained(folder)


def test_what_is_no_exported_model_is_refused_and_never_unpickled(exported: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(Attack()))
    torch.save({"a": Attack()}, tmp_path / "torch.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-1])
    os.mkfifo(tmp_path / "pipe.safetensors")
    lacking = Path(shutil.copytree(exported / "model", tmp_path / "lacking"))
    (lacking / "config.json").unlink()
    for name, reason in (
        ("pickle.safetensors", "not a safetensors file, or a damaged one"),
        ("torch.safetensors", "not a safetensors file, or a damaged one"),
        ("cut.safetensors", "not a safetensors file, or a damaged one"),
        ("foreign.safetensors", "a safetensors file without the metadata of an exported model; export it again"),
        ("pipe.safetensors", "not a regular file"),
        ("nowhere.safetensors", "no such file"),
        ("lacking", "config.json: no such file; an exported folder has one"),
    ):
        with pytest.raises((ValueError, OSError), match=f"{tmp_path / name}.*{reason}"):
            load_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=f"{tmp_path / name}.*{reason}"):
            open_trained_model(str(tmp_path / name))
    assert not (tmp_path / "unpickled").exists()


def test_tensors_of_another_type_are_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported / "model", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"head.classifier.bias": torch.zeros(3, dtype=torch.float16)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"head.classifier.bias is F16 \[3\] there and F32 \[3\] in the model"):
        load_pretrained(folder)

"""What a location of a trained model means, and what is known of the model there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.files.digest import json_sha256
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.errors import ConfigError
from pipeline.runs.run_folder import RunFolder
from pipeline.trained_model import open_trained_model
from pipeline.training.images import imagenet_preprocessing, normalized
from tests.pipeline.checkpoints.small import freeze
from tests.support.recipes import sign_again
from tests.support.records import RUN, stage_result
from tests.support.trained import CLASSES, MODEL, PREPROCESSING, assert_same_model, save_trained, trained_model
from tests.support.trees import built, picture, write


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a stage with an averaged checkpoint after 5 steps."""
    folder = tmp_path_factory.mktemp("runs") / "flowers" / "pretrain"
    save_trained(folder, 5, averaged=True)
    return folder


@pytest.mark.parametrize(("which", "taken", "seed"), [("auto", "ema", 6), ("ema", "ema", 6), ("raw", "raw", 5)])
def test_a_checkpoint_is_opened_with_its_facts_and_the_requested_weights(
    run: Path, which: Any, taken: str, seed: int
) -> None:
    checkpoint = str(run / "checkpoints" / "step-00000005")
    with open_trained_model(checkpoint, which) as trained:
        facts = trained.facts
        assert (facts.arguments, facts.classes, facts.display_names) == (MODEL, CLASSES, None)
        assert (facts.preprocessing, facts.loss, facts.weights) == (PREPROCESSING, "softmax", taken)
        assert (facts.step, facts.samples, facts.stage, facts.remarks) == (5, 60, "pretrain", ())
        assert (facts.source.given, facts.source.resolved) == (checkpoint, checkpoint)
        wanted = trained_model(seed)
        assert_same_model(trained.build("cpu"), wanted)
        assert trained.parameters().keys() | trained.buffers().keys() == wanted.state_dict().keys()


def test_run_folders_of_a_stage_and_of_a_run_mean_the_checkpoint_of_the_last_trained_stage(tmp_path: Path) -> None:
    pretrain, finetune = tmp_path / "pretrain", tmp_path / "finetune"
    first = save_trained(pretrain, 5)
    newest = save_trained(pretrain, 6)
    assert open_trained_model(str(tmp_path)).facts.source.resolved == str(newest)
    RunFolder(pretrain).finish(stage_result("pretrain/checkpoints/step-00000005"))
    assert open_trained_model(str(pretrain)).facts.source.resolved == str(first)
    last = save_trained(finetune, 3)
    freeze(finetune, start_from="pretrain")
    assert open_trained_model(str(tmp_path)).facts.source.resolved == str(last)
    freeze(finetune)
    with pytest.raises(ConfigError, match=r"several trained stages \(finetune, pretrain\); give the folder of one"):
        open_trained_model(str(tmp_path))


def test_an_evaluation_stage_names_the_stage_whose_model_it_evaluates(tmp_path: Path) -> None:
    folder = tmp_path / "evaluate"
    folder.mkdir()
    freeze(folder, task="evaluate", start_from="pretrain")
    with pytest.raises(ConfigError, match=f"only evaluates .* give the folder of .*{tmp_path / 'pretrain'}"):
        open_trained_model(str(folder))


def test_what_is_no_trained_model_is_refused_with_what_would_be(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "run" / "pretrain").mkdir(parents=True)
    freeze(tmp_path / "run" / "pretrain")
    for name, reason in (
        ("nowhere", "no such file or folder; give the run folder of a stage, a checkpoint"),
        ("file", "a file, and no safetensors file; give"),
        ("empty", "not a trained model: no run folder, checkpoint or exported model"),
        ("run", "no checkpoint yet; train pretrain until there is one"),
        ("run/pretrain", "no checkpoint yet; train the stage until it has saved one"),
    ):
        with pytest.raises(ConfigError, match=f"{tmp_path / name}: {reason}"):
            open_trained_model(str(tmp_path / name))


def test_another_image_size_resizes_the_relative_tables(run: Path) -> None:
    with open_trained_model(str(run), "raw") as trained:
        larger = trained.build("cpu", image_size=64)
        assert larger.image_size == (64, 64)
        assert larger(torch.zeros(1, 64, 64, 3)).shape == (1, 3)
        with pytest.raises(ConfigError, match="step-00000005: .*33"):
            trained.build("cpu", image_size=33)


def test_a_checkpoint_of_an_earlier_version_says_what_is_not_known_or_assumed(tmp_path: Path) -> None:
    checkpoint = save_trained(tmp_path / "away" / "pretrain", 5, classes=None, preprocessing=None, loss=None)
    stray = checkpoint.rename(tmp_path / "stray")
    facts = open_trained_model(str(stray)).facts
    assert (facts.classes, facts.loss, facts.preprocessing) == (None, "softmax", imagenet_preprocessing(32, "center"))
    assert facts.remarks == (
        "the checkpoint has no class names, as those of earlier versions; they are not known: its shards are not where "
        "they were",
        "the checkpoint does not say its crop and loss; center and softmax are assumed",
    )


def test_a_checkpoint_of_an_earlier_version_has_the_classes_of_its_shards_if_they_are_the_same(tmp_path: Path) -> None:
    files = {f"{name}/{number}.jpg": picture(number) for number, name in enumerate(("cat", "dog", "owl"))}
    (shards,) = built(write(tmp_path / "source", files), tmp_path / "shards").indexes
    run = tmp_path / "pretrain"
    save_trained(
        run,
        5,
        classes=None,
        digests=replace(RUN.digests, classes_digest=json_sha256(["cat", "dog", "owl"])),
        preprocessing=None,
        loss=None,
    )
    data = {"train": str(shards), "validation": str(shards), "evaluation_crop": "whole"}
    freeze(run, data=data, loss={"kind": "sigmoid"})
    facts = open_trained_model(str(run)).facts
    assert (facts.classes, facts.loss) == (("cat", "dog", "owl"), "sigmoid")
    assert facts.preprocessing == imagenet_preprocessing(32, "whole")
    assert [remark.partition("; ")[2] for remark in facts.remarks] == [
        "they were read from its shards", "whole and sigmoid are those of its run folder",
    ]  # fmt: skip
    other = tmp_path / "other"
    save_trained(other, 5, classes=None)
    freeze(other, data=data)
    assert open_trained_model(str(other)).facts.classes is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"classes": ["tench", "shark", "goldfish"]}', "not the classes of the manifest"),
        (b'{"classes": ["tench"]}', "not the classes of the manifest"),
        (b'{"classes": [1, 2, 3]}', r"classes: \[0\]: must be a string, not 1"),
        (b'["tench"]', "must be an object"),
        (b"\x80", "codec can't decode"),
        (b"", "it is empty"),
    ],
)
def test_class_names_that_are_not_those_of_the_manifest_are_refused(
    content: bytes, reason: str, run: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(run / "checkpoints" / "step-00000005", tmp_path / "copy"))
    (checkpoint / "classes.json").write_bytes(content)
    with pytest.raises(ConfigError, match="damaged: classes.json (has|does not have the checksum)"):
        open_trained_model(str(checkpoint))
    sign_again(checkpoint)
    with pytest.raises(ConfigError, match=f"copy: classes.json is damaged .*{reason}.*; restore it from a copy"):
        open_trained_model(str(checkpoint))
    assert open_checkpoint(checkpoint).parameters()  # reading the weights alone needs no names


def test_preprocessing_for_another_image_size_than_the_models_is_refused(run: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(run / "checkpoints" / "step-00000005", tmp_path / "copy"))
    content = json.loads((checkpoint / "manifest.json").read_text())["preprocessing"]
    sign_again(checkpoint, preprocessing=content | {"image_size": 64})
    with pytest.raises(ConfigError, match="preprocessing: has the image size 64, and the model 32"):
        open_trained_model(str(checkpoint))
    sign_again(checkpoint, preprocessing=content | {"std": [0.0, 1.0, 1.0]})
    with pytest.raises(ConfigError, match="preprocessing: std: must be three positive numbers"):
        open_trained_model(str(checkpoint))


def test_the_recorded_mean_and_deviation_normalize_as_training_does(run: Path) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3).contiguous().numpy()
    facts = open_trained_model(str(run)).facts.preprocessing
    cpu = torch.device("cpu")
    mean, std = torch.tensor((123.675, 116.28, 103.53)), torch.tensor((58.395, 57.12, 57.375))
    recorded = normalized(pixels, cpu, torch.float32, facts.mean, facts.std)
    assert torch.equal(recorded, normalized(pixels, cpu, torch.float32))
    assert torch.equal(recorded, (torch.from_numpy(pixels).float() - mean) / std)

"""The files of a run folder as records: what is written is read back, and damage is reported with the fix."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoints.listing import checkpointed_stage
from pipeline.errors import ConfigError
from pipeline.plan import plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder, final_checkpoint, run_folder
from pipeline.runs.stage_result import ClassAccuracy
from tests.pipeline.checkpoints.small import STAGE, freeze
from tests.support.recipes import write_recipe
from tests.support.records import stage_result


def test_a_result_is_read_back_as_it_was_published(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.result() is None
    classes = {"cat": ClassAccuracy(3, 0.5, 1.0), "dog": ClassAccuracy(0, None, None)}
    for samples, speed in ((480, 12.5), (None, None)):
        result = replace(stage_result("a/b"), samples=samples, images_per_second=speed, classes=classes)
        folder.finish(result)
        assert folder.result() == result
    assert len(folder.events.of(Event.FINISH)) == 2
    content = json.loads((tmp_path / "result.json").read_text())
    assert list(content) == [
        "stage", "steps", "images_per_second", "checkpoint", "weights", "validation", "classes"
    ]  # fmt: skip
    assert content["images_per_second"] is None
    assert content["classes"]["cat"] == {"samples": 3, "top1": 0.5, "top5": 1.0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "it is empty"),
        (b'{"stage": "pretrain", "steps": 4', "Expecting"),
        (b"\xff", "can't decode"),
        (b"[]", r"must be an object, not \[\]"),
        (b'{"stage": "pretrain"}', "steps is missing"),
        (b'{"stage": "pretrain", "steps": "40"}', "steps: must be an integer, not '40'"),
        (
            b'{"stage": "a", "steps": 1, "images_per_second": 1, "checkpoint": null}',
            "checkpoint: must be a string, not N",
        ),
    ],
)
def test_a_damaged_result_is_reported_with_the_fix(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "result.json").write_bytes(text)
    with pytest.raises(
        ConfigError, match=rf"result\.json: damaged \(.*{reason}.*\); restore it from a copy, or remove"
    ):
        RunFolder(tmp_path).result()


def test_a_result_of_unknown_weights_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path).finish(stage_result("a/b"))
    path = tmp_path / "result.json"
    path.write_text(path.read_text().replace('"raw"', '"best"'))
    with pytest.raises(ConfigError, match="weights: must be 'raw' or 'ema', not 'best'"):
        RunFolder(tmp_path).result()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "empty or cut short"),
        (b"{task: train, seed", "while parsing"),
        (b"\xff\xff", "not a text file in UTF-8"),
        (b"[1, 2]", "not a mapping"),
        (b"{task: train, seed: 0}", "stage is missing"),
        (b"{stage: a, task: train, seed: x, index_digests: {}, start_digest: null}", "seed: must be an integer"),
        (b"{stage: a, task: train, seed: 0, index_digests: 7, start_digest: null}", "index_digests: must be an object"),
        (
            b"{stage: a, task: sleep, seed: 0, index_digests: {}, start_digest: null}",
            "task: must be 'train' or 'evaluate'",
        ),
    ],
)
def test_a_damaged_frozen_recipe_is_reported_with_the_fix(
    shards: Path, tmp_path: Path, text: bytes, reason: str
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards))
    folder = run_folder(recipe, "pretrain")
    folder.create()
    folder.recipe.write_bytes(text)
    message = rf"pretrain/recipe\.yaml: damaged \(.*{reason}.*\); restore it from a copy, or remove the run folder"
    with pytest.raises(ConfigError, match=message):
        folder.frozen()
    with pytest.raises(ConfigError, match=message):
        folder.check(plan_stage(recipe, "pretrain"), None)
    with pytest.raises(ConfigError, match=message):
        checkpointed_stage(folder)


def test_settings_that_are_not_those_of_a_stage_are_reported_with_the_fix(tmp_path: Path) -> None:
    freeze(tmp_path, checkpoint={"keep_last": "two"})
    with pytest.raises(
        ConfigError, match=r"recipe\.yaml: damaged \(.*checkpoint\.keep_last.*\); restore it from a copy"
    ):
        checkpointed_stage(RunFolder(tmp_path))


def test_a_recipe_of_a_chain_is_not_taken_for_a_frozen_stage(shards: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, shards)
    folder = RunFolder(tmp_path)
    assert folder.frozen() is None
    assert checkpointed_stage(folder) is None
    with pytest.raises(ConfigError, match="not the record of a stage"):
        folder.check(plan_stage(load_recipe(path), "pretrain"), None)


def test_a_frozen_stage_has_its_settings_and_digests(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "pretrain")
    folder.create()
    assert folder.frozen() is None
    freeze(folder.path)
    frozen = folder.frozen()
    assert frozen is not None
    assert (frozen.stage, frozen.seed, frozen.task, frozen.start_digest) == ("pretrain", 0, "train", None)
    assert frozen.index_digests == {"train": "t"}
    assert frozen.settings == STAGE


def test_what_a_start_freezes_is_a_whole_stage(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards))
    for name in ("pretrain", "evaluate"):
        folder = run_folder(recipe, name)
        folder.create()
        folder.freeze(plan_stage(recipe, name), None)
        frozen = folder.frozen()
        assert frozen is not None
        assert type(recipe.stages[name]).model_validate(frozen.settings) == recipe.stages[name]


def test_a_stage_that_is_not_done_has_no_final_checkpoint(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards))
    folder = run_folder(recipe, "pretrain")
    folder.create()
    with pytest.raises(ConfigError, match="stage pretrain is not done .*has no result.json.*; run it first"):
        final_checkpoint(recipe, "pretrain")
    folder.finish(stage_result("pretrain/checkpoints/step-00000040"))
    assert final_checkpoint(recipe, "pretrain") == str(folder.checkpoints / "step-00000040")

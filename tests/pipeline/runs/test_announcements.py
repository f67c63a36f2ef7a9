"""What a start says of its classes, its evaluations and its saves."""

from pathlib import Path
from typing import Any

import pytest

from data.files.digest import json_sha256
from pipeline.checkpoints.manifest import RunDigests, RunFacts
from pipeline.plan import plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.runs.announcements import StartingWeights, announcements, class_list, classifier_announcement
from pipeline.runs.stage_result import ClassAccuracy, StageResult
from tests.support.recipes import write_recipe
from tests.support.records import stage_result

CLASSES = ("bright", "dark", "striped")


def name_of(*classes: str) -> str:
    return f"class list {json_sha256(classes)[:8]}"


def earlier(*classes: str) -> tuple[RunFacts, StageResult]:
    """A stage that was trained for these classes."""
    facts = RunFacts(
        "first",
        "fp32",
        {"name": "a", "num_classes": len(classes), "image_size": 32},
        RunDigests("r", "i", json_sha256(classes)),
    )
    result = stage_result("first/checkpoints/step-00000001", "first")
    table = {name: ClassAccuracy(1, 1.0, 1.0) for name in classes}
    return facts, StageResult(**{**{key: getattr(result, key) for key in StageResult.__slots__}, "classes": table})


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (CLASSES, "3 classes, bright to striped"),
        (("one",), "1 class, one"),
        (tuple("ab" * 600), "1,200 classes, a to b"),
    ],
)
def test_a_class_list_has_its_size_its_ends_and_a_name_of_its_own(classes: tuple[str, ...], text: str) -> None:
    assert class_list(classes) == f"{text} ({name_of(*classes)})"
    assert class_list(classes[::-1]) != class_list(classes) or len(classes) == 1


def test_a_start_says_what_it_trains_and_evaluates_on(shards: Path, tmp_path: Path) -> None:
    def said(stage: str, *overrides: str) -> list[str]:
        return announcements(plan_stage(load_recipe(write_recipe(tmp_path, shards), list(overrides)), stage))

    classes = f"3 classes, bright to striped ({name_of(*CLASSES)})"
    assert said("pretrain") == [
        f"trains on 45 and evaluates on 15 samples of {classes}",
        "takes 40 steps, evaluates at the end, and saves after every 5 steps",
        "evaluations see whole images, resized to 32 x 32 pixels",
    ]
    assert said("pretrain", "evaluation.every_steps=null")[1] == (
        "takes 40 steps, evaluates after every 5 steps and at the end, and saves after every 5 steps"
    )
    assert said("pretrain", "pretrain.steps=7", "evaluation.every_steps=null", "pretrain.checkpoint.every_steps=90")[
        1
    ] == ("takes 7 steps, evaluates after every step and at the end, and saves at the end")
    assert said("evaluate", "data.evaluation_crop=center") == [
        f"evaluates on 15 samples of {classes}",
        "evaluations see the central 36% of a square picture and less of others, so 64% or more is cut away",
    ]


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (CLASSES, f"starts with the classifier of stage first: the same classes ({name_of(*CLASSES)})"),
        (
            ("Bright", "dark", "striped"),
            "starts with a new classifier, because stage first was trained for other classes "
            f"(3, {name_of('Bright', 'dark', 'striped')}; class 0 was Bright and is bright)",
        ),
        (
            ("bright", "striped", "dark"),
            "starts with a new classifier, because stage first was trained for other classes "
            f"(3, {name_of('bright', 'striped', 'dark')}; class 1 was striped and is dark)",
        ),
        (
            ("bright", "dark"),
            f"starts with a new classifier, because stage first was trained for other classes (2, {name_of('bright', 'dark')})",
        ),
    ],
)
def test_names_and_their_order_decide_whether_a_classifier_is_kept(
    shards: Path, tmp_path: Path, before: tuple[str, ...], said: str
) -> None:
    plan = plan_stage(load_recipe(write_recipe(tmp_path, shards)), "finetune")
    assert classifier_announcement(plan, *earlier(*before)) == said


def test_a_start_says_what_it_takes_from_an_earlier_stage_and_what_begins_anew(shards: Path, tmp_path: Path) -> None:
    facts, result = earlier("Bright", "dark", "striped")
    recipe = load_recipe(write_recipe(tmp_path, shards), ["precision=bf16", "zero_stage=1"])
    weights = StartingWeights("first/checkpoints/step-00000001", 1, "ema", facts, {"3 x 3 to 5 x 5": 2})
    new = classifier_announcement(plan_stage(recipe, "finetune"), facts, result)
    assert "class 0 was Bright and is bright" in new
    tables = "relative position tables are resized for 48 pixels: 2 from 3 x 3 to 5 x 5"
    assert weights.announcements(plan_stage(recipe, "finetune"), result) == [
        "starts from the moving average of the weights in first/checkpoints/step-00000001, with new optimizer state",
        new,
        tables,
        "precision: fp32 in stage first, now bf16",
    ]
    assert weights.facts(plan_stage(recipe, "finetune"), result) == {
        "step": 0, "checkpoint": "first/checkpoints/step-00000001", "weights": "ema", "classifier": "new", "reason": new,
        "resized": {"3 x 3 to 5 x 5": 2}, "precision": ["fp32", "bf16"],
    }  # fmt: skip
    assert weights.announcements(plan_stage(recipe, "evaluate"), result)[:2] == [
        "evaluates the moving average of the weights in first/checkpoints/step-00000001",
        tables,
    ]


def test_classes_that_are_only_numbered_may_mean_anything(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("rename: {bright: '0', dark: '1', striped: '2'}\n")
    maps = ["data.label_map=map.yaml", "data.validation_label_map=map.yaml"]
    plan: Any = plan_stage(load_recipe(write_recipe(tmp_path, shards), maps), "finetune")
    assert classifier_announcement(plan, *earlier("0", "1", "2")).endswith(
        "they are only numbered, so whether they mean the same is for you to know"
    )

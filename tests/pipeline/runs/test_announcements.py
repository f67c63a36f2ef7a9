"""What a start says of its classes, its evaluations and its saves."""

from pathlib import Path

import pytest
import torch

from data.files.digest import json_sha256
from pipeline.plan import TrainPlan, plan_stage
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.loader import load_recipe
from pipeline.runs.announcements import (
    EarlierClasses,
    StartingWeights,
    TableRow,
    announcements,
    banner,
    class_list,
    classifier_announcement,
)
from pipeline.runs.continuation import computed_with
from pipeline.runs.run_folder import run_folder
from tests.support.recipes import write_recipe

CLASSES = ("bright", "dark", "striped")


def name_of(*classes: str) -> str:
    return f"class list {json_sha256(classes)[:8]}"


def earlier(*classes: str) -> EarlierClasses:
    """What is known of the classes of a stage that was trained for these."""
    return EarlierClasses(len(classes), classes, json_sha256(classes))


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
def test_names_and_their_order_decide_whether_a_classifier_is_kept(before: tuple[str, ...], said: str) -> None:
    assert classifier_announcement(CLASSES, "stage first", earlier(*before)) == (before == CLASSES, said)


def test_without_names_their_number_decides_and_the_doubt_is_said() -> None:
    keeps, said = classifier_announcement(CLASSES, "the file", EarlierClasses(3, None, None))
    assert (keeps, said) == (
        True,
        "starts with the classifier of the file: 3 classes as here, without their names, so whether they mean the same is "
        "for you to know",
    )
    assert classifier_announcement(CLASSES, "the file", EarlierClasses(4, None, None)) == (
        False,
        "starts with a new classifier, because the file was trained for other classes (4)",
    )
    assert classifier_announcement(CLASSES, "the file", EarlierClasses(0, None, None)) == (
        False,
        "starts with a new classifier, because the file has none",
    )


def test_a_start_says_what_it_takes_from_an_earlier_stage_and_what_begins_anew(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards), ["precision=bf16", "zero_stage=1"])
    table = (
        TableRow("taken", 1234, "1,234 parameters"),
        TableRow("begun anew", 2, "head.classifier.weight, head.classifier.bias"),
    )
    weights = StartingWeights(
        "first/checkpoints/step-00000001", "stage first", 1, "ema", False, "new, because", table, {"3 x 3 to 5 x 5": 2},
        "fp32", ("taken for granted",),
    )  # fmt: skip
    rows = [
        "weights taken       1,234  1,234 parameters",
        "weights begun anew      2  head.classifier.weight, head.classifier.bias",
    ]
    assert weights.announcements(plan_stage(recipe, "finetune")) == [
        "starts from the moving average of the weights in first/checkpoints/step-00000001, with new optimizer state",
        "new, because",
        *rows,
        "precision: fp32 in stage first, now bf16",
        "warning: taken for granted",
    ]
    assert weights.facts(plan_stage(recipe, "finetune")) == {
        "step": 0, "checkpoint": "first/checkpoints/step-00000001", "origin": "stage first", "weights": "ema",
        "classifier": "new", "reason": "new, because", "resized": {"3 x 3 to 5 x 5": 2},
        "table": [
            {"what": "taken", "tensors": 1234, "which": "1,234 parameters"},
            {"what": "begun anew", "tensors": 2, "which": "head.classifier.weight, head.classifier.bias"},
        ],
        "precision": ["fp32", "bf16"], "remarks": ["taken for granted"],
    }  # fmt: skip
    assert weights.announcements(plan_stage(recipe, "evaluate"))[:3] == [
        "evaluates the moving average of the weights in first/checkpoints/step-00000001",
        *rows,
    ]


def test_classes_that_are_only_numbered_may_mean_anything() -> None:
    keeps, said = classifier_announcement(("0", "1", "2"), "stage first", earlier("0", "1", "2"))
    assert keeps
    assert said.endswith("they are only numbered, so whether they mean the same is for you to know")


@pytest.mark.parametrize(
    ("deterministic", "promise"),
    [
        (
            True,
            "deterministic: true, equal bits on the same kind and number of machines; other nodes may reorder NCCL's sums",
        ),
        (False, "deterministic: false, the bits of two runs may differ, since GPUs add in any order"),
    ],
)
def test_a_start_on_gpus_says_what_its_results_promise(
    deterministic: bool, promise: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no GPU here: its name is faked."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    recipe = load_recipe(write_recipe(tmp_path, shards), [f"deterministic={str(deterministic).lower()}"])
    plan, folder = plan_stage(recipe, "pretrain"), run_folder(recipe, "pretrain")
    assert isinstance(plan, TrainPlan)
    on_gpus, on_cpus = Ranks(0, 2, torch.device("cuda", 0)), Ranks(0, 2, torch.device("cpu"))
    assert promise in banner(plan, on_gpus, folder)
    assert not [line for line in banner(plan, on_cpus, folder) if "deterministic" in line]
    assert computed_with(plan, on_gpus)["deterministic"] == str(deterministic).lower()
    assert "deterministic" not in computed_with(plan, on_cpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert computed_with(plan, on_gpus)["ranks per node"] == "1"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert computed_with(plan, on_gpus)["ranks per node"] == "2"
    assert "ranks per node" not in computed_with(plan, on_cpus)

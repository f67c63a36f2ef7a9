"""The paper's recipes: each number as in Table 10; our own settings fit nodes of 8 GPUs with 80 GB."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recipes
from jobs.bundled_recipes import bundled_recipes
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from tests.support.paths import ROOT

PATHS = {name: path for name, path in bundled_recipes().items() if name.startswith("coatnet-")}


@dataclass(frozen=True)
class Row:
    """What differs between the models of a column; pairs are of pretraining and fine-tuning."""

    model: str
    column: str
    stochastic_depth: tuple[float, float]
    random_augment: tuple[tuple[int, int] | None, tuple[int, int] | None]
    epochs: float
    peak_learning_rate: float
    sizes: tuple[int, ...] = (224, 384, 512)


NONE, WEAK, STRONG = None, (2, 5), (2, 15)
TABLE_10 = {
    "coatnet-0-in1k": Row("coatnet_0", "1K", (0.2, 0.2), (STRONG, STRONG), 300, 1e-3, (224, 384)),
    "coatnet-1-in1k": Row("coatnet_1", "1K", (0.3, 0.3), (STRONG, STRONG), 300, 1e-3, (224, 384)),
    "coatnet-2-in1k": Row("coatnet_2", "1K", (0.5, 0.5), (STRONG, STRONG), 300, 1e-3),
    "coatnet-3-in1k": Row("coatnet_3", "1K", (0.7, 0.7), (STRONG, (2, 20)), 300, 1e-3),
    "coatnet-2-in21k": Row("coatnet_2", "21K", (0.3, 0.3), (NONE, NONE), 90, 1e-3),
    "coatnet-3-in21k": Row("coatnet_3", "21K", (0.5, 0.5), (NONE, NONE), 90, 1e-3),
    "coatnet-4-in21k": Row("coatnet_4", "21K", (0.7, 0.7), (NONE, NONE), 90, 1e-3),
    "coatnet-4-in21k-pt-ra": Row("coatnet_4", "21K", (0.7, 0.7), (WEAK, WEAK), 90, 1e-3),
    "coatnet-4-in21k-pt-ra-e150": Row("coatnet_4", "21K", (0.7, 0.7), (WEAK, WEAK), 150, 1e-3),
    "coatnet-3-jft": Row("coatnet_3_dw", "JFT", (0.0, 0.1), (WEAK, WEAK), 14, 1e-3),
    "coatnet-4-jft": Row("coatnet_4", "JFT", (0.1, 0.3), (WEAK, WEAK), 14, 5e-4),
    "coatnet-5-jft": Row("coatnet_5", "JFT", (0.0, 0.2), (WEAK, WEAK), 14, 5e-4),
}
# Ours: CoAtNet-5's JFT column, with the epochs of ImageNet-21K, and with as many images of JFT-3B.
OURS = {
    **{f"coatnet-{n}-in21k": Row(f"coatnet_{n}", "JFT", (0.0, 0.2), (WEAK, WEAK), 90, 5e-4) for n in (5, 6, 7)},
    **{f"coatnet-{n}-jft3b": Row(f"coatnet_{n}", "JFT", (0.0, 0.2), (WEAK, WEAK), 1.4, 5e-4) for n in (6, 7)},
}

PRETRAINING: dict[str, dict[str, Any]] = {
    "1K": {
        "mixup": 0.8, "loss": "softmax", "smoothing": 0.1, "batch": 4096, "minimum": 1e-5, "warmup_steps": 10_000,
        "warmup_epochs": None, "schedule": "cosine", "weight_decay": 0.05, "ema": None,
    },
    "21K": {
        "mixup": 0.0, "loss": "sigmoid", "smoothing": 1e-4, "batch": 4096, "minimum": 1e-5, "warmup_steps": None,
        "warmup_epochs": 5, "schedule": "linear", "weight_decay": 0.01, "ema": None,
    },
    "JFT": {
        "mixup": 0.0, "loss": "sigmoid", "smoothing": 1e-4, "batch": 4096, "minimum": 1e-5, "warmup_steps": 20_000,
        "warmup_epochs": None, "schedule": "linear", "weight_decay": 0.01, "ema": None,
    },
}  # fmt: skip
FINE_TUNING: dict[str, dict[str, Any]] = {
    column: {
        "mixup": 0.8 if column == "1K" else 0.0, "loss": "softmax", "smoothing": 0.1, "batch": batch, "minimum": 5e-5,
        "warmup_steps": None, "warmup_epochs": None, "schedule": "constant", "weight_decay": 1e-8, "ema": 0.9999,
    }
    for column, batch in (("1K", 512), ("21K", 1024), ("JFT", 512))
}  # fmt: skip


def column_of(stage: TrainStage) -> dict[str, Any]:
    """The stage's settings as the columns above have them."""
    optimizer = stage.optimizer
    return {
        "mixup": stage.mixup_alpha, "loss": stage.loss.kind, "smoothing": stage.loss.label_smoothing,
        "batch": stage.batch.global_size, "minimum": optimizer.minimum_learning_rate,
        "warmup_steps": optimizer.warmup_steps, "warmup_epochs": optimizer.warmup_epochs,
        "schedule": optimizer.schedule, "weight_decay": optimizer.weight_decay, "ema": stage.ema_decay,
    }  # fmt: skip


def augmentation(stage: TrainStage) -> tuple[int, float] | None:
    chosen = stage.data.random_augment
    assert chosen is None or chosen.operations == "efficientnet"
    return (chosen.layers, chosen.magnitude) if chosen else None


def stages(path: Path) -> dict[str, TrainStage]:
    found = load_recipe(path).stages
    assert all(isinstance(stage, TrainStage) for stage in found.values())
    return found  # type: ignore[return-value]


def test_every_column_and_every_model_that_the_paper_names_has_its_recipe() -> None:
    assert PATHS.keys() == TABLE_10.keys() | OURS.keys()


@pytest.mark.parametrize(("name", "row"), (TABLE_10 | OURS).items())
def test_pretraining_is_that_of_the_paper(name: str, row: Row) -> None:
    stage = stages(PATHS[name])["pretrain"]
    assert column_of(stage) == PRETRAINING[row.column]
    assert (stage.model.name, stage.model.options, stage.resolution) == (row.model, {}, 224)
    assert (stage.epochs, stage.optimizer.peak_learning_rate) == (row.epochs, row.peak_learning_rate)
    assert (stage.model.drop_path_rate, augmentation(stage)) == (row.stochastic_depth[0], row.random_augment[0])
    assert (stage.data.crop, stage.data.evaluation_crop) == ("distorted_bounding_box", "center")
    assert stage.optimizer.gradient_clip == 1.0


@pytest.mark.parametrize(("name", "row"), (TABLE_10 | OURS).items())
def test_fine_tuning_is_that_of_the_paper_at_each_size_and_from_pretraining(name: str, row: Row) -> None:
    _, *finetunes = stages(PATHS[name]).items()
    assert [key for key, _ in finetunes] == [f"finetune_{size}" for size in row.sizes]
    for (_, stage), size in zip(finetunes, row.sizes, strict=True):
        assert column_of(stage) == FINE_TUNING[row.column]
        assert (stage.start_from, stage.model.name, stage.resolution) == ("pretrain", row.model, size)
        assert (stage.epochs, stage.optimizer.peak_learning_rate) == (30, 5e-5)
        assert (stage.model.drop_path_rate, augmentation(stage)) == (row.stochastic_depth[1], row.random_augment[1])
        assert (stage.data.crop, stage.data.evaluation_crop) == ("whole", "whole")
        assert stage.optimizer.gradient_clip == 1.0


@pytest.mark.parametrize("name", PATHS)
def test_what_comes_from_the_authors_code_base_is_marked(name: str) -> None:
    for line in PATHS[name].read_text().splitlines():
        if "efficientnet" in line or "distorted_bounding_box" in line:
            assert "the authors' code base" in line.split("#")[1]


@pytest.mark.parametrize("name", PATHS)
def test_each_stage_has_the_shards_of_its_data(name: str) -> None:
    pretraining = name.split("-")[2]
    for key, stage in stages(PATHS[name]).items():
        folder = PATHS[name].parent / "shards" / (pretraining if key == "pretrain" else "in1k")
        assert (stage.data.train, stage.data.validation) == (str(folder / "train"), str(folder / "validation"))


@pytest.mark.parametrize("name", [*OURS, "coatnet-0-in1k"])
def test_a_recipe_marks_what_is_not_from_the_paper(name: str) -> None:
    text = PATHS[name].read_text()
    assert ("the choice is ours" in " ".join(text.replace("#", "").split()).lower()) == (name in OURS)
    ours = [line.split(":")[0].strip() for line in text.splitlines() if "# ours" in line]
    assert {"workers", "precision", "activation_checkpointing", "micro_size", "checkpoint"} <= set(ours)


COMPUTED = "coatnet-7-in21k"
"""Of the others only what the document has is looked at, as computing all of them takes minutes."""


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], dict[str, str]]:
    """The rows of the table in the document, by recipe and stage."""
    lines = (ROOT / "docs" / "recipes.md").read_text().splitlines()
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    headings = next(row for row in rows if row[:2] == ["recipe", "stage"])
    found, recipe = {}, ""
    for row in rows[rows.index(headings) + 2 :]:
        recipe = row[0] or recipe
        found[recipe, row[1]] = dict(zip(headings, row, strict=True))
    return found


def test_the_document_has_every_stage_of_every_recipe(table: dict[tuple[str, str], dict[str, str]]) -> None:
    assert list(table) == [(name, stage) for name in PATHS for stage in stages(PATHS[name])]


@pytest.mark.slow(seconds=8)
def test_the_document_has_the_table_as_computed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["recipes", "--recipe", COMPUTED])
    recipes.main()
    heading, line, *rows = capsys.readouterr().out.splitlines()
    document = (ROOT / "docs" / "recipes.md").read_text()
    assert f"{heading}\n{line}\n" in document
    assert "\n".join(rows) in document


@pytest.mark.parametrize("name", PATHS)
def test_stages_fit_on_nodes_of_eight_gpus_with_80_gb(name: str, table: dict[tuple[str, str], dict[str, str]]) -> None:
    for stage, settings in stages(PATHS[name]).items():
        resources = settings.resources
        assert resources.ranks == 8 * resources.nodes
        assert settings.batch.micro_batches % resources.ranks == 0
        assert float(table[name, stage]["GB of a GPU"]) < 80
        assert resources.time_limit is None


@pytest.mark.parametrize("name", PATHS)
def test_checkpoints_are_saved_every_15_to_30_minutes_and_about_ten_per_stage_are_kept(
    name: str, table: dict[tuple[str, str], dict[str, str]]
) -> None:
    for stage, settings in stages(PATHS[name]).items():
        checkpoint, evaluation, row = settings.checkpoint, settings.evaluation, table[name, stage]
        interval, _, minutes = row["saved every"].partition(" = ")
        assert checkpoint.interval == int(interval.replace(",", ""))
        steps = int(row["steps"].replace(",", ""))
        # A stage of less than two hours and a half saves ten times all the same.
        assert float(minutes.removesuffix(" min")) <= 30
        assert float(minutes.removesuffix(" min")) >= 15 or 9 <= steps / checkpoint.interval <= 12
        assert checkpoint.keep_last == 3
        assert checkpoint.keep_every is not None
        assert checkpoint.keep_every % checkpoint.interval == 0
        assert 8 <= steps / checkpoint.keep_every <= 12
        # The best can only be kept where there is a checkpoint at its step.
        assert evaluation.every_steps == checkpoint.every_steps
        assert checkpoint.keep_best == (0 if stage == "pretrain" else 1)


def test_steps_are_those_of_the_papers_data(table: dict[tuple[str, str], dict[str, str]]) -> None:
    assert table["coatnet-0-in1k", "pretrain"]["steps"] == "93,836"
    assert table["coatnet-0-in1k", "finetune_224"]["steps"] == "75,069"
    assert table["coatnet-2-in21k", "pretrain"]["steps"] == "279,499"
    assert table["coatnet-2-in21k", "finetune_384"]["steps"] == "37,535"


def test_training_sees_as_many_images_of_jft_3b_as_of_jft_300m() -> None:
    for name in ("coatnet-6-jft3b", "coatnet-7-jft3b"):
        assert stages(PATHS[name])["pretrain"].epochs == pytest.approx(14 * 300e6 / 3e9)

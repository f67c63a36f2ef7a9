"""Evaluations of trained models on shards: figures against independent computations, ranks, classes, and what is said."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.building.build import build_shards
from data.dataset import open_dataset
from data.errors import DataError
from data.files.digest import json_sha256
from data.images.augment import EvaluationTransform
from data.images.decode import decode
from data.remote.storage import Storage
from data.sample_reader import SampleReader
from models.pretrained import config_of
from pipeline.errors import ConfigError
from pipeline.evaluation.average_precision import LIMIT, bins_of
from pipeline.evaluation.model_evaluation import EvaluationRequest, Progress, evaluate_model, known_stage, remarks
from pipeline.recipe.data_sections import DataSettings
from pipeline.runs.evaluation_report import EvaluationReport, read_report
from pipeline.trained_model import open_trained_model
from pipeline.training.images import normalized
from tests.conftest import CLASSES, with_broken_member
from tests.pipeline.checkpoints.small import ALONE, together
from tests.pipeline.evaluation.test_average_precision import average_precision
from tests.support.records import RUN
from tests.support.trained import MODEL, save_trained

Evaluate = Callable[..., EvaluationReport]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a stage that was trained for the classes of `shards`, with an average."""
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    save_trained(folder, 5, averaged=True, classes=CLASSES)
    return folder


@pytest.fixture(scope="module")
def several_labels(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose samples have up to two of four labels."""
    folder = tmp_path_factory.mktemp("several")
    files = sorted(pictures.rglob("*.jpg"))
    lines = [f"{file},{file.parent.name}{',picture' if number % 2 else ''}" for number, file in enumerate(files)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    build_shards(folder / "list.csv", folder / "shards", samples_per_shard=25)
    return folder / "shards"


def request(model: Path, shards: Path, out: Path, **changes: Any) -> EvaluationRequest:
    data = DataSettings(validation=str(shards), workers=1, skipped_share=1.0)
    data = data.model_copy(update={"validation_label_map": changes.pop("label_map", None)})
    plain = EvaluationRequest(
        model=str(model),
        weights="auto",
        data=data,
        crop=None,
        image_size=None,
        batch_size=4,
        precision=None,
        mistakes=5,
        folder=out,
        overwrite=False,
    )
    return replace(plain, **changes)


def evaluated(*arguments: Any, said: list[str] | None = None, ranks: int = 1, **changes: Any) -> EvaluationReport:
    """The report of a request on threads as ranks."""
    lines = [] if said is None else said
    progress = Progress(lines.append, lambda total: None, lambda count: None)
    asked = request(*arguments, **changes)
    found = together(ranks, lambda rank: evaluate_model(asked, None, rank, progress)) if ranks > 1 else [
        evaluate_model(asked, None, ALONE, progress)
    ]  # fmt: skip
    assert found[1:] == [None] * (ranks - 1)
    assert found[0] is not None
    return found[0]


def logits_and_labels(
    model: Path, shards: Path, size: int = 32, crop: Any = "whole"
) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Of all samples, computed one by one."""
    dataset = open_dataset(str(shards), Storage())
    reader = SampleReader(dataset, None)
    network = open_trained_model(str(model)).build("cpu", size)
    rows, labels = [], []
    for shard, samples in enumerate(dataset.shard_samples.tolist()):
        for number in range(samples):
            sample = reader.read(shard, number)
            pixels = EvaluationTransform(size, crop)(decode(sample.image))
            with torch.no_grad():
                rows.append(network(normalized(pixels[None], torch.device("cpu"), torch.float32))[0])
            labels.append(sample.labels)
    return torch.stack(rows), labels


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_figures_are_those_of_logits_computed_one_by_one(run: Path, shards: Path, tmp_path: Path) -> None:
    report = evaluated(run, shards / "validation", tmp_path / "out")
    logits, labels = logits_and_labels(run, shards / "validation")
    true = torch.tensor([label for (label,) in labels])
    predicted = logits.argmax(dim=1)
    figures = report.figures
    assert figures.samples == 15
    assert figures.top1 == (predicted == true).double().mean().item()
    assert figures.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, true).item(), rel=1e-5)
    matrix = np.zeros((3, 3), np.int64)
    np.add.at(matrix, (true.numpy(), predicted.numpy()), 1)
    confusion = {(row["true"], row["predicted"]): int(row["count"]) for row in rows_of(tmp_path / "out/confusion.csv")}
    assert confusion == {(CLASSES[i], CLASSES[j]): matrix[i, j] for i, j in zip(*np.nonzero(matrix), strict=True)}
    table = rows_of(tmp_path / "out/classes.csv")
    assert [int(row["samples"]) for row in table] == [5, 5, 5]
    assert [int(row["predicted"]) for row in table] == matrix.sum(axis=0).tolist()
    assert [row["top1"] for row in table] == [str(float(matrix[i, i] / 5)) for i in range(3)]
    worst = max((matrix[i, j], CLASSES[i], CLASSES[j]) for i in range(3) for j in range(3) if i != j)
    assert report.confused[0].samples == worst[0]
    scores = logits.softmax(dim=1).max(dim=1).values[predicted != true].sort(descending=True).values
    assert [one.score for one in report.mistakes] == pytest.approx(scores[:5].tolist(), rel=1e-4)
    assert all(one.labels[0] == one.key.split("/")[0] != one.predicted for one in report.mistakes)
    assert rows_of(tmp_path / "out/mistakes.csv")[0]["key"] == report.mistakes[0].key


def test_the_report_is_read_as_it_was_written_and_names_its_files(run: Path, shards: Path, tmp_path: Path) -> None:
    report = evaluated(run, shards / "validation", tmp_path)
    assert read_report(tmp_path) == report
    assert {*report.files.values(), "evaluation.json", "tensorboard"} == {path.name for path in tmp_path.iterdir()}
    assert report.model.location == str(run / "checkpoints/step-00000005")
    assert (report.model.weights, report.model.step, report.data.classes_without_samples) == ("ema", 5, 0)
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 150


def test_tensorboard_has_the_figures_on_the_curves_of_the_stages_and_the_pictures(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    report = evaluated(run, shards / "validation", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "validation/top1", "validation/top5", "validation/loss", "validation/calibration_error",
    }  # fmt: skip
    (point,) = events.Scalars("validation/loss")
    assert (point.step, point.value) == (5, np.float32(report.figures.loss))
    assert set(events.Tags()["images"]) == {"evaluation/confusion", "evaluation/mistakes"}
    text = events.Tensors("evaluation")[0].tensor_proto.string_val[0].decode()
    assert f"{report.figures.top1:.2%}" in text


def test_a_report_does_not_depend_on_the_number_of_ranks(run: Path, shards: Path, tmp_path: Path) -> None:
    broken = with_broken_member(shards, tmp_path / "shards", 3)
    one, three = (evaluated(run, broken, tmp_path / str(ranks), ranks=ranks) for ranks in (1, 3))
    assert (one.figures.samples, one.figures.skipped) == (44, 1)
    assert one.unusable[0].reason == "damaged: Truncated File Read"
    assert replace(three, circumstances=one.circumstances) == one
    assert three.circumstances.ranks == 3
    for name in one.files.values():
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert rows_of(tmp_path / "1/unusable.csv") == [
        {"shard": one.unusable[0].shard, "key": one.unusable[0].key, "reason": one.unusable[0].reason}
    ]


def test_samples_with_several_labels_have_average_precision_and_no_confusion(
    several_labels: Path, tmp_path: Path
) -> None:
    names = ("bright", "dark", "picture", "striped")
    model = {**MODEL, "num_classes": 4}
    save_trained(tmp_path / "run", 5, classes=names, loss="sigmoid", model=model)
    one, three = (evaluated(tmp_path / "run", several_labels, tmp_path / str(n), ranks=n) for n in (1, 3))
    assert replace(three, circumstances=one.circumstances) == one
    assert one.best_name == "precision@1"
    logits, labels = logits_and_labels(tmp_path / "run", several_labels)
    predicted = logits.argmax(dim=1).tolist()
    assert one.figures.top1 == np.mean([best in own for best, own in zip(predicted, labels, strict=True)])
    precision = []
    resolution = 2 * LIMIT / bins_of(4)
    for number, name in enumerate(names):
        positive = np.array([number in own for own in labels])
        precision.append(average_precision(logits[:, number].numpy(), positive))
        assert one.classes[name].average_precision == pytest.approx(precision[-1], abs=0.02)
        assert one.classes[name].samples == positive.sum()
    assert one.average_precision is not None
    assert one.average_precision.mean == pytest.approx(np.mean(precision), abs=0.01)
    assert (one.average_precision.classes, one.average_precision.resolution) == (4, resolution)
    assert "several labels" in one.left_out["confusion"]
    assert not (tmp_path / "1/confusion.csv").exists()
    assert all(one.predicted not in one.labels for one in one.mistakes)


def test_several_labels_are_refused_for_a_model_that_was_trained_for_one(several_labels: Path, tmp_path: Path) -> None:
    names = ("bright", "dark", "picture", "striped")
    save_trained(tmp_path / "run", 5, classes=names, model={**MODEL, "num_classes": 4})
    with pytest.raises(ConfigError, match=r"have up to 2 labels, and .* trained with softmax, for one"):
        evaluated(tmp_path / "run", several_labels, tmp_path / "out")


def test_another_image_size_and_crop_are_computed_and_the_resized_tables_said(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    report = evaluated(run, shards / "validation", tmp_path, said=said, image_size=64, crop="center")
    logits, labels = logits_and_labels(run, shards / "validation", 64, "center")
    true = torch.tensor([label for (label,) in labels])
    assert report.figures.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, true).item(), rel=1e-5)
    assert (report.computation.image_size, report.computation.crop, report.model.trained_image_size) == (
        64,
        "center",
        32,
    )
    assert any(
        "relative position tables are resized from 3 x 3 to 7 x 7, for 64 pixels instead of 32" in line for line in said
    )
    assert sum(report.model.resized_tables.values()) > 0


def test_what_differs_from_the_stages_own_evaluation_is_said(run: Path, shards: Path, tmp_path: Path) -> None:
    stage = known_stage(str(run))
    assert stage is not None
    raw = stage.model_copy(
        update={"compile": True, "evaluation": stage.evaluation.model_copy(update={"weights": "raw"})}
    )
    facts = open_trained_model(str(run)).facts
    asked = request(run, shards / "validation", tmp_path)
    assert remarks(asked, facts, stage, 32, {}) == []
    assert [line.partition(" and ")[0] for line in remarks(asked, facts, raw, 32, {})] == [
        "the stage evaluates its raw weights",
        "the stage computes with torch.compile",
    ]


def test_raw_weights_and_average_differ(run: Path, shards: Path, tmp_path: Path) -> None:
    raw, average = (evaluated(run, shards / "validation", tmp_path / w, weights=w) for w in ("raw", "ema"))
    assert (raw.model.weights, average.model.weights) == ("raw", "ema")
    assert raw.figures.loss != average.figures.loss


def test_model_classes_without_samples_are_counted_and_classes_matched_by_name(shards: Path, tmp_path: Path) -> None:
    names = ("dark", "cat", "bright", "dog", "striped")
    save_trained(tmp_path / "run", 5, classes=names, model={**MODEL, "num_classes": 5})
    report = evaluated(tmp_path / "run", shards / "validation", tmp_path / "out")
    assert report.data.classes_without_samples == 2
    assert {name: row.samples for name, row in report.classes.items()} == {
        "dark": 5, "cat": 0, "bright": 5, "dog": 0, "striped": 5,
    }  # fmt: skip
    assert {one.labels[0] for one in report.mistakes} <= {one.key.split("/")[0] for one in report.mistakes}


def test_other_classes_are_refused_by_name_until_a_label_map_says_which_they_are(shards: Path, tmp_path: Path) -> None:
    save_trained(tmp_path / "run", 5, classes=("day", "night", "striped"))
    with pytest.raises(DataError, match=r"2 of its 3 classes are not among the 3 of .*run \(bright, dark\)"):
        evaluated(tmp_path / "run", shards / "validation", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    label_map = tmp_path / "map.yaml"
    label_map.write_text("rename: {bright: day, dark: night}\nothers: drop\n")
    report = evaluated(tmp_path / "run", shards / "validation", tmp_path / "out", label_map=str(label_map))
    assert (report.figures.samples, report.data.left_out, report.data.label_map) == (10, 5, str(label_map))
    assert [row.samples for row in report.classes.values()] == [5, 5, 0]


def test_an_exported_model_has_the_figures_of_what_it_was_exported_from_and_names_for_people(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    with open_trained_model(str(run)) as trained:
        facts = replace(trained.facts, display_names=("Bright day", "Dark night", "Striped"))
        (tmp_path / "export").mkdir()
        save_file(trained.parameters() | trained.buffers(), tmp_path / "export" / "model.safetensors")
    (tmp_path / "export" / "config.json").write_text(json.dumps(config_of(facts)))
    said: list[str] = []
    own = evaluated(run, shards / "validation", tmp_path / "own")
    report = evaluated(tmp_path / "export", shards / "validation", tmp_path / "out", said=said)
    assert (report.figures, report.calibration, report.confused) == (own.figures, own.calibration, own.confused)
    assert [row.display_name for row in report.classes.values()] == ["Bright day", "Dark night", "Striped"]
    assert "the precision that the model was trained in is not known; it computes in fp32" in said


def test_a_model_without_names_takes_the_classes_that_it_was_trained_with_alone(
    shards: Path, sorted_shards: Path, tmp_path: Path
) -> None:
    save_trained(tmp_path / "run", 5, classes=None, digests=replace(RUN.digests, classes_digest=json_sha256(CLASSES)))
    assert evaluated(tmp_path / "run", shards / "validation", tmp_path / "out").figures.samples == 15
    with pytest.raises(
        DataError, match=r"does not have the names of its 3 classes, and that they are the 9 of .* cannot"
    ):
        evaluated(tmp_path / "run", sorted_shards, tmp_path / "other")


def test_an_earlier_report_is_kept_unless_it_is_to_be_replaced(run: Path, shards: Path, tmp_path: Path) -> None:
    evaluated(run, shards / "validation", tmp_path)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match=r"has a report already \(evaluation.json, .*--overwrite"):
        evaluated(run, shards / "validation", tmp_path)
    again = evaluated(run, shards / "validation", tmp_path, overwrite=True, mistakes=0)
    assert again.mistakes == ()
    assert not (tmp_path / "mistakes.png").exists()  # which the first report had
    assert (tmp_path / "mine.txt").exists()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_logits_that_are_not_finite_are_counted(run: Path, shards: Path, tmp_path: Path, monkeypatch: Any) -> None:
    build = type(open_trained_model(str(run))).build

    def with_nan(self: Any, *arguments: Any) -> Any:
        model: Any = build(self, *arguments)
        model.head.classifier.bias.data[0] = torch.nan
        return model

    monkeypatch.setattr("pipeline.trained_model.TrainedModel.build", with_nan)
    report = evaluated(run, shards / "validation", tmp_path)
    assert report.not_finite == 15
    assert np.isnan(report.figures.loss)
    assert (report.calibration.error, report.mistakes) == (0.0, ())
    assert json.loads((tmp_path / "evaluation.json").read_text())["not_finite"] == 15


def test_an_image_size_that_does_not_fit_is_refused_with_one_that_does(run: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--image-size 50: no multiple of 16, as coatnet_debug needs; 48 is"):
        evaluated(run, shards / "validation", tmp_path / "out", image_size=50)

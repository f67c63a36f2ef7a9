"""Classes of images by a trained model: equal to its evaluation, best first, and never guessed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.dataset import open_dataset
from data.errors import EXIT_CONFIG, EXIT_TRY_AGAIN
from data.images.augment import EvaluationTransform
from data.inputs.open_inputs import open_inputs
from data.remote.storage import Storage
from data.stream import RankShare, evaluation_stream
from models.model_facts import ModelFacts
from pipeline.errors import ConfigError
from pipeline.evaluate import best_classes, hits
from pipeline.predict import (
    ClassifiedImage,
    ImagesNotRead,
    PredictionCounts,
    chosen_device,
    classify,
    known_classes,
    readable_score,
)
from pipeline.trained_model import TrainedModel, open_trained_model
from pipeline.training.images import normalized
from tests.support.third_party import picture
from tests.support.trained import save_trained

CPU = torch.device("cpu")
CLASSES = ("bright", "dark", "striped")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A model for the classes of the pictures, whose softmax it was trained with."""
    return open_trained_model(str(save_trained(tmp_path_factory.mktemp("run") / "pretrain", 5, classes=CLASSES)))


def classified(
    places: list[str], facts: ModelFacts, network: Callable[[Tensor], Tensor], **options: Any
) -> list[ClassifiedImage]:
    sources = open_inputs(places, Storage()).sources
    all_options: dict[str, Any] = {"device": CPU, "top": 2, "batch": 4, "workers": 2} | options
    return list(classify(network, sources, facts.preprocessing, facts, **all_options))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_scores_of_samples_are_those_of_their_evaluation_to_the_bit(
    loss: Any, trained: TrainedModel, shards: Path
) -> None:
    network, facts, folder = trained.build(), replace(trained.facts, loss=loss), str(shards / "validation")
    found = classified([folder], facts, network, top=3)
    stream = evaluation_stream(
        open_dataset(folder, Storage()), EvaluationTransform(32, "whole"), RankShare(0, 1, 4), workers=2
    )
    expected, right, in_five = [], [], []
    for batch in stream:
        with torch.no_grad():
            logits = network(normalized(batch.images, CPU, torch.float32))
        scores = logits.softmax(dim=1) if loss == "softmax" else logits.sigmoid()
        used = int(batch.weights.sum())
        expected += scores[:used].sort(dim=1, descending=True).values.tolist()
        first, five = hits(best_classes(logits), torch.from_numpy(batch.labels))
        right += first.any(dim=1)[:used].tolist()
        in_five += five.any(dim=1)[:used].tolist()
    assert [list(image.scores) for image in found] == expected
    assert [image.right for image in found] == list(zip(right, in_five, strict=True))
    total = sum(found[0].scores)
    assert (abs(total - 1) < 1e-6) == (loss == "softmax")
    labels = {image.labels for image in found}
    assert labels == {(name,) for name in CLASSES}


def test_the_best_classes_come_first_and_the_crop_and_size_are_those_asked_for(
    trained: TrainedModel, tmp_path: Path
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 60, 3), np.uint8)).save(tmp_path / "a.png")
    facts = replace(trained.facts, preprocessing=replace(trained.facts.preprocessing, image_size=64, crop="center"))
    seen: list[Tensor] = []

    def network(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.tensor([[0.0, 3.0, 2.0]]).repeat(len(images), 1)

    (image,) = classified([str(tmp_path / "a.png")], facts, network, batch=1)
    assert (image.classes, image.labels, image.right) == ((1, 2), (), None)
    assert image.scores == tuple(torch.tensor([0.0, 3.0, 2.0]).softmax(dim=0)[[1, 2]].tolist())
    pixels = EvaluationTransform(64, "center")(np.asarray(Image.open(tmp_path / "a.png")))
    assert torch.equal(seen[0], normalized(pixels[None], CPU, torch.float32))


def test_images_that_cannot_be_read_change_nothing_about_the_others(trained: TrainedModel, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    network, places = trained.build(), [str(tmp_path / f"{number}.jpg") for number in range(6)]
    whole = classified(places, trained.facts, network)
    (tmp_path / "1.jpg").write_bytes(b"no image")
    (tmp_path / "4.jpg").unlink()
    (tmp_path / "5.jpg").unlink()
    found = classified(places, trained.facts, network)
    assert [image.problem for image in found] == ["", "neither JPEG, PNG nor WebP", "", "", *["no such file"] * 2]
    assert [found[number].scores for number in (0, 2, 3)] == [whole[number].scores for number in (0, 2, 3)]
    assert not any(found[number].classes for number in (1, 4, 5))


def test_labels_of_other_classes_count_for_no_accuracy(trained: TrainedModel, shards: Path) -> None:
    facts = replace(trained.facts, classes=("dark", "bright", "striped"))
    counts = PredictionCounts()
    for image in classified([str(shards / "validation")], facts, trained.build()):
        counts.add(image)
        assert image.right is None
        assert image.labels[0] in CLASSES
    assert (counts.images, counts.labelled, counts.other_labels) == (15, 0, 15)


def test_a_model_without_class_names_takes_those_of_its_own_shards_alone(
    trained: TrainedModel, shards: Path, pictures: Path
) -> None:
    nameless = replace(trained.facts, classes=None)
    own = open_inputs([str(pictures / "dark"), str(shards / "validation")], Storage()).sources
    assert known_classes(nameless, own) == CLASSES
    assert known_classes(replace(nameless, classes_digest="0" * 64), own) is None
    assert known_classes(nameless, open_inputs([str(pictures / "dark")], Storage()).sources) is None


def test_outputs_that_are_not_finite_are_refused_with_the_image(trained: TrainedModel, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    places = [str(tmp_path / "a.jpg")]
    with pytest.raises(ConfigError, match=r"step-00000005: the outputs of the model for .*a.jpg are not finite"):
        classified(places, trained.facts, lambda images: torch.full((len(images), 3), torch.nan))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (
            4,
            torch.OutOfMemoryError("CUDA out of memory"),
            "for 4 images of 32 x 32 pixels at a time; lower --batch-size, now 4",
        ),
        (1, RuntimeError("DefaultCPUAllocator: can't allocate memory"), "use a smaller --image-size, or a device"),
    ],
)
def test_too_little_memory_is_said_with_what_needs_less(
    batch: int, error: RuntimeError, message: str, trained: TrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))

    def network(images: Tensor) -> Tensor:
        raise error

    with pytest.raises(ConfigError, match=message):
        classified([str(tmp_path / "a.jpg")], trained.facts, network, batch=batch)


@pytest.mark.parametrize(
    ("problems", "code", "message"),
    [
        (
            ["", "damaged"],
            EXIT_CONFIG,
            "1 of 2 images could not be read and is named above .*; the others are classified",
        ),
        (["x", "y"], EXIT_CONFIG, "2 of 2 images could not be read and are named .*; nothing is classified"),
        (["", "passes", "passes"], EXIT_TRY_AGAIN, "2 of 3 images"),
        (["passes", "damaged"], EXIT_CONFIG, "2 of 2 images"),
    ],
)
def test_the_exit_code_says_whether_all_that_is_missing_may_come(problems: list[str], code: int, message: str) -> None:
    counts = PredictionCounts()
    for problem in problems:
        counts.add(ClassifiedImage("a.jpg", problem=problem, may_pass=problem == "passes"))
    with pytest.raises(ImagesNotRead, match=message) as error:
        raise ImagesNotRead(counts)
    assert (error.value.exit_code, error.value.retryable) == (code, code == EXIT_TRY_AGAIN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device cuda: torch finds no GPU"):
        chosen_device("cuda")
    assert chosen_device("auto") == chosen_device("cpu") == CPU


@pytest.mark.parametrize(
    ("score", "text"), [(0.98214, "98.21 %"), (1.0, "100.00 %"), (0.0, "0.00 %"), (3.2e-7, "3.2e-05 %")]
)
def test_small_scores_are_told_from_zero(score: float, text: str) -> None:
    assert readable_score(score) == text

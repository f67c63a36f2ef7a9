"""The classes of images by a trained model, as its evaluation would see them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data.errors import EXIT_CONFIG, EXIT_TRY_AGAIN, CoatnetError
from data.files.digest import json_sha256
from data.images.augment import EvaluationTransform
from data.images.decode import Pixels
from data.inputs.image_source import ImageSource, JoinedSources
from data.inputs.image_stream import InputImage, image_batches
from data.text.counted import counted
from models.model_facts import LossKind, ModelFacts, Preprocessing
from pipeline.errors import ConfigError
from pipeline.memory_estimate import is_host_memory_full
from pipeline.ranks.device_settings import prepare_devices
from pipeline.training.images import normalized

_IN_FIVE = 5  # as in evaluations, whose ties are resolved by the same selection


@dataclass(frozen=True, slots=True, eq=False)
class ClassifiedImage:
    """An image with its best classes, or the reason why it has none."""

    name: str
    labels: tuple[str, ...] = ()
    """Names of the classes that it has according to its shard."""
    classes: tuple[int, ...] = ()
    """The best classes, best first, as positions in the class list of the model."""
    scores: tuple[float, ...] = ()
    """Their probabilities, 0 to 1."""
    right: tuple[bool, bool] | None = None
    """Whether one of the labels is the best class, and one of the best five; None where that cannot be told."""
    problem: str = ""
    """Why the image cannot be used; empty if it can."""
    may_pass: bool = False
    """Whether the problem may be gone later."""
    turned: bool = False
    """Whether its EXIF data say that it is to be turned for viewing. It is not, as in training."""
    thumbnail: Pixels | None = None


@dataclass(slots=True)
class PredictionCounts:
    """What became of the images."""

    images: int = 0
    unreadable: int = 0
    may_pass: int = 0
    """Of the unreadable ones."""
    turned: int = 0
    labelled: int = 0
    """Images whose labels are classes of the model."""
    right: int = 0
    """Of these, those for which a label is the best class."""
    right_in_five: int = 0
    other_labels: int = 0
    """Images whose labels are other classes than the model's."""

    def add(self, image: ClassifiedImage) -> None:
        """Count an image."""
        self.images += 1
        if image.problem:
            self.unreadable += 1
            self.may_pass += image.may_pass
            return
        self.turned += image.turned
        if image.right is not None:
            self.labelled += 1
            self.right += image.right[0]
            self.right_in_five += image.right[1]
        elif image.labels:
            self.other_labels += 1


class ImagesNotRead(CoatnetError):
    """Some of the images could not be read, which does not keep the others from being classified.

    It may pass if that holds for all of them.
    """

    def __init__(self, counts: PredictionCounts) -> None:
        rest = "the others are classified" if counts.unreadable < counts.images else "nothing is classified"
        super().__init__(
            f"{counts.unreadable:,} of {counted(counts.images, 'image')} could not be read and "
            f"{'is' if counts.unreadable == 1 else 'are'} named above with the reason; {rest}"
        )
        self.retryable = counts.may_pass == counts.unreadable
        self.exit_code = EXIT_TRY_AGAIN if self.retryable else EXIT_CONFIG


def chosen_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """
    Raises:
        ConfigError: a GPU is requested and there is none.
    """
    prepare_devices(gpus=name != "cpu", deterministic=True)
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU on this machine; use --device auto or cpu")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def classify(
    network: Callable[[Tensor], Tensor],
    sources: JoinedSources,
    preprocessing: Preprocessing,
    facts: ModelFacts,
    *,
    device: torch.device,
    top: int,
    batch: int,
    workers: int,
    thumbnails: int = 0,
    thumbnail_size: int = 0,
) -> Iterator[ClassifiedImage]:
    """Every image of `sources`, in order, with its `top` best classes; those that cannot be used with the reason.

    Args:
        network: maps images (B, S, S, 3) to logits (B, classes), in evaluation mode, float32.
        sources: the images.
        preprocessing: size, crop, mean and standard deviation.
        facts: of the model.
        device: of the network.
        top: number of classes, at most those of the model.
        batch: images of one forward pass. The last one has the same shape, as in an evaluation, so that it computes the
            same.
        workers: threads that read and decode.
        thumbnails, thumbnail_size: how many images are to come with small pictures, and the side of these in pixels.

    Raises:
        ConfigError: too little memory for a batch, or outputs that are not finite.
    """
    transform = EvaluationTransform(preprocessing.image_size, preprocessing.crop)
    comparable = {id(source): _are_classes_of(source, facts) for source in sources.sources}
    for part in image_batches(sources, transform, batch, workers, thumbnails, thumbnail_size):
        if all(image.problem for image in part.images):
            yield from (_classified(image, (), (), None) for image in part.images)
            continue
        images = normalized(part.pixels, device, torch.float32, preprocessing.mean, preprocessing.std)
        best, scores, finite = _best(network, images, facts.loss, max(top, _IN_FIVE), batch)
        for row, image in enumerate(part.images):
            if image.problem:
                yield _classified(image, (), (), None)
                continue
            if not finite[row]:
                raise ConfigError(
                    f"{facts.source.resolved}: the outputs of the model for {image.name} are not finite; its training "
                    "may have diverged: use an earlier checkpoint"
                )
            right = None
            if image.labels and comparable[id(image.source)]:
                found = [label in best[row][:_IN_FIVE] for label in image.labels]
                right = (best[row][0] in image.labels, any(found))
            yield _classified(image, best[row][:top], scores[row][:top], right)


def _classified(
    image: InputImage, classes: Sequence[int], scores: Sequence[float], right: tuple[bool, bool] | None
) -> ClassifiedImage:
    return ClassifiedImage(
        image.name,
        tuple(image.source.classes[label] for label in image.labels),
        tuple(classes),
        tuple(scores),
        right,
        image.problem,
        image.may_pass,
        image.turned,
        image.thumbnail,
    )


@torch.inference_mode()
def _best(
    network: Callable[[Tensor], Tensor], images: Tensor, loss: LossKind, count: int, batch: int
) -> tuple[list[list[int]], list[list[float]], list[bool]]:
    """The best classes of each image, their scores, and whether all of its logits are finite."""
    try:
        logits = network(images).float()
        scores = logits.softmax(dim=1) if loss == "softmax" else logits.sigmoid()
        best = logits.topk(min(count, logits.shape[1]), dim=1).indices
        finite = logits.isfinite().all(dim=1)
        return best.tolist(), scores.gather(1, best).tolist(), finite.tolist()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not is_host_memory_full(error):
            raise
        size = images.shape[1]
        fix = (
            f"lower --batch-size, now {batch:,}"
            if batch > 1
            else "use a smaller --image-size, or a device with more memory"
        )
        raise ConfigError(
            f"too little memory for {batch:,} images of {size} x {size} pixels at a time; {fix}"
        ) from error


def _are_classes_of(source: ImageSource, facts: ModelFacts) -> bool:
    """Whether the labels of a source are the classes of the model, in the same order."""
    if not source.classes:
        return False
    if facts.classes is not None:
        return source.classes == facts.classes
    return json_sha256(source.classes) == facts.classes_digest


def known_classes(facts: ModelFacts, sources: JoinedSources) -> tuple[str, ...] | None:
    """The names of the model's classes: its own, else those of shards whose list of classes has the same digest."""
    if facts.classes is not None:
        return facts.classes
    return next((source.classes for source in sources.sources if _are_classes_of(source, facts)), None)


def readable_score(score: float) -> str:
    """A probability as people read it: `98.21 %`, and small ones with as many digits as tell them from zero."""
    percent = 100 * score
    if percent >= 0.01 or percent == 0 or not math.isfinite(percent):
        return f"{percent:.2f} %"
    return f"{percent:.1e} %"

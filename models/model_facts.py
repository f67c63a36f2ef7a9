"""What is known about a trained model beside its tensors: enough to build it, to feed it and to read its answers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

LossKind = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How pixels become the network's input in evaluation: crop, resize, normalize.

    Args:
        image_size: side of the square input, in pixels.
        crop: "center", the square whose side is S / (S + 32) of the shorter side for the image size S, or "whole".
        mean, std: of red, green and blue on the scale 0 .. 1, by which they are normalized.
        interpolation: of the resizing; "bilinear" is the antialiased triangle filter.
    """

    image_size: int
    crop: Literal["center", "whole"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bilinear"] = "bilinear"

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: an image size below 1, or not three finite means and positive standard deviations.
        """
        if self.image_size < 1:
            raise ValueError(f"image_size: must be at least 1, not {self.image_size}")
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean: must be three numbers, not {str(self.mean)[:80]}")
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std: must be three positive numbers, not {str(self.std)[:80]}")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model was read: the location `given`, and what that was `resolved` to."""

    given: str
    resolved: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a trained model is. What its files do not say is None."""

    arguments: Mapping[str, Any]
    """Of `models.registry.create_model`."""
    classes: tuple[str, ...] | None
    """Names of the outputs, in their order."""
    display_names: tuple[str, ...] | None
    """Names for people, in the same order."""
    preprocessing: Preprocessing
    loss: LossKind
    """How logits become scores: softmax over the classes, or a sigmoid for each."""
    weights: Literal["raw", "ema"]
    """The trained weights, or their moving average."""
    step: int
    """Steps of its stage that it was trained for."""
    samples: int | None
    """Samples that these steps took."""
    run_id: str | None
    stage: str | None
    recipe_digest: str | None
    classes_digest: str | None
    """Identifies the list of its classes, also where that is not known: sha256 of the names as JSON."""
    source: ModelSource
    remarks: tuple[str, ...] = ()
    """What had to be assumed or is not known, in sentences for the person who named the model."""

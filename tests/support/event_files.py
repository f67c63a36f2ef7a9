"""Event files as TensorBoard's server reads them."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray


def points(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Step and value of every point by tag, over all event files; for scalars, images, texts and histograms alike."""
    events = EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0, "images": 0, "text": 0, "histograms": 0})
    events.Reload()
    return {
        tag: [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def steps(folder: Path) -> dict[str, list[int]]:
    """The steps of every tag."""
    return {tag: [step for step, _ in found] for tag, found in points(folder).items()}

"""Event files as TensorBoard's server reads them."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray


def points(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Step and value of every point by tag, over all event files of a run folder; for scalars, images, texts and
    histograms alike."""
    found = {}
    for part in filter(Path.is_dir, (folder, folder / "validation")):
        sizes = {"scalars": 0, "images": 0, "text": 0, "histograms": 0}
        events = EventAccumulator(str(part), tensor_size_guidance=sizes)
        events.Reload()
        for tag in events.Tags()["tensors"]:
            assert tag not in found
            found[tag] = [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]
    return found


def steps(folder: Path) -> dict[str, list[int]]:
    """The steps of every tag."""
    return {tag: [step for step, _ in found] for tag, found in points(folder).items()}

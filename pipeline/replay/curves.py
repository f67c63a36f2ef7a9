"""A replay in TensorBoard: a run of its own, whose curves lie over those of the run with the same tags."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.tensorboard.summary import image

from data.files.atomic_file import atomic_file
from pipeline.monitoring import charts
from pipeline.monitoring.event_file import EventFile
from pipeline.replay.logged_steps import TAGS
from pipeline.replay.report import BlockRow, Number, StepRow


class ReplayCurves:
    """The event file of a replay.

    Args:
        folder: the log folder of TensorBoard.
        first: the first step, from 1; what an earlier replay wrote from there on is dropped.
        notify: called with a message when the file cannot be written.
    """

    def __init__(self, folder: Path, first: int, notify: Callable[[str], None]) -> None:
        self._events = EventFile(folder, first, notify)
        self._events.add(charts.layout(), first)

    def add(self, row: StepRow, picture: NDArray[np.uint8] | None) -> None:
        """Add a step, and the picture (H, W, 3) of its samples."""
        values = {tag: _float(getattr(row, name)) for name, tag in TAGS.items()}
        for block in row.blocks:
            values |= {f"replay_{kind}/{block.name}": _float(value) for kind, value in _norms(block).items()}
        self._events.add(charts.scalars({tag: value for tag, value in values.items() if value is not None}), row.step)
        if picture is not None:
            summary = image("replay/samples", picture, dataformats="HWC")  # type: ignore[no-untyped-call]
            self._events.add(summary, row.step)
        self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._events.close()


def write_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture (H, W, 3) as PNG."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    with atomic_file(path) as file:
        file.write(content.getvalue())


def _norms(block: BlockRow) -> dict[str, Number | None]:
    return {
        "gradient_norm": block.gradient,
        "update_norm": block.update,
        "weight_norm": block.weight,
        "output_norm": block.output,
        "output_gradient_norm": block.output_gradient,
    }


def _float(value: Number | None) -> float | None:
    return None if value is None else float(value)

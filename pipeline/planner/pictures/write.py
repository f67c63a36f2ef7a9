"""Writes pictures as files, and into the TensorBoard of a run."""

import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from data.errors import raise_if_passing
from data.files.atomic_file import write_atomically
from pipeline.errors import ConfigError
from pipeline.monitoring.event_file import EventFile
from pipeline.runs.run_folder import RunFolder

TAG = "plan"
"""What the tags of the pictures begin with in TensorBoard, as `plan/memory`."""


def write_pictures(folder: Path, pictures: Mapping[str, Image.Image]) -> list[Path]:
    """Write each picture as `<name>.png`, in place of an earlier one; returns their paths.

    Args:
        folder: is created if need be.
        pictures: by name.

    Raises:
        ConfigError: the folder or a file cannot be written.
    """
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            path = folder / f"{name}.png"
            write_atomically(path, _png(picture))
            paths.append(path)
    except OSError as error:
        raise_if_passing(error)
        reason = error.strerror or error
        raise ConfigError(f"{error.filename or folder}: cannot be written ({reason}); name another folder") from None
    return paths


def show_in_tensorboard(run: RunFolder, pictures: Mapping[str, Image.Image]) -> None:
    """Show the pictures among the images of a run, instead of those of an earlier call.

    They are in an event file of their own, in `plan/` of the run folder, which to TensorBoard is another run, as
    `validation` is. A process that trains meanwhile is not disturbed, and the run need not have begun.

    Raises:
        ConfigError: the event file cannot be written; what earlier calls wrote is still there.
    """
    folder = run.plan
    earlier = sorted(folder.glob("events.out.tfevents.*"))
    failures: list[str] = []
    # It is later by its name, and begins at step 0: a server that has read the earlier one drops its pictures.
    events = EventFile(folder, 0, failures.append)
    for name, picture in pictures.items():
        events.add(_summary(f"{TAG}/{name}", picture), 0)
    events.close()
    if failures:
        raise ConfigError(f"run folder {run.path}: plan cannot be written; have its rights changed, or make room")
    # TensorBoard's server does not get beyond a file that is gone before it has seen the next one.
    for path in earlier[:-1]:
        with suppress(OSError):  # it is superseded all the same
            path.unlink()


def _summary(tag: str, picture: Image.Image) -> Summary:
    image = Summary.Image(height=picture.height, width=picture.width, colorspace=3, encoded_image_string=_png(picture))
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()

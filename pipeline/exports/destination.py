"""Where an export goes: which format a name means, and publishing files and folders once they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from data.errors import raise_if_passing
from data.files.atomic_file import sync_folder, unfinished_path
from data.files.regular_file import read_regular
from data.limits import CLASS_LIST_BYTES
from models.pretrained import CITATION, CONFIG_FILE, WEIGHTS_FILE
from pipeline.errors import ConfigError

ExportFormat = Literal["safetensors", "timm", "onnx", "torch"]

_SUFFIXES: dict[ExportFormat, str | None] = {
    "safetensors": ".safetensors",
    "timm": None,
    "onnx": ".onnx",
    "torch": ".pt2",
}
"""Of the one file that a format is; timm's is always a folder, and safetensors may be."""
_OTHER_SUFFIXES = {".pt", ".pth", ".pkl", ".bin", ".ckpt", ".tar", ".zip", ".npz", ".h5", ".json", ".yaml", ".gguf"}
_FOLDER_FILES = {CONFIG_FILE, WEIGHTS_FILE}


def export_format(destination: Path, wanted: ExportFormat | None) -> ExportFormat:
    """The format of an export to `destination`: the `wanted` one, or else that of its suffix.

    Raises:
        ConfigError: the suffix belongs to another format, or to none.
    """
    suffix = destination.suffix.lower()
    by_suffix = next((name for name, own in _SUFFIXES.items() if own == suffix), None)
    found = wanted or by_suffix or "safetensors"
    own = _SUFFIXES[found]
    takes_folder = found in ("safetensors", "timm")
    fits = suffix == own or (takes_folder and by_suffix is None and suffix not in _OTHER_SUFFIXES)
    if not fits:
        forms = {
            "safetensors": "a folder or a .safetensors file",
            "timm": "a folder",
            "onnx": "an .onnx file",
            "torch": "a .pt2 file",
        }
        given = suffix or "a name without a suffix"
        owner = f", which is --format {by_suffix}" if by_suffix else ""
        raise ConfigError(
            f"{destination}: --format {found} writes {forms[found]}, not {given}{owner}; change one of them"
        )
    return found


def is_folder(destination: Path, chosen: ExportFormat) -> bool:
    """Whether an export of that format to `destination` is a folder."""
    return chosen == "timm" or (chosen == "safetensors" and destination.suffix.lower() != ".safetensors")


def check_destination(destination: Path, chosen: ExportFormat) -> None:
    """Refuse what an export cannot replace or write, before the weights are read.

    Raises:
        ConfigError: a folder in the place of a file or the reverse, a folder with anything but an export in it, or no
            folder to write in.
    """
    if is_folder(destination, chosen):
        if destination.is_dir():
            names = {entry.name for entry in destination.iterdir()}
            other = sorted(names - _FOLDER_FILES or (set() if _is_export(destination) else names))
            if other:
                raise ConfigError(
                    f"{destination}: a folder with other files than those of an export ({', '.join(other[:3])}"
                    f"{', ...' if len(other) > 3 else ''}), which would be lost; give a new or empty folder"
                )
        elif destination.exists() or destination.is_symlink():
            raise ConfigError(f"{destination}: a file, and --format {chosen} writes a folder; give another name")
    elif destination.is_dir():
        raise ConfigError(f"{destination}: a folder, and the export is one file; give the file's name")
    if not destination.absolute().parent.is_dir():
        raise ConfigError(
            f"{destination}: cannot be written (No such file or directory: {destination.absolute().parent}); give "
            "another file, or make that folder"
        )


def _is_export(folder: Path) -> bool:
    try:
        return CITATION.encode() in read_regular(folder / CONFIG_FILE, CLASS_LIST_BYTES)
    except OSError:
        return False


@contextmanager
def publication(destination: Path, *, folder: bool) -> Iterator[Path]:
    """A folder to write to. When the block ends without an error, it becomes `destination` if that is a `folder`;
    otherwise the files in it move beside each other, that of the destination's name last.

    After an error it is removed, and what was at `destination` is unchanged.

    Raises:
        ConfigError: it cannot be written.
    """
    unfinished = unfinished_path(destination.absolute())
    try:
        _remove(unfinished)
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.iterdir():
            _flush(file)
        if folder:
            sync_folder(unfinished)
            _replace_folder(unfinished, destination)
        else:
            for file in sorted(unfinished.iterdir(), key=lambda file: file.name == destination.name):
                file.replace(destination.with_name(file.name))
        sync_folder(destination.absolute().parent)
    except OSError as error:
        raise_if_passing(error)
        raise ConfigError(
            f"{destination}: cannot be written ({error}); give another name, or free some space"
        ) from None
    finally:
        with suppress(OSError):
            _remove(unfinished)


def _replace_folder(unfinished: Path, destination: Path) -> None:
    """Folders cannot be exchanged everywhere: between two renames there is none. A kill there leaves both complete."""
    replaced = unfinished.with_name(f".{destination.name}.replaced")
    _remove(replaced)
    if destination.is_dir():
        destination.absolute().rename(replaced)
    unfinished.rename(destination)
    _remove(replaced)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _flush(file: Path) -> None:
    """To the disk, with the mode of the umask: libraries may write a file for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    with open(file, "rb+") as content:
        os.fchmod(content.fileno(), 0o666 & ~mask)
        os.fsync(content.fileno())

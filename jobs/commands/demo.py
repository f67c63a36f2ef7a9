"""`coatnet demo`: the whole chain on real photographs that ship with the program, in minutes on two CPU cores."""

import gzip
import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from jobs.chain import run_chain
from pipeline.faults.preemption import StopSignals

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip


def run_demo(folder: Path, overrides: list[str], console: Console, signals: StopSignals) -> None:
    """Write the images into `folder`, then do what a user would: run the recipe, which builds shards first.

    Called again, it continues where it stopped.
    """
    images, recipe = folder / "images", folder / "recipe.yaml"
    if not images.is_dir():
        write_images(images)
    if not recipe.exists():
        shutil.copyfile(str(files("jobs") / "recipes" / "demo.yaml"), recipe)
    _show(console, " ".join(["coatnet run", str(recipe), *overrides]))
    run_chain(recipe, overrides, console, signals)
    tensorboard = os.path.relpath(Path(sys.executable).with_name("tensorboard"))
    console.print(
        f"\nTo see the curves and pictures:\n  {tensorboard} --logdir {folder / 'runs'}", soft_wrap=True, markup=False
    )


def _show(console: Console, command: str) -> None:
    console.print(f"$ {command}", style="dim", soft_wrap=True, markup=False)


def write_images(folder: Path) -> None:
    """The 10,000 test pictures of Fashion-MNIST as a folder of class folders of JPEGs."""
    source = files("jobs") / "fashion_mnist"
    pixels = np.frombuffer(gzip.decompress((source / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((source / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    unfinished = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in CLASSES:
        (unfinished / name).mkdir(parents=True)
    for number, (picture, label) in enumerate(zip(pixels.reshape(-1, 28, 28), labels, strict=True)):
        Image.fromarray(picture).save(unfinished / CLASSES[label] / f"{number:05d}.jpg", quality=95)
    unfinished.rename(folder)

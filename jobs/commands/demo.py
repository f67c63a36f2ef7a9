"""`coatnet demo`: the whole chain on real photographs that come with the program, in minutes on two CPU cores."""

import gzip
import os
import shlex
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from jobs.bundled_recipes import bundled_recipes
from jobs.chain import run_chain
from jobs.commands.arguments import Overrides
from jobs.console import make_console, print_line
from jobs.exit_codes import end_process, exit_on_error
from pipeline.errors import ConfigError
from pipeline.faults.preemption import StopSignals
from pipeline.recipe.locations import is_url

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Folder for images, shards and runs.")] = Path(
        "demo"
    ),
    overrides: Overrides = None,
) -> None:
    """Pretrain, fine-tune and evaluate a small CoAtNet on 10,000 product photos: minutes on two CPU cores.

    Writes the images and the recipe into FOLDER, then does what `coatnet run` does, which builds the shards first.
    Run again, it continues where it stopped.
    """
    with StopSignals(end_process) as signals, exit_on_error(signals=signals):
        console = make_console(bounded=True)
        images, recipe = folder / "images", folder / "recipe.yaml"
        if is_url(str(folder)):
            raise ConfigError(f"{folder}: is a URL, and the demo writes to a local folder; give the path of one")
        if not images.is_dir():
            write_images(images)
        if not recipe.exists():
            shutil.copyfile(bundled_recipes()["demo"], recipe)
        command = " ".join(["coatnet run", str(recipe), *(overrides or [])])
        print_line(console, (f"$ {command}", "dim"))
        run_chain(recipe, overrides or [], console, signals)
        program = os.path.relpath(Path(sys.executable).with_name("coatnet"))
        console.print()
        print_line(
            console, f"To see curves and images:\n{program} tensorboard {shlex.quote(str(folder / 'runs/demo'))}"
        )


def write_images(folder: Path) -> None:
    """Write the 10,000 test images of Fashion-MNIST as JPEGs into a folder for each class."""
    source = files("jobs") / "fashion_mnist"
    pixels = np.frombuffer(gzip.decompress((source / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((source / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    unfinished = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in CLASSES:
        (unfinished / name).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(pixels.reshape(-1, 28, 28), labels, strict=True)):
        Image.fromarray(image).save(unfinished / CLASSES[label] / f"{number:05d}.jpg", quality=95)
    unfinished.rename(folder)

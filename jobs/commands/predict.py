"""`coatnet predict`: the classes of images by a trained model."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.accounting import listed
from data.classes.display_names import match_display_names
from data.files.atomic_file import atomic_file, write_atomically
from data.inputs.open_inputs import Inputs, open_inputs
from data.remote.cache import Cache
from data.remote.storage import Storage
from data.text.counted import counted
from jobs.checkpoint_discovery import model_location
from jobs.commands.arguments import (
    Anonymous,
    Crop,
    Endpoint,
    GiveUpAfter,
    ImageSize,
    ModelLocation,
    Profile,
    ShardsElsewhere,
    Weights,
)
from jobs.console import make_console, print_json, print_line, print_warning
from jobs.exit_codes import STARTS_OVER, exit_on_error
from jobs.predictions import (
    PICTURE_CELL,
    PICTURE_IMAGES,
    SCORES,
    ShownClassNames,
    as_csv,
    as_json,
    picture,
    prediction_table,
)
from models.model_facts import ModelFacts, Preprocessing
from pipeline.errors import ConfigError
from pipeline.monitoring.console import PrintableConsole
from pipeline.predict import (
    ClassifiedImage,
    ImagesNotRead,
    PredictionCounts,
    chosen_device,
    classify,
    known_classes,
)
from pipeline.ranks.gpus import device_name
from pipeline.recipe.data_sections import CacheSettings
from pipeline.trained_model import open_trained_model

_STDOUT = "-"
_TOP = 5
_SHOWN = 20  # images in the table if a file has all of them


def predict(
    model: ModelLocation,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="Image files, folders, globs, URLs, folders of indexed shards, or - for an image on standard input.",
        ),
    ],
    top: Annotated[
        int | None,
        typer.Option("--top", "-k", min=1, help="How many of the best classes to show.", show_default=f"{_TOP}"),
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON to a file or to standard output.")
    ] = None,
    csv_file: Annotated[
        str | None, typer.Option("--csv", metavar="FILE|-", help="Write CSV: a row for each image and rank.")
    ] = None,
    picture_file: Annotated[
        Path | None, typer.Option("--picture", metavar="OUT.png", help="Draw the images with their classes.")
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(help="File with names for people, in lines such as `n01440764 tench, Tinca tinca`."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one forward pass.")] = 32,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU if there is one.")] = "auto",
    weights: Weights = "auto",
    image_size: ImageSize = None,
    crop: Crop = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and decode images.")] = 4,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for remote shards, on a local disk.", show_default="as for training")
    ] = None,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    elsewhere: ShardsElsewhere = False,
    give_up_after: GiveUpAfter = 60,
) -> None:
    """Classify images with a trained model: the best classes of each, as a table, JSON, CSV or a picture."""
    with exit_on_error(STARTS_OVER):
        _check_outputs(json_file, csv_file, picture_file)
        storage = Storage(endpoint, profile, anonymous, give_up_after, shards_elsewhere=elsewhere)
        settings = CacheSettings()
        shard_cache = Cache(cache or Path(settings.folder), int(settings.gigabytes * 1e9), settings.downloads)
        notes = PrintableConsole(stderr=True)
        inputs = open_inputs(images, storage, shard_cache)
        with closing(inputs.sources), open_trained_model(model_location(model), weights) as trained:
            facts, place = trained.facts, chosen_device(device)
            if picture_file and inputs.include(picture_file):
                raise ConfigError(f"--picture {picture_file}: is one of the images to classify; give another file")
            trained_as = facts.preprocessing
            preprocessing = replace(
                trained_as, image_size=image_size or trained_as.image_size, crop=crop or trained_as.crop
            )
            known = known_classes(facts, inputs.sources)
            outputs = facts.arguments["num_classes"]
            if not outputs:
                raise ConfigError(f"{facts.source.resolved}: the model has no classifier, so that it predicts nothing")
            display_names = _display_names(notes, names, known) if names else facts.display_names
            class_names = ShownClassNames(known, display_names)
            _announce(notes, inputs, facts, preprocessing, device_name(place), known is None)
            if top is not None and top > outputs:
                print_line(notes, f"--top {top}: the model has {counted(outputs, 'class', 'classes')}; all are shown")
            network = trained.build(place, preprocessing.image_size)
            counts, found = PredictionCounts(), list[ClassifiedImage]()
            with _progress(notes, len(inputs.sources)) as advance:
                for image in classify(
                    network,
                    inputs.sources,
                    preprocessing,
                    facts,
                    device=place,
                    top=min(top or _TOP, outputs),
                    batch=min(batch_size, len(inputs.sources)),
                    workers=workers,
                    thumbnails=PICTURE_IMAGES if picture_file else 0,
                    thumbnail_size=PICTURE_CELL,
                ):
                    counts.add(image)
                    found.append(image)
                    if image.problem:
                        print_warning(notes, f"{image.name}: {image.problem}")
                    advance()
        content = as_json(found, counts, class_names, facts, preprocessing, device_name(place))
        csv_text = as_csv(found, class_names) if csv_file else ""
        if _STDOUT not in (json_file, csv_file):
            shown = found[:_SHOWN] if json_file or csv_file else found
            make_console().print(prediction_table(shown, class_names))
            if len(shown) < len(found):
                print_line(notes, f"{len(found) - len(shown):,} more images are in {json_file or csv_file}")
        if json_file == _STDOUT:
            print_json(content)
        elif json_file:
            write_atomically(Path(json_file), json.dumps(content, indent=1) + "\n")
        if csv_file == _STDOUT:
            print(csv_text, end="", flush=True)
        elif csv_file:
            write_atomically(Path(csv_file), csv_text)
        if picture_file:
            _draw(notes, picture_file, found, class_names)
        _summarize(notes, counts, facts)
        if counts.unreadable:
            raise ImagesNotRead(counts)


def _check_outputs(json_file: str | None, csv_file: str | None, picture_file: Path | None) -> None:
    """
    Raises:
        ConfigError: files that cannot be written, or that are no such files by their names, such as an image behind an
            option that takes the file to write.
    """
    given = {"--json": json_file, "--csv": csv_file, "--picture": None if picture_file is None else str(picture_file)}
    if json_file == csv_file == _STDOUT:
        raise ConfigError("--csv -: --json writes to standard output, too; give one of them a file")
    for option, file in given.items():
        if file is None or (file == _STDOUT and option != "--picture"):
            continue
        path, extension = Path(file), {"--picture": ".png"}.get(option, f".{option[2:]}")
        if path.suffix.lower() != extension:
            other = "" if option == "--picture" else ", or - for standard output"
            raise ConfigError(f"{option} {file}: takes the file to write; give a name that ends in {extension}{other}")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"{option} {file}: no folder {path.parent}; create it first")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{option} {file}: not a regular file; give another name")


def _display_names(notes: Console, file: Path, classes: Sequence[str] | None) -> tuple[str, ...]:
    """
    Raises:
        ConfigError: the names of the classes are not known.
        DataError: as for `match_display_names`.
    """
    if classes is None:
        raise ConfigError(f"--names {file}: the model's own names of its classes, which its lines need, are not known")
    found = match_display_names(file, classes)
    for remark in found.remarks(str(file)):
        print_line(notes, remark)
    return found.names


def _announce(
    notes: Console, inputs: Inputs, facts: ModelFacts, preprocessing: Preprocessing, device: str, nameless: bool
) -> None:
    """What is predicted with, and what is left out, assumed or changed."""
    for reason, entries in inputs.left_out.left_out.items():
        print_line(notes, f"left out: {entries.count:,} {reason} ({listed(entries.first, count=entries.count)})")
    for remark in facts.remarks:
        print_warning(notes, remark)
    kind = "moving average" if facts.weights == "ema" else "raw weights"
    size, trained_size = preprocessing.image_size, facts.preprocessing.image_size
    crop = "central part" if preprocessing.crop == "center" else "whole image"
    print_line(
        notes,
        f"{facts.arguments['name']}, {kind} after step {facts.step:,}, {facts.source.resolved}; "
        f"{counted(facts.arguments['num_classes'], 'class', 'classes')}, {size} x {size} pixels ({crop}), {device}",
    )
    print_line(notes, f"scores are by {SCORES[facts.loss]}")
    if size != facts.arguments["image_size"]:
        print_line(
            notes,
            f"the model was trained at {facts.arguments['image_size']} pixels; its relative position tables are "
            f"resized for {size}",
        )
    elif size != trained_size:
        print_line(notes, f"evaluations of the model use {trained_size} pixels")
    if preprocessing.crop != facts.preprocessing.crop:
        print_line(notes, f"evaluations of the model use --crop {facts.preprocessing.crop}")
    if nameless:
        print_warning(notes, "the names of the model's classes are not known; their numbers are shown")


@contextmanager
def _progress(notes: Console, total: int) -> Iterator[Callable[[], None]]:
    """A bar of images on a terminal; yields a function that advances it by one."""
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("images", total=total)
        yield lambda: bar.advance(task)


def _draw(notes: Console, file: Path, found: list[ClassifiedImage], names: ShownClassNames) -> None:
    if all(image.problem for image in found):
        print_line(notes, f"{file}: not written, as there is no image to draw")
        return
    with atomic_file(file) as opened:
        picture(found, names).save(opened, "PNG")
    drawn = min(len(found), PICTURE_IMAGES)
    which = f"the first {drawn:,} of {len(found):,} images" if drawn < len(found) else counted(drawn, "image")
    print_line(notes, f"{file}: {which}")


def _summarize(notes: Console, counts: PredictionCounts, facts: ModelFacts) -> None:
    if counts.labelled:
        best = "precision@1" if facts.loss == "sigmoid" else "top-1"
        one, five = (right / counts.labelled for right in (counts.right, counts.right_in_five))
        print_line(notes, f"{best} {one:.2%}  top-5 {five:.2%}  on {counted(counts.labelled, 'labelled image')}")
    if counts.other_labels:
        print_line(
            notes,
            f"the labels of {counted(counts.other_labels, 'image')} are of another class list than the model's, so "
            "that they count for no accuracy",
        )
    if counts.turned:
        print_line(
            notes,
            f"{counted(counts.turned, 'image has', 'images have')} an EXIF orientation, which is ignored as in "
            "training; to classify them upright, turn their pixels",
        )

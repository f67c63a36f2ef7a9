"""`coatnet shards build`: images as WebDataset shards."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from data.building.jpeg_encoding import QUALITY, SUBSAMPLING, Subsampling
from jobs.commands.arguments import AsJson, Processes
from jobs.console import make_console
from jobs.exit_codes import exit_on_error
from jobs.shard_building import build_and_report
from pipeline.errors import ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Path or URL: a folder with a folder for each class, a tar with a tar for each class, a flat folder "
            "or tar with --labels, a list (.txt, .tsv, .csv) with lines of PATH<TAB>LABEL [LABEL ...], or an indexed "
            "WebDataset (its folder or index.json).",
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="Folder to write; must be missing or empty.")
    ],
    seed: Annotated[int, typer.Option(help="Seed of the global shuffle and the validation split.")] = 0,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Most images of one tar.", show_default="4096 without --shard-bytes")
    ] = None,
    shard_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Most bytes of one tar, as in 400MB.")] = None,
    validation_per_class: Annotated[
        int, typer.Option(min=0, help="Images of each class for DESTINATION/validation; the rest goes to .../train.")
    ] = 0,
    validation_fraction: Annotated[
        float, typer.Option(min=0, help="Fraction of each class for DESTINATION/validation, instead of a number.")
    ] = 0.0,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Labels of a flat source: lines of NAME LABEL, or of LABEL in the order of the names."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Class list to use: a file with one name per line, or a folder with an index, so that a validation "
            "set gets the class numbers of the training set.",
        ),
    ] = None,
    within: Annotated[str | None, typer.Option(metavar="FOLDER", help="Read only this folder of a tar.")] = None,
    nested: Annotated[
        bool,
        typer.Option("--nested", help="Images in subfolders belong to the class of the folder at the top."),
    ] = False,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave out files and folders of this name, or path if it has a slash, as in '*.bmp' or val/cat; may "
            "be given several times.",
        ),
    ] = None,
    convert: Annotated[
        bool, typer.Option(help="Convert everything else, also BMP, GIF, PPM and TIFF, to upright RGB JPEGs.")
    ] = False,
    short_side: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PIXELS",
            help="Shrink larger images to this short side, and turn all that are EXIF-rotated upright.",
        ),
    ] = None,
    quality: Annotated[
        int, typer.Option(min=1, max=100, help="Quality of the images that are encoded again, as JPEGs.")
    ] = QUALITY,
    subsampling: Annotated[
        Subsampling,
        typer.Option(help="Resolution of colour in the images that are encoded again; 4:2:0 decodes fastest."),
    ] = SUBSAMPLING,
    recompress: Annotated[
        bool,
        typer.Option("--recompress", help="Encode all images again, unless that would not make them smaller."),
    ] = False,
    restart_markers: Annotated[
        bool,
        typer.Option(
            "--restart-markers",
            help="Give JPEGs restart markers, without a loss, so that training decodes only what a crop needs.",
        ),
    ] = False,
    skip_broken: Annotated[bool, typer.Option(help="Leave out images that do not decode.")] = False,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Read only part I of N, from 1, in a job array; then run `shards merge`."),
    ] = None,
    processes: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Write images as shuffled, checked shards with an index; run again, continue where it stopped."""
    with exit_on_error("the same command continues"):
        build_and_report(
            make_console(),
            source,
            destination,
            as_json=as_json,
            seed=seed,
            samples_per_shard=samples_per_shard or (None if shard_bytes else 4096),
            shard_bytes=_bytes(shard_bytes) if shard_bytes is not None else None,
            validation_per_class=validation_per_class,
            validation_fraction=validation_fraction,
            labels=labels,
            classes=classes,
            within=within,
            nested=nested,
            leave_out=leave_out or (),
            convert=convert,
            short_side=short_side,
            quality=quality,
            subsampling=subsampling,
            recompress=recompress,
            restart_markers=restart_markers,
            skip_broken=skip_broken,
            part=_part(part) if part is not None else None,
            processes=processes or processors(),
        )


def processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?I?B?)", text.strip().upper())
    unit = match[2] if match else ""
    try:
        size = int(float(match[1]) * _UNITS[unit if unit in _UNITS else f"{unit}B"]) if match else 0
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise ConfigError(f"--shard-bytes {text}: not a size; write it as in 400MB or 1.5GB")
    return size


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ConfigError(f"--part {text}: not a part; write it as in 3/8")
    return int(match[1]), int(match[2])

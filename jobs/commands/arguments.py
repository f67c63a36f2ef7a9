"""Arguments and options that several commands take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:  # commands that only look at a folder start in half the time without pydantic
    from pipeline.recipe.schema import Recipe

RUN_HELP = "A recipe file, a run folder (runs/NAME), or the folder of one of its stages."

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
StageName = Annotated[str, typer.Argument(metavar="STAGE", help="A stage of the recipe.")]
OptionalStage = Annotated[
    str | None, typer.Argument(metavar="[STAGE]", help="A training stage.", show_default="the first")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the recipe's.", show_default=False),
]
Extend = Annotated[
    bool,
    typer.Option(
        "--extend", help="Stages that have begun with other settings go on with these from their last checkpoints."
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help=RUN_HELP)]
StartedStage = Annotated[
    str | None, typer.Argument(metavar="[STAGE]", help="A training stage.", show_default="the only one")
]
ReplayRanks = Annotated[
    int | None, typer.Option(min=1, help="Processes on this machine.", show_default="the run's, if they fit")
]
ReplayFolder = Annotated[
    Path | None, typer.Option(help="Folder for the results.", show_default="in `replays` of the run folder")
]
ModelLocation = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The run folder of a stage or run, a recipe that has run, a checkpoint, or an exported file or folder.",
    ),
]
Weights = Annotated[
    Literal["auto", "raw", "ema"],
    typer.Option(help="The trained weights (raw) or their moving average (ema); auto prefers ema."),
]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the images in pixels.", show_default="as trained")]
Crop = Annotated[
    Literal["center", "whole"] | None,
    typer.Option(help="The central S / (S + 32), or the whole image resized.", show_default="as trained"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Processes that read, check and write.", show_default="one per processor")
]
Threads = Annotated[int, typer.Option(min=1, help="Shards to read at a time.")]
ShardsUrl = Annotated[str, typer.Argument(metavar="URL", help="Folder or URL of indexed shards.")]

Endpoint = Annotated[
    str | None, typer.Option(help="URL of the S3 server.", show_default="AWS_ENDPOINT_URL, else Amazon's")
]
Profile = Annotated[str | None, typer.Option(help="Profile in the AWS credentials file.")]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="Access the storage without credentials.")]
ShardsElsewhere = Annotated[
    bool, typer.Option("--shards-elsewhere", help="Read shards that a remote index names outside of its own folder.")
]
# Shorter than in a run: someone may be waiting to learn of a typing error in a URL.
GiveUpAfter = Annotated[
    float, typer.Option(min=0, help="Stop when the storage has not answered for this many seconds.")
]


def stage_and_changes(stage: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """The stage and the overrides of a command whose STAGE may be left out before a KEY=VALUE."""
    changes = [text for text in [stage, *(overrides or [])] if text is not None and "=" in text]
    return None if stage is None or "=" in stage else stage, changes


def training_stage(recipe: "Recipe", stage: str | None) -> str:
    """The name of a training stage: that given, or the first one.

    Raises:
        ConfigError: there is none, or it only evaluates.
    """
    from pipeline.errors import ConfigError

    tasks = {name: one.task for name, one in recipe.stages.items()}
    name = stage or next((name for name, task in tasks.items() if task == "train"), "")
    if name not in tasks:
        raise ConfigError(f"recipe {recipe.name} has no stage {name}; its stages are {', '.join(tasks)}")
    if tasks[name] != "train":
        raise ConfigError(f"stage {name} evaluates; name a stage that trains")
    return name

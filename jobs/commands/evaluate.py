"""`coatnet evaluate`: a trained model on indexed shards, on one rank or several."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from data.remote.web_address import split_query
from jobs.commands.arguments import (
    Anonymous,
    AsJson,
    Crop,
    Endpoint,
    GiveUpAfter,
    ImageSize,
    ModelLocation,
    Profile,
    ShardsElsewhere,
    Weights,
)
from jobs.exit_codes import STARTS_OVER, end_process, exit_on_error
from pipeline.errors import ConfigError
from pipeline.faults.preemption import StopSignals


def evaluate(
    model: ModelLocation,
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Folder or URL of indexed shards.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the report.", show_default="in `evaluations` of the run folder, or here"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
    weights: Weights = "auto",
    image_size: ImageSize = None,
    crop: Crop = None,
    label_map: Annotated[
        Path | None,
        typer.Option(help="YAML file that renames classes of the shards to those of the model, or drops some."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes, one for each GPU.")] = 1,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images of one forward pass of a rank.", show_default="as trained, else 64"),
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16", "bf16_autocast"] | None,
        typer.Option(help="Of weights and arithmetic.", show_default="as trained, else fp32"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Compute threads of a rank without a GPU.", show_default="as trained, else all"),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Reader threads of each rank.")] = 4,
    mistakes: Annotated[int, typer.Option(min=0, help="How many of the most confident mistakes to show.")] = 48,
    skipped_share: Annotated[
        float, typer.Option(min=0, max=1, help="End with an error if more than this share of the samples is unusable.")
    ] = 0.001,
    skipped_run: Annotated[
        int, typer.Option(min=1, help="End with an error if a rank reads more unusable samples than this in a row.")
    ] = 32,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for remote shards, on a local disk.", show_default="as for training")
    ] = None,
    cache_gigabytes: Annotated[float, typer.Option(min=1e-6, help="Greatest size of that folder.")] = 100.0,
    as_json: AsJson = False,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    elsewhere: ShardsElsewhere = False,
    give_up_after: GiveUpAfter = 600,
) -> None:
    """Evaluate a trained model on shards: accuracy, calibration, every class, confusion, mistakes."""
    with StopSignals(end_process, STARTS_OVER) as signals, exit_on_error(STARTS_OVER, signals):
        from jobs.checkpoint_discovery import model_location
        from jobs.launch import RankGroup, die_with_launcher, is_rank, launch_group

        model = model_location(model)
        folder = out or default_folder(
            model, shards, weights=weights, image_size=image_size, crop=crop, label_map=label_map
        )
        if is_rank() or ranks == 1:
            if is_rank():
                if ranks != 1 and ranks != int(os.environ["WORLD_SIZE"]):
                    raise ConfigError(
                        f"--ranks {ranks}: this process is one of {os.environ['WORLD_SIZE']} ranks; leave it out"
                    )
                die_with_launcher()
            from jobs.model_evaluation import evaluate_and_print
            from pipeline.evaluation.model_evaluation import EvaluationRequest
            from pipeline.recipe.data_sections import CacheSettings, DataSettings, StorageSettings

            storage = StorageSettings(
                endpoint=endpoint,
                profile=profile,
                anonymous=anonymous,
                give_up_after=max(1e-9, give_up_after),
                shards_elsewhere=elsewhere,
            )
            folder_of_cache = CacheSettings().folder if cache is None else str(cache.absolute())
            data = DataSettings(
                validation=shards,
                validation_label_map=None if label_map is None else str(label_map),
                storage=storage,
                cache=CacheSettings(folder=folder_of_cache, gigabytes=cache_gigabytes),
                skipped_share=skipped_share,
                skipped_run=skipped_run,
                workers=workers,
            )
            request = EvaluationRequest(
                model=model,
                weights=weights,
                data=data,
                crop=crop,
                image_size=image_size,
                batch_size=batch_size,
                precision=precision,
                mistakes=mistakes,
                folder=folder,
                overwrite=overwrite,
                threads=threads,
            )
            evaluate_and_print(request, as_json=as_json)
            return
        from jobs.inherited_environment import discard_foreign_variables
        from pipeline.runs.evaluation_report import create_folder, refuse_existing
        from pipeline.runs.run_folder import RunFolder

        discard_foreign_variables()
        refuse_existing(folder, overwrite=overwrite)
        create_folder(folder)
        logs = RunFolder(folder)
        logs.logs.mkdir(exist_ok=True)
        given = {
            "out": folder,
            "weights": weights,
            "image-size": image_size,
            "crop": crop,
            "label-map": label_map,
            "ranks": ranks,
            "batch-size": batch_size,
            "precision": precision,
            "threads": threads,
            "workers": workers,
            "mistakes": mistakes,
            "skipped-share": skipped_share,
            "skipped-run": skipped_run,
            "cache": cache,
            "cache-gigabytes": cache_gigabytes,
            "endpoint": endpoint,
            "profile": profile,
            "give-up-after": give_up_after,
        }
        flags = {"overwrite": overwrite, "json": as_json, "anonymous": anonymous, "shards-elsewhere": elsewhere}
        options = [f"--{name}={value}" for name, value in given.items() if value is not None]
        options += [f"--{name}" for name, is_set in flags.items() if is_set]
        launch_group(
            ["evaluate", *options, "--", model, shards], RankGroup(ranks, threads or 1, logs.log_file), signals
        )


def default_folder(
    model: str, shards: str, *, weights: str, image_size: int | None, crop: str | None, label_map: Path | None
) -> Path:
    """The folder for the report: named by what is evaluated, in the run folder of the model if that is known."""
    from data.index import FILE_NAME
    from pipeline.model_location import find_model_checkpoint
    from pipeline.runs.evaluation_report import FOLDER

    name = split_query(shards)[0].removesuffix(f"/{FILE_NAME}").rstrip("/").rpartition("/")[2] or "shards"
    name = "shards" if name in (".", "..") else name
    name += f"-{label_map.stem}" if label_map is not None else ""
    name = re.sub(r"[^\w.\-]+", "_", name)
    name += f"-{image_size}px" if image_size else ""
    name += f"-{crop}" if crop else ""
    name += f"-{weights}" if weights != "auto" else ""
    try:
        found = find_model_checkpoint(model)
    except ConfigError:  # an exported model; or none, as opening it will say
        return Path(FOLDER) / name
    if found.folder is None:
        return Path(FOLDER) / name
    if Path(model).absolute() == Path(found.location).absolute():  # one checkpoint of several
        name += f"-{Path(found.location).name}"
    return found.folder.path / FOLDER / name

"""`coatnet plan`: what a stage will cost on a cluster, and what to set there."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data.files.json_records import to_json
from jobs.bundled_recipes import bundled_recipes, load_recipe
from jobs.commands.arguments import AsJson, OptionalStage, Overrides, stage_and_changes, training_stage
from jobs.console import make_console, print_json, print_line
from jobs.exit_codes import exit_on_error
from jobs.planning.failures import show_failures
from jobs.planning.measured import MeasuredGpu, measured_gpu
from jobs.planning.record import json_value, plan_record
from jobs.planning.view import show_plan
from jobs.planning.write import check_recommended, write_recommended
from jobs.recipe_edit import check_editable
from pipeline.errors import ConfigError
from pipeline.monitoring.console import PrintableConsole
from pipeline.planner.datasets import planned_dataset
from pipeline.planner.failures.failure_report import FailureReport, failure_report
from pipeline.planner.failures.useful_time import DAY
from pipeline.planner.hardware import Cluster, find_cluster, gpu_of_size
from pipeline.planner.stage_plan import StagePlan, plan_cost, plan_time
from pipeline.planner.step_estimate import MeasuredSpeed
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.runs.run_folder import run_folder

_CLUSTER = "Cluster"
_FAILURES = "Failures"
_REHEARSAL = "Rehearsal"
_OUTPUT = "Output"
_DAYS = 30.0


def plan(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="A recipe file (YAML), or the name of one that comes with the program."),
    ],
    stage: OptionalStage = None,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Kind of the GPUs, with their memory in GB if there are several, as a100-80.",
            show_default="that of --measured, else of the recipe's gpu_gigabytes",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Their number.", show_default="the recipe's ranks", rich_help_panel=_CLUSTER),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs of a node.", show_default="as in the recipe", rich_help_panel=_CLUSTER),
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GB/s and direction between GPUs of a node.",
            show_default="data sheet",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GB/s and direction of the network for each GPU.",
            show_default="usual for the GPU",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, help="Cores of a node, to compare with the demand.", rich_help_panel=_CLUSTER)
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of a GPU for an hour.", rich_help_panel=_CLUSTER)
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measurements of such a GPU, as `coatnet bench gpu --out FILE` writes them.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Training images.", show_default="of the shards, or of known datasets")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Their classes.", show_default="the same")] = None,
    failures: Annotated[
        bool,
        typer.Option(
            "--failures",
            help="Simulate failures instead: what they cost, how often to save.",
            rich_help_panel=_FAILURES,
        ),
    ] = False,
    node: Annotated[int, typer.Option(min=0, help="The node that fails, from 0.", rich_help_panel=_FAILURES)] = 0,
    at_step: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps taken when it fails.", show_default="half of the stage", rich_help_panel=_FAILURES
        ),
    ] = None,
    during_save: Annotated[
        bool | None,
        typer.Option(
            "--during-save/--between-saves",
            help="Whether a save is in flight then.",
            show_default="as its duration says",
            rich_help_panel=_FAILURES,
        ),
    ] = None,
    node_hours: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Mean hours between failures of one node.",
            show_default="those of Llama 3's training",
            rich_help_panel=_FAILURES,
        ),
    ] = None,
    days: Annotated[
        float, typer.Option(min=0.01, help="Duration of the useful time.", rich_help_panel=_FAILURES)
    ] = _DAYS,
    rehearsal: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="Build some ranks of the job here instead: partitions, files, samples, a reshaped checkpoint.",
            rich_help_panel=_REHEARSAL,
        ),
    ] = False,
    world: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks of the job.", show_default="--gpus", rich_help_panel=_REHEARSAL),
    ] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="A rank to build beside the first, the last and one between; may be repeated.",
            show_default=False,
            rich_help_panel=_REHEARSAL,
        ),
    ] = None,
    reshape_to: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ranks that read a checkpoint of these.",
            show_default="none, or these read the run's",
            rich_help_panel=_REHEARSAL,
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write memory, timeline and scaling as PNG.", rich_help_panel=_OUTPUT),
    ] = None,
    in_tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", help="Show these pictures in the TensorBoard of the run.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Write the recommended settings into the recipe, with comments.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Plan a stage on a cluster before it runs: time, memory, cost, communication, and what to set there.

    From the recipe alone, on any machine, without GPUs and before shards exist. Exits with 78 if the recipe cannot
    run on that cluster.
    """
    with exit_on_error():
        of_cluster = {
            "--gpu": gpu, "--gpus-per-node": gpus_per_node, "--link": link, "--network": network, "--cores": cores,
            "--measured": measured,
        }  # fmt: skip
        _check_together(
            failures,
            rehearsal,
            of_plan={
                "--write": write or None, "--tensorboard": in_tensorboard or None, "--pictures": pictures,
                "--price": price, **(of_cluster if rehearsal else {}),
            },
            of_failures={
                "--node": node or None, "--at-step": at_step, "--during-save or --between-saves": during_save,
                "--node-hours": node_hours, "--days": days if days != _DAYS else None,
            },
            of_rehearsal={"--world": world, "--rank": rank or None, "--reshape-to": reshape_to},
        )  # fmt: skip
        name, changes = stage_and_changes(stage, overrides)
        path = _found(recipe)
        loaded = load_recipe(path, changes)
        name = training_stage(loaded, name)
        found = loaded.stages[name]
        assert isinstance(found, TrainStage)
        if rehearsal:
            _rehearse(loaded, name, world or gpus, rank or [], reshape_to, samples, classes, as_json=as_json)
            return
        bench = None if measured is None else measured_gpu(measured)
        cluster = _cluster(found, gpu, gpus, gpus_per_node, link, network, cores, bench)
        console, progress = make_console(), PrintableConsole(stderr=True)
        if write:
            check_editable(path, name, {"zero_stage": 1})
            check_recommended(loaded, name)
        if in_tensorboard:
            _check_begun(loaded, name)
        with progress.status("tracing a step"):
            speed = None if bench is None else bench.speed(found, cluster)
            dataset = planned_dataset(found, samples, classes)
            if failures:
                planned = plan_time(loaded, name, cluster, dataset, speed)
                step = planned.steps // 2 if at_step is None else at_step
                if step > planned.steps:
                    raise ConfigError(f"--at-step {step}: stage {name} has {planned.steps:,} steps; give one of them")
                report = failure_report(
                    planned.timing, node, step, in_flight=during_save, node_hours=node_hours, duration=days * DAY
                )
            else:
                result = plan_cost(loaded, name, cluster, dataset, price=price, measured=speed)
                if bench is not None:
                    result = replace(result, remarks=(bench.remark(found, speed), *result.remarks))
        if failures:
            _show_failures(report, console, as_json=as_json)
            return
        if as_json:
            print_json(plan_record(result))
        else:
            show_plan(result, console)
        said = progress if as_json else console
        if pictures is not None or in_tensorboard:
            _draw(result, loaded, pictures, in_tensorboard, said, speed)
        if write:
            for line in write_recommended(path, loaded, result, changes):
                print_line(said, line)
        if not result.memory.fits and not write:
            raise ConfigError(
                f"stage {name} does not fit: a GPU needs {result.memory.needed / 1e9:.1f} of "
                f"{result.memory.size / 1e9:.1f} GB; set what is recommended above, or plan other GPUs"
            )


def _check_together(
    failures: bool,
    rehearsal: bool,
    *,
    of_plan: Mapping[str, object],
    of_failures: Mapping[str, object],
    of_rehearsal: Mapping[str, object],
) -> None:
    """Check that no option is given that would have no effect; those not given are None.

    Raises:
        ConfigError: one is.
    """
    if failures and rehearsal:
        raise ConfigError("--failures, --rehearse: each shows something else; leave out one of them")
    mode = "--failures" if failures else "--rehearse" if rehearsal else ""
    for needed, options in (("", of_plan), ("--failures", of_failures), ("--rehearse", of_rehearsal)):
        unused = ", ".join(name for name, value in options.items() if value is not None)
        if unused and needed != mode:
            fix = f"without {needed}; add that" if needed else f"with {mode}; leave out one of them"
            raise ConfigError(f"{unused}: of no effect {fix}")


def _rehearse(
    recipe: Recipe,
    name: str,
    world: int | None,
    ranks: list[int],
    reshape_to: int | None,
    samples: int | None,
    classes: int | None,
    *,
    as_json: bool,
) -> None:
    """Rehearse the stage and show it.

    Raises:
        ConfigError: something would stop the job.
    """
    from jobs.planning.rehearsal import show_rehearsal
    from pipeline.rehearsal.rehearse import rehearse
    from pipeline.rehearsal.sample_shares import AssumedData

    stage = recipe.stages[name]
    assert isinstance(stage, TrainStage)
    dataset = planned_dataset(stage, samples, classes)
    assumed = None
    if not dataset.is_assumed and (samples is not None or classes is not None):
        raise ConfigError(
            f"--samples, --classes: of no effect on a rehearsal, which uses {dataset.source}; leave them out"
        )
    if dataset.is_assumed:
        assumed = AssumedData(dataset.samples, dataset.classes, bytes_per_sample=round(dataset.image_bytes.value))
    with PrintableConsole(stderr=True).status("building ranks"):
        result = rehearse(recipe, name, world, ranks, reshape_to, assumed)
    if as_json:
        print_json(to_json(result))
    else:
        show_rehearsal(result, make_console())
    if result.fails:
        errors = [one.what for one in result.findings if one.level == "error"]
        errors += [one.refused for one in result.reshapes if one.refused]
        raise ConfigError(f"the job would not run: {'; '.join(errors)}")


def _show_failures(report: FailureReport, console: Console, *, as_json: bool) -> None:
    if as_json:
        print_json(json_value(report))
    else:
        show_failures(report, console)


def _found(recipe: Path) -> Path:
    """The file of the recipe: itself, or that of a recipe that comes with the program.

    Raises:
        ConfigError: it is a name, and there is neither a file nor a recipe of that name.
    """
    if recipe.parent != Path() or recipe.suffix or recipe.exists():
        return recipe
    known = bundled_recipes()
    if recipe.name not in known:
        near = difflib.get_close_matches(recipe.name, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`coatnet recipes` lists those"
        raise ConfigError(f"recipe {recipe}: no such file, and none of the recipes that come with the program; {hint}")
    return known[recipe.name]


def _cluster(
    stage: TrainStage,
    gpu: str | None,
    gpus: int | None,
    gpus_per_node: int | None,
    link: float | None,
    network: float | None,
    cores: int | None,
    bench: MeasuredGpu | None,
) -> Cluster:
    resources = stage.resources
    number = gpus or resources.ranks
    name = gpu or (bench.name if bench else None) or gpu_of_size(resources.gpu_gigabytes)
    return find_cluster(
        name,
        number,
        gpus_per_node or min(number, max(8, resources.ranks_per_node) if gpus else resources.ranks_per_node),
        link=None if link is None else link * 1e9,
        network=None if network is None else network * 1e9,
        cores_per_node=cores,
        efficiencies=None if bench is None else bench.efficiencies(),
    )


def _check_begun(recipe: Recipe, stage: str) -> None:
    run = run_folder(recipe, stage)
    if not run.path.is_dir():
        raise ConfigError(
            f"--tensorboard: {run.path} does not exist yet, since stage {stage} has not begun; use --pictures FOLDER, "
            "or repeat this when it has"
        )


def _draw(
    result: StagePlan,
    recipe: Recipe,
    folder: Path | None,
    in_tensorboard: bool,
    console: Console,
    speed: MeasuredSpeed | None,
) -> None:
    from jobs.planning.pictures import plan_pictures
    from pipeline.planner.pictures.write import show_in_tensorboard, write_pictures

    drawn = plan_pictures(result, speed)
    if folder is not None:
        for path in write_pictures(folder, drawn):
            print_line(console, f"wrote {path}")
    if in_tensorboard:
        run = run_folder(recipe, result.name)
        show_in_tensorboard(run, drawn)
        print_line(console, f"TensorBoard shows them as plan/memory, plan/timeline and plan/scaling of {run.path}")

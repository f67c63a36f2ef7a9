"""`coatnet bench gpu`: what one GPU does with a stage, and what to set in the recipe."""

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from data.errors import EXIT_TRY_AGAIN, CoatnetError
from data.files.atomic_file import write_atomically
from data.files.json_records import to_json
from data.text.counted import counted
from data.text.printable import printable
from jobs.bundled_recipes import load_recipe
from jobs.commands.arguments import (
    AsJson,
    OptionalStage,
    Overrides,
    RecipePath,
    stage_and_changes,
    training_stage,
)
from jobs.console import make_console, print_json, print_line
from jobs.exit_codes import exit_on_error
from jobs.gpu_benchmark_tables import show_benchmark
from jobs.recipe_edit import check_editable, write_settings
from pipeline.burn_in.verdict import suspects
from pipeline.compiler import check_compiler
from pipeline.errors import ConfigError, RunFailed
from pipeline.gpu_benchmark.measure import OPTIONAL, BenchmarkRequest, measure
from pipeline.gpu_benchmark.record import GpuBenchmark
from pipeline.gpu_benchmark.subject import MOST_ROUNDS, rounds_of
from pipeline.gpu_benchmark.variants import EAGER, all_settings
from pipeline.model_check import check_model
from pipeline.monitoring.console import PrintableConsole
from pipeline.plan import check_ranks, open_stage_dataset
from pipeline.ranks.gpus import has_gpu
from pipeline.recipe.schema import Recipe, TrainStage

_ASSUMED_CLASSES = 1000
_INDEX_SECONDS = 10.0  # for the index of remote shards, of which only the number of classes is wanted


def gpu(
    recipe: RecipePath,
    stage: OptionalStage = None,
    overrides: Overrides = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="For all measurements; what does not fit is left out and named.")
    ] = 3.0,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Beside a step measure only this; may be given several times: {', '.join(OPTIONAL)}.",
            show_default="all",
        ),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes.", show_default="those of the shards, else 1,000")
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(help="Folder on the disk to save to; what is written is removed.", show_default="TMPDIR"),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write the measured settings that no result depends on into the recipe.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON of --json to this file, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure on one GPU, in minutes: a step, equal bits, variants, parts, memory, copies, saves; what to set.

    Equal bits are checked on every GPU that is visible. Nothing is read: images are noise.

    Without a GPU it measures the CPU, which says nothing about GPUs.
    """
    with exit_on_error():
        name, changes = stage_and_changes(stage, overrides)
        found = load_recipe(recipe, changes)
        name = training_stage(found, name)
        settings = found.stages[name]
        assert isinstance(settings, TrainStage)
        _check(found, name, settings, only)
        console, progress = make_console(), PrintableConsole(stderr=True)
        on_gpu = settings.resources.gpus_per_rank > 0 and has_gpu()
        if write:
            _check_write(recipe, name, settings, on_gpu)
        count, source = _classes(settings, classes)
        request = BenchmarkRequest(
            recipe=found,
            stage=name,
            classes=count,
            rounds=min(MOST_ROUNDS, rounds_of(settings)),
            minutes=minutes,
            scratch=_scratch(scratch),
            only=only or OPTIONAL,
            overrides=tuple(changes),
        )
        if not as_json:
            _introduce(console, request, source, on_gpu)
        with _noted_signals() as raise_if_arrived, progress.status("starting") as status:

            def show(text: str) -> None:
                raise_if_arrived()
                status.update(text)

            result = measure(request, show=show, say=lambda line: print_line(progress, line))
        _finish(result, request, recipe, console, only=only, as_json=as_json, out=out, write=write)


class _Stopped(CoatnetError):
    """A signal has arrived; what was measured so far is not shown."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True


@contextmanager
def _noted_signals() -> Iterator[Callable[[], None]]:
    """Gives a function that raises if a signal to stop has arrived inside.

    If the signal itself raised, that could be while a process is started that nobody would end then.
    """
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in arrived:
            raise KeyboardInterrupt
        arrived.append(number)

    def raise_if_arrived() -> None:
        if signal.SIGINT in arrived:
            raise KeyboardInterrupt
        if arrived:
            raise _Stopped(f"stopped by {signal.Signals(arrived[0]).name}")

    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # as by nohup
    ]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield raise_if_arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(
    result: GpuBenchmark,
    request: BenchmarkRequest,
    recipe: Path,
    console: Console,
    *,
    only: list[str] | None,
    as_json: bool,
    out: Path | None,
    write: bool,
) -> None:
    """Show and write what was found.

    Raises:
        RunFailed: a GPU computes wrong values, a measurement failed, or what was asked for by name was not measured or
            could not be written.
        ConfigError: `out` cannot be written.
    """
    if out is not None:
        try:
            write_atomically(out, json.dumps(to_json(result), indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}") from None
    if as_json:
        print_json(to_json(result))
    else:
        show_benchmark(result, console)
    if wrong := suspects(result.burn_in.devices if result.burn_in else ()):
        problem = f"{wrong[0].text}; take it out of use before anything is trained on it"
    elif result.failed:
        names = ", ".join(one.name for one in result.failed)
        problem = f"of the measurements, {names} failed; the others stand, and --json has what these printed"
    elif result.step is None:
        problem = "not even a step was measured: give it more time with --minutes"
    elif asked_for := [one for one in result.unmeasured if one.name in (only or ())]:
        missing = ", ".join(f"{one.name} ({one.reason})" for one in asked_for)
        problem = f"--only: not measured: {missing}"
    else:
        problem = None
    if write:
        _write(result, request, recipe, PrintableConsole(stderr=True) if as_json else console)
    if problem is not None:
        raise RunFailed(problem)


def _check(recipe: Recipe, name: str, stage: TrainStage, only: list[str] | None) -> None:
    """Check what needs no measurement, so that mistakes show at once.

    Raises:
        ConfigError: what is wrong.
    """
    where = f"stage {name}: "
    check_model(recipe, stage, where)
    check_ranks(stage, stage.resources.ranks, where)
    if stage.compile:
        check_compiler(where)
    for chosen in only or []:
        if chosen not in OPTIONAL:
            near = get_close_matches(chosen, OPTIONAL, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(OPTIONAL)}"
            raise ConfigError(f"--only {chosen}: there is no such measurement; {hint}")


def _check_write(path: Path, name: str, stage: TrainStage, on_gpu: bool) -> None:
    if stage.resources.gpus_per_rank and not on_gpu:
        raise ConfigError(
            f"--write: stage {name} is for GPUs and there is none here, so what would be written is measured on the "
            "wrong device; leave --write out"
        )
    check_editable(path, name, all_settings(EAGER) | {"deterministic": stage.deterministic})


def _classes(stage: TrainStage, given: int | None) -> tuple[int, str]:
    """The number of classes, and where it is from."""
    if given is not None:
        return given, "by --classes"
    storage = stage.data.storage
    quick = storage.model_copy(update={"give_up_after": min(storage.give_up_after, _INDEX_SECONDS)})
    asked = stage.model_copy(update={"data": stage.data.model_copy(update={"storage": quick})})
    try:
        return len(open_stage_dataset(asked, "train", "").classes), f"of {stage.data.train}"
    except CoatnetError as error:
        return _ASSUMED_CLASSES, f"assumed: {str(error).partition(';')[0]}"


def _scratch(folder: Path | None) -> Path:
    found = folder or Path(tempfile.gettempdir())
    if not found.is_dir() or not os.access(found, os.W_OK):
        raise ConfigError(f"--scratch {found}: is not a folder that can be written; name one on a disk with room")
    return found


def _introduce(console: Console, request: BenchmarkRequest, source: str, on_gpu: bool) -> None:
    stage = request.settings
    if not on_gpu:
        why = "there is no GPU here" if stage.resources.gpus_per_rank else "resources.gpus_per_rank is 0"
        print_line(console, ("measured on the CPU", "yellow"), f", since {why}: this tells nothing about GPUs")
    print_line(
        console,
        f"{request.stage}: {stage.model.name} at {stage.resolution} pixels, {stage.precision}, on one rank, with noise "
        f"instead of shards; {request.classes:,} classes ({source})",
    )
    own = rounds_of(stage)
    capped = f" ({own} on each rank of the stage)" if own != request.rounds else ""
    micro = f"{counted(request.rounds, 'micro-batch', 'micro-batches')} of {stage.batch.micro_size}"
    ranks = stage.resources.ranks
    shared = f"; it holds what the {ranks} ranks of the stage share" if ranks > 1 else ""
    print_line(console, f"a step has {micro}{capped}{shared}")


def _write(result: GpuBenchmark, request: BenchmarkRequest, recipe: Path, console: Console) -> None:
    """Write the choices that may be written, each with what it was measured on."""
    settings = {one.setting: one.value for one in result.choices if one.writable}
    if not settings:
        raise RunFailed(f"--write: nothing was written to {recipe}, since what decides was not measured")
    given = f" with {' '.join(request.overrides)}" if request.overrides else ""
    comment = f"measured on {result.device.name}, {result.date}, by coatnet bench gpu{given}"
    write_settings(recipe, request.stage, settings, printable(comment))
    lines = ", ".join(f"{name}: {str(value).lower()}" for name, value in settings.items())
    print_line(console, f"wrote to stage {request.stage} of {recipe}: {lines}")

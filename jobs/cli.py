"""The `coatnet` command."""

import io
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from jobs.lazy_commands import LazyCommand, lazy_group
from jobs.packages import secure_packages

_EXIT_CONFIG = 78  # data.errors.EXIT_CONFIG
_EXIT_INTERRUPTED = 130  # data.errors.EXIT_INTERRUPTED, which may be out of reach here

COMMANDS = {
    "run": "Run all stages of a recipe on this machine; run again, continue where it stopped.",
    "train": "Run one stage: all its ranks on this machine, or one rank if RANK and WORLD_SIZE are set.",
    "demo": "Pretrain, fine-tune and evaluate a small CoAtNet on 10,000 product photos: minutes on two CPU cores.",
    "shards": "Build, index, verify and show WebDataset shards.",
    "recipes": "List, show and copy the recipes that come with the program.",
    "plan": "Plan a stage on a cluster before it runs: time, memory, cost, communication, and what to set there.",
    "doctor": "Check a recipe for everything that would stop it or slow it down, with fixes.",
    "submit": "Submit all stages to Slurm; run again, submit only those that failed or are new.",
    "status": "Show job, state, progress, last checkpoint and time left of each stage; compare the runs of a sweep.",
    "tensorboard": "Show the curves of a run in TensorBoard on this machine until Ctrl-C, or write them as CSV.",
    "report": "Write a run as one HTML file: recipe, machine, curves, what happened, evaluations.",
    "logs": "Print the end of a job's log, or of rank 0's for a run without Slurm.",
    "cancel": "Cancel the jobs of a run or a sweep; running ranks save first if Slurm's KillWait allows.",
    "checkpoints": "List and verify the checkpoints of a run.",
    "replay": "Recompute any step of a run from its checkpoints, compare it with the log, and look into it.",
    "verify": "Recompute random steps of a run, and compare them with its log and its checkpoints.",
    "predict": "Classify images with a trained model: the best classes of each, as a table, JSON, CSV or a picture.",
    "evaluate": "Evaluate a trained model on shards: accuracy, calibration, every class, confusion, mistakes.",
    "export": "Write a trained model for use elsewhere: safetensors with a config, timm's form, ONNX or torch.export.",
    "models": "List the model variants with layers, parameters, multiply-adds and memory, and the paper's figures.",
    "order": "Print the samples of one step: rank, position in the batch, shard, index in the shard, key.",
    "bench": "Measure whether this machine can keep up with a recipe, and what its GPU does with it.",
}

app = typer.Typer(
    cls=lazy_group({name: LazyCommand(f"jobs.commands.{name}", help, name) for name, help in COMMANDS.items()}),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"coatnet {version('coatnet-pretraining')}")
        except PackageNotFoundError:
            print("coatnet (a checkout that is not installed)")
        raise typer.Exit


@app.callback()
def _coatnet(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pretrain and fine-tune CoAtNet."""


def _escape_output() -> None:
    """Let standard output and error take every string, in every locale: what is not printable there is escaped."""
    from data.text.printable import printable_stream

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = printable_stream(sys.stdout), printable_stream(sys.stderr)


def main() -> None:
    """Entry point of the `coatnet` command, once everything is imported; see `jobs.__main__`."""
    secure_packages()
    from data.files.user_account import complete_account, unused_temporary_folder  # ours by now

    complete_account(os.environ)
    _escape_output()
    level = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF")
    if level.upper() not in ("OFF", "INFO", "DETAIL"):  # torch cannot even be imported
        print(
            f"error: TORCH_DISTRIBUTED_DEBUG={level} in the environment: torch takes OFF, INFO or DETAIL; correct it, "
            "or unset it",
            file=sys.stderr,
        )
        sys.exit(_EXIT_CONFIG)
    if os.environ.get("RANK", "0") == "0" and (remark := unused_temporary_folder()) is not None:
        print(f"warning: {remark}", file=sys.stderr)
    try:
        app(prog_name="coatnet")
    except SystemExit as end:
        if end.code != _EXIT_INTERRUPTED:
            raise
        if isinstance(end.__context__, typer.Exit):  # typer's, which has no message, before the command began
            print("error: stopped; nothing was started", file=sys.stderr)
        # Python would end by SIGINT if that arrived during an import, and wait for threads that read.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_EXIT_INTERRUPTED)

"""`coatnet verify`: whether the log and the checkpoints of a run are what its recipe and its data lead to."""

import sys
from typing import Annotated

import typer

from data.errors import EXIT_CONFIG
from jobs.commands.arguments import AsJson, ReplayFolder, ReplayRanks, RunPath, StartedStage, stage_and_changes
from jobs.exit_codes import STARTS_OVER, end_process, exit_on_error
from pipeline.errors import ConfigError
from pipeline.faults.preemption import StopSignals


def verify(
    run: RunPath,
    stage: StartedStage = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings that any start may change, such as data.train=FOLDER.",
            show_default=False,
        ),
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="How many logged steps to draw.")] = 20,
    within: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most steps from a kept checkpoint to a step that is drawn.", show_default="those between saves"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw: the same number draws the same steps.")] = 0,
    ranks: ReplayRanks = None,
    out: ReplayFolder = None,
    as_json: AsJson = False,
) -> None:
    """Recompute random steps of a run, and compare them with its log and its checkpoints.

    Exit code 78 if something differs.
    """
    with StopSignals(end_process, STARTS_OVER) as signals, exit_on_error(STARTS_OVER, signals):
        from jobs.launch import RankGroup, die_with_launcher, is_rank, launch_group
        from jobs.replay.target import folder_of_ranks, prepared_output, ranks_here, stage_folder
        from pipeline.runs.run_folder import RunFolder

        name, changes = stage_and_changes(stage, overrides)
        folder = stage_folder(run, name)
        if not is_rank():
            from jobs.inherited_environment import discard_foreign_variables
            from pipeline.replay.recorded_stage import open_recorded_stage

            recorded = open_recorded_stage(folder, changes)
            if recorded.branch is not None:
                raise ConfigError(f"{recorded.branched[0]}: a run is verified with its own settings")
            count = ranks_here(recorded.stage, folder, 0, sys.maxsize, ranks)
            place = prepared_output((out or folder.replays / "verification").absolute())
            options = [f"--sample={sample}", f"--seed={seed}", f"--ranks={count}", f"--out={place}"]
            options += [f"--within={within}"] if within else []
            options += ["--json"] if as_json else []
            discard_foreign_variables()
            group = RankGroup(count, recorded.stage.resources.threads_per_rank, RunFolder(place).log_file)
            launch_group(["verify", *options, "--", str(folder.path), folder.path.name, *changes], group, signals)
            from jobs.replay.rank import verification_holds

            if not verification_holds(place):
                sys.exit(EXIT_CONFIG)
            return
        die_with_launcher()
        from jobs.replay.rank import verify_and_print
        from pipeline.replay.verification import VerificationRequest

        request = VerificationRequest(
            folder=folder.path,
            out=folder_of_ranks(out, ranks),
            sample=sample,
            within=within,
            seed=seed,
            overrides=tuple(changes),
        )
        verify_and_print(request, as_json=as_json)

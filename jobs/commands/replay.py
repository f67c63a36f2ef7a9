"""`coatnet replay`: any step of a run again, beside what was logged, and looked into."""

import hashlib
import re
from typing import Annotated

import typer

from jobs.commands.arguments import AsJson, ReplayFolder, ReplayRanks, RunPath, StartedStage, stage_and_changes
from jobs.exit_codes import STARTS_OVER, end_process, exit_on_error
from pipeline.errors import ConfigError
from pipeline.faults.preemption import StopSignals

_LONGEST_NAME = 120


def replay(
    run: RunPath,
    stage: StartedStage = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Other settings: from --step on as a branch, or throughout if any start may change them.",
            show_default=False,
        ),
    ] = None,
    step: Annotated[int, typer.Option(min=1, help="The step to recompute, as TensorBoard counts them.")] = ...,  # type: ignore[assignment]
    until: Annotated[
        int | None, typer.Option(min=1, help="The last step to recompute.", show_default="that of --step")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Leave this sample out from --step on; may be repeated.", show_default=False),
    ] = None,
    without_optimizer: Annotated[
        bool,
        typer.Option(
            "--without-optimizer",
            help="Only look at the forward of the step, with the weights of the newest checkpoint before it.",
        ),
    ] = False,
    curves_only: Annotated[
        bool, typer.Option("--curves-only", help="Do not look into the steps: faster, and with less memory.")
    ] = False,
    bisect: Annotated[
        bool,
        typer.Option("--bisect", help="Find the smallest set of samples that makes a micro-batch not finite."),
    ] = False,
    as_run: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Make the branch a run of its own, which can go on.")
    ] = None,
    ranks: ReplayRanks = None,
    out: ReplayFolder = None,
    as_json: AsJson = False,
) -> None:
    """Recompute any step of a run from its checkpoints, compare it with the log, and look into it."""
    with StopSignals(end_process, STARTS_OVER) as signals, exit_on_error(STARTS_OVER, signals):
        from jobs.launch import RankGroup, die_with_launcher, is_rank, launch_group
        from jobs.replay.target import (
            folder_of_ranks,
            named_samples,
            prepared_output,
            ranks_here,
            run_beside,
            stage_folder,
        )
        from pipeline.replay.memory_advice import memory_advice
        from pipeline.replay.recorded_stage import check_training_shards, open_recorded_stage
        from pipeline.runs.run_folder import RunFolder

        name, changes = stage_and_changes(stage, overrides)
        folder, last, left_out = stage_folder(run, name), until or step, tuple(without or ())
        if last < step:
            raise ConfigError(f"--until {last}: is before --step {step}")
        if without_optimizer and (bisect or as_run or left_out or last > step):
            raise ConfigError("--without-optimizer looks at one forward; leave --until, --without, --bisect, --as out")
        if curves_only and (bisect or without_optimizer):
            other = "--bisect" if bisect else "--without-optimizer"
            raise ConfigError(f"--curves-only looks into no step, and {other} does: leave one of them out")
        branch_run = run_beside(folder, as_run) if as_run and not is_rank() else None
        if not is_rank():
            recorded = open_recorded_stage(folder, changes, step=step - 1)
            plan, branch, _ = recorded.plans(step - 1, last)
            check_training_shards(plan)
            if left_out:
                left_out = named_samples(branch or plan, left_out, step - 1, last)
                recorded = open_recorded_stage(folder, changes, left_out, step=step - 1)
                recorded.plans(step - 1, last)
            if as_run and recorded.branch is None:
                raise ConfigError(f"--as {as_run}: there is no branch; give it other settings, or --without samples")
            if without_optimizer and recorded.branch is not None:
                raise ConfigError(f"{recorded.branched[0]}: --without-optimizer looks at the step as it was")
            count = ranks_here(recorded.stage, folder, step - 1, last, ranks)
            folder_out = prepared_output(
                (out or folder.replays / _folder_name(step, last, changes, left_out)).absolute()
            )
            options = [f"--step={step}", f"--until={last}", f"--ranks={count}", f"--out={folder_out}"]
            options += [f"--without={sample}" for sample in left_out] + ([f"--as={as_run}"] if as_run else [])
            flags = {
                "without-optimizer": without_optimizer,
                "curves-only": curves_only,
                "bisect": bisect,
                "json": as_json,
            }
            options += [f"--{flag}" for flag, is_set in flags.items() if is_set]
            from jobs.inherited_environment import discard_foreign_variables

            discard_foreign_variables()
            needs = {"look_inside": not curves_only, "forward_only": without_optimizer}
            group = RankGroup(
                count,
                recorded.stage.resources.threads_per_rank,
                RunFolder(folder_out).log_file,
                memory_advice=lambda: memory_advice(recorded.stage, count, **needs),
            )
            launch_group(["replay", *options, "--", str(folder.path), folder.path.name, *changes], group, signals)
            if branch_run:
                from jobs.replay.branch_recipe import write_branch_recipe

                write_branch_recipe(branch_run, folder, as_json=as_json)
            return
        die_with_launcher()
        from jobs.replay.rank import replay_and_print
        from pipeline.replay.replay import ReplayRequest

        request = ReplayRequest(
            folder=folder.path,
            step=step,
            until=last,
            out=folder_of_ranks(out, ranks),
            overrides=tuple(changes),
            without=left_out,
            look_inside=not curves_only,
            forward_only=without_optimizer,
            bisect=bisect,
            branch_run=folder.path.parent.parent / as_run if as_run else None,
        )
        replay_and_print(request, as_json=as_json)


def _folder_name(step: int, until: int, changes: list[str], without: tuple[str, ...]) -> str:
    """Of the results: by what is recomputed."""
    name = f"step-{step:08d}" + (f"-{until:08d}" if until > step else "")
    for part in (*changes, *(f"without-{sample}" for sample in without)):
        name += "-" + re.sub(r"[^\w.=\-]+", "_", part)
    if len(name) <= _LONGEST_NAME:
        return name
    distinct = hashlib.sha256(name.encode()).hexdigest()[:8]  # what is cut off may be all that distinguishes two
    return f"{name[: _LONGEST_NAME - 9]}-{distinct}"

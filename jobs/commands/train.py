"""`coatnet train`: one stage, as its ranks or as one of them."""

import os

from jobs.commands.arguments import Extend, Overrides, RecipePath, StageName
from jobs.exit_codes import end_process, exit_on_error
from pipeline.errors import ConfigError
from pipeline.faults.preemption import StopSignals


def train(recipe: RecipePath, stage: StageName, overrides: Overrides = None, extend: Extend = False) -> None:
    """Run one stage: all its ranks on this machine, or one rank if RANK and WORLD_SIZE are set."""
    with StopSignals(end_process) as signals, exit_on_error(signals=signals):
        # These imports take seconds, in which a signal to stop must already be handled; the launcher needs no torch.
        from jobs.bundled_recipes import load_recipe
        from jobs.launch import die_with_launcher, is_rank, launch_time

        if is_rank():
            die_with_launcher()
            if extend:
                raise ConfigError(
                    "--extend is for the command that starts the ranks, and RANK is set: give it to coatnet run, train "
                    "or submit once without RANK, after which ranks follow the record in the run folder"
                )
            from jobs.inherited_environment import discard_foreign_job
            from jobs.scheduler.job_end import job_end_time, node_name
            from pipeline.stage import run_stage

            discard_foreign_job(quietly=os.environ["RANK"] != "0")
            run_stage(
                load_recipe(recipe, overrides),
                stage,
                signals,
                node=node_name(os.environ),
                started=launch_time(signals.started),
                job_end_time=lambda: job_end_time(os.environ),
            )
        else:
            from jobs.chain import result_table, run_one
            from jobs.console import make_console

            loaded, console = load_recipe(recipe, overrides), make_console(bounded=True)
            run_one(loaded, stage, console, signals, extend=extend)
            console.print(result_table(loaded))

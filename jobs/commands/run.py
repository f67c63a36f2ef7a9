"""`coatnet run`: all stages of a recipe on this machine."""

from jobs.chain import run_chain
from jobs.commands.arguments import Extend, Overrides, RecipePath
from jobs.console import make_console
from jobs.exit_codes import end_process, exit_on_error
from pipeline.faults.preemption import StopSignals


def run(recipe: RecipePath, overrides: Overrides = None, extend: Extend = False) -> None:
    """Run all stages of a recipe on this machine; run again, continue where it stopped."""
    with StopSignals(end_process) as signals, exit_on_error(signals=signals):
        run_chain(recipe, overrides or [], make_console(bounded=True), signals, extend=extend)

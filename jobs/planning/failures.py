"""What failures cost a run as tables."""

from rich.console import Console

from data.text.counted import counted
from jobs.console import make_table, print_line
from pipeline.planner.failures.failure_report import FailureReport
from pipeline.planner.failures.outcome import NOT_COUNTED, FailureOutcome
from pipeline.planner.failures.run_timing import Ending
from pipeline.planner.failures.save_interval import SaveInterval
from pipeline.planner.figures import Figure

_DAY = 86_400.0


def show_failures(result: FailureReport, console: Console) -> None:
    """Print what one failure costs, what all of a duration do, how often to save, and what that rests on."""
    for show in (_timing, _outcomes, _useful_time, _intervals, _origins):
        show(result, console)


def _timing(result: FailureReport, console: Console) -> None:
    run = result.run
    print_line(
        console,
        f"{counted(run.nodes, 'node')} of {counted(run.ranks_per_node, 'rank')}: a step takes {duration(run.step)}, a "
        f"start {duration(run.start)}, and every {run.interval:,} steps ({duration(run.work)}) a save, for which "
        f"training waits {duration(run.save.stall)} and which counts {duration(run.save.write)} later",
    )
    if run.write_binds:
        print_line(
            console,
            ("a save takes longer than the steps between two, so that training waits for it: ", "yellow"),
            f"{duration(run.cycle - run.work)} at each",
        )


def _outcomes(result: FailureReport, console: Console) -> None:
    first = result.outcomes[0]
    _heading(console, f"after {first.step:,} steps")
    if first.in_flight is None:
        print_line(console, "  no save is in flight")
    else:
        left = first.in_flight.seconds_left
        print_line(
            console, f"  the save of step {first.in_flight.step:,} is in flight, {duration(left)} before it counts"
        )
    right = (
        "ended by",
        "after",
        "continues from",
        "lost steps",
        "samples",
        "queue",
        "start",
        "again",
        "at that step after",
    )
    table = make_table("what happens", *right, right=right)
    for one in result.outcomes:
        table.add_row(
            _what(result, one), _ended_by(one), duration(one.notice_seconds), f"{one.continues_from:,}",
            f"{one.lost_steps:,}", f"{one.lost_samples:,}", duration(one.requeue_seconds), duration(one.start_seconds),
            duration(one.redone_seconds), duration(one.seconds),
        )  # fmt: skip
    console.print(table)
    print_line(console, "  lost samples are trained on again: the run counts each once, and ends with the same weights")


def _what(result: FailureReport, one: FailureOutcome) -> str:
    ranks = f"rank {one.ranks.start}" if len(one.ranks) == 1 else f"ranks {one.ranks.start} to {one.ranks.stop - 1}"
    return {
        Ending.NODE: f"node {result.node} dies, {ranks}",
        Ending.RANK: f"{ranks} is killed",
        Ending.HANG: f"{ranks} hangs",
        Ending.SIGNAL: "SIGTERM, as before a preemption" + (", and the save is not in time" if one.lost_steps else ""),
    }[one.ending]


def _ended_by(one: FailureOutcome) -> str:
    return "Slurm" if one.exit_code is None else f"exit {one.exit_code}"


def _useful_time(result: FailureReport, console: Console) -> None:
    found, simulated = result.useful, result.simulation
    _heading(console, f"useful time in {result.duration / _DAY:,.3g} days")
    print_line(
        console,
        f"  a failure every {duration(found.seconds_between_failures)}, {found.failures:,.1f} in all, if one node has "
        f"one every {result.node_hours:,.0f} h",
    )
    error = f" ± {simulated.error:.2%}" if len(simulated.runs) > 1 else ""
    print_line(
        console,
        "  ",
        (f"{found.exact:.2%}", "bold"),
        f" by formula, {found.first_order:.2%} to first order, {simulated.share:.2%}{error} in "
        f"{counted(len(simulated.runs), 'simulated run')}; saves alone take {found.saving:.2%}",
    )
    if found.gives_up >= 0.01:
        print_line(
            console,
            ("  three starts in a row without a new checkpoint end the run with exit code 70", "yellow"),
            f": {found.gives_up:,.2f} times, by formula; a person has to start it again",
        )


def _intervals(result: FailureReport, console: Console) -> None:
    _heading(console, "steps between saves")
    advice = result.intervals
    table = make_table("", "steps", "time", "useful", right=("steps", "time", "useful"))
    rows: tuple[tuple[str, SaveInterval], ...] = (
        ("of the recipe", advice.own), ("by Young", advice.young), ("by Daly", advice.daly), ("best", advice.best),
    )  # fmt: skip
    for name, one in rows:
        table.add_row(name, f"{one.steps:,}", duration(one.seconds), f"{one.share:.2%}")
    console.print(table)
    if advice.write_binds:
        print_line(
            console,
            "  a save takes longer than Daly's interval, and the next one waits for it: the best one is as long",
        )


def _origins(result: FailureReport, console: Console) -> None:
    _heading(console, "what it rests on")
    failures = result.run.known.failures
    named = {
        "hours between failures of a node": failures.node_hours,
        "seconds until a closed connection is noticed": failures.connection_closed,
        "seconds until Slurm misses a node": failures.node_missed,
        "seconds for a save when a rank is lost": failures.lost_rank_patience,
        "seconds until a requeued job starts": failures.requeue_delay,
    }
    for name, figure in named.items():
        given = " (another was given)" if figure is failures.node_hours and figure.value != result.node_hours else ""
        print_line(console, f"  {name}: {_figure(figure)}{given}; {figure.origin}")
    print_line(
        console, f"  seconds that a step may take, by the watchdog: {result.run.watchdog_limit:,.0f}; the recipe"
    )
    _heading(console, "not counted")
    for line in NOT_COUNTED:
        print_line(console, f"  {line}")


def _figure(figure: Figure) -> str:
    if figure.known:
        return f"{figure.value:,g}"
    return f"{figure.value:,g} (from {figure.least:,g} to {figure.most:,g})"


def _heading(console: Console, text: str) -> None:
    print_line(console, "")
    print_line(console, (text, "bold"))


def duration(seconds: float) -> str:
    """Seconds for people, in the unit that suits their number."""
    for unit, length in (("days", 2 * _DAY), ("h", 5400.0), ("min", 90.0)):
        if seconds >= length:
            return f"{seconds / {'days': _DAY, 'h': 3600.0, 'min': 60.0}[unit]:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds >= 1 or seconds == 0 else f"{1000 * seconds:,.0f} ms"

"""The tables of failures."""

import io
from dataclasses import replace

from jobs.planning.failures import show_failures
from pipeline.monitoring.console import PrintableConsole
from pipeline.planner.failures.failure_report import FailureReport, failure_report
from pipeline.planner.failures.outcome import NOT_COUNTED
from pipeline.planner.failures.run_timing import RunTiming, SaveCost

RUN = RunTiming(nodes=64, ranks_per_node=8, batch=4096, step=0.5, interval=1000, save=SaveCost(2.0, 200.0), start=60.0)


def shown(result: FailureReport) -> str:
    text = io.StringIO()
    show_failures(result, PrintableConsole(file=text, width=200))
    return text.getvalue()


def row(text: str, begin: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.strip().startswith(begin))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_failure_shows_who_fails_what_is_lost_and_how_long_it_takes() -> None:
    text = shown(failure_report(RUN, 17, 12_345, runs=3))
    assert "64 nodes of 8 ranks" in text
    assert "the save of step 12,000 is in flight, 27.5 s before it counts" in text
    assert row(text, "node 17 dies") == [
        "node 17 dies, ranks 136 to 143", "Slurm", "5.0 min", "11,000", "1,345", "5,509,120", "2.0 min", "60.0 s",
        "11.2 min", "19.2 min",
    ]  # fmt: skip
    assert row(text, "rank 136 hangs")[3:5] == ["12,000", "345"]
    assert row(text, "SIGTERM")[3:5] == ["12,000", "345"]  # another save takes more than the 120 s of grace
    assert "and the save is not in time" in text
    assert "in 3 simulated runs" in text
    assert all(line in text for line in NOT_COUNTED)


def test_intervals_stand_side_by_side_and_a_write_that_binds_is_named() -> None:
    text = shown(failure_report(RUN, 0, 1500, runs=1))
    assert "no save is in flight" in text
    assert row(text, "of the recipe")[1] == "1,000"
    assert "a save takes longer" not in text
    slow = shown(failure_report(replace(RUN, save=SaveCost(0.01, 5000.0)), 0, 1500, runs=1))
    assert row(slow, "best")[1] == "10,000"
    assert "the best one is as long" in slow
    assert "training waits for it" in slow


def test_origins_are_printed_and_other_figures_are_named_as_such() -> None:
    text = shown(failure_report(RUN, 0, 1500, runs=1))
    assert "419 unexpected interruptions" in text
    assert "(another was given)" not in text
    text = shown(failure_report(RUN, 0, 1500, runs=1, node_hours=500.0))
    assert "(another was given)" in text
    assert "one node has one every 500 h" in text


def test_runs_that_stop_by_themselves_are_announced() -> None:
    assert "exit code 70" in shown(failure_report(RUN, 0, 1500, runs=1, node_hours=20.0))
    assert "exit code 70" not in shown(failure_report(RUN, 0, 1500, runs=1))

"""What the ranks make of a hang together: where each is, who is behind, who does not answer.

They talk through the store of the process group, from the watchdogs' threads. Calls of the store may block while the
leader's process is stopped, since it lives there.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from pipeline.distributed import KeyValueStore

PHASES = ("", "reading", "computing", "exchanging")

_ANSWER_SECONDS = 10.0  # in which the watchdogs of all ranks answer an alarm
_READ_SECONDS = 5.0  # in which they read what the leader makes of it
GATHER_SECONDS = _ANSWER_SECONDS + 2 * _READ_SECONDS
_PAUSE = 0.1
_SHOWN = 8  # ranks named in a message


@dataclass(frozen=True, slots=True)
class RankPosition:
    """Where a rank is; steps and its own micro-batches count from 0."""

    node: str
    section: str
    turn: int
    """Sections entered and left so far: the same on ranks that are equally far."""
    step: int
    micro_batch: int
    phase: str
    """One of `PHASES`; empty where a section has none."""

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Less is further behind."""
        return self.turn, self.step, self.micro_batch, PHASES.index(self.phase)

    def __str__(self) -> str:
        where = f"in section {self.section}"
        if self.phase == "exchanging":
            return f"{where}, exchanging in step {self.step + 1:,}"
        return (
            f"{where}, {self.phase} micro-batch {self.micro_batch} of step {self.step + 1:,}" if self.phase else where
        )


def describe_hang(reports: dict[int, RankPosition], nodes: dict[int, str], world_size: int) -> str:
    """Who is late, and where the others are.

    Args:
        reports: of the ranks that answered, at least one.
        nodes: of ranks as they were known before.
        world_size: so many should have answered.
    """
    if world_size == 1:
        return f"this rank is {reports[0]}"
    first = max(reports.values(), key=lambda report: report.place)
    silent = [rank for rank in range(world_size) if rank not in reports]
    if silent:
        who, verb = _named(silent, nodes), "does" if len(silent) == 1 else "do"
        return f"{who} {verb} not answer, as when a process or a node is stopped; the others are {first}"
    last = min(reports.values(), key=lambda report: report.place)
    if last.place == first.place:
        return f"all {world_size} ranks are {first}"
    late = [rank for rank in sorted(reports) if reports[rank].place == last.place]
    who, verb = _named(late, {rank: reports[rank].node for rank in late}), "is" if len(late) == 1 else "are"
    return f"{who} {verb} behind, {last}; the others are {first}"


def announce(store: KeyValueStore, rank: int, node: str) -> None:
    """Say where `rank` runs, for the case that it cannot say it later."""
    store.set(f"node/{rank}", node)


def alarm(store: KeyValueStore) -> str | None:
    """Why a rank has raised the alarm, or None."""
    return _get(store, "alarm")


def gather_hang_report(store: KeyValueStore, rank: int, world_size: int, report: RankPosition, reason: str) -> str:
    """Raise the alarm for `reason` unless it is raised, report, and hear what is wrong; takes `GATHER_SECONDS` at most.

    The leader decides; where it does not answer, each rank does by itself.
    """
    store.set(f"report/{rank}", json.dumps(asdict(report)))
    reason = store.compare_set("alarm", "", reason).decode()
    until = time.monotonic() + _ANSWER_SECONDS
    if rank != 0:
        while time.monotonic() < until + _READ_SECONDS:
            told = _get(store, "verdict")
            if told is not None:
                store.add("heard", 1)
                return told
            time.sleep(_PAUSE)
    reports: dict[int, RankPosition] = {}
    while True:
        for other in range(world_size):
            told = None if other in reports else _get(store, f"report/{other}")
            if told is not None:
                reports[other] = RankPosition(**json.loads(told))
        if len(reports) == world_size or time.monotonic() >= until:
            break
        time.sleep(_PAUSE)
    nodes = {other: _get(store, f"node/{other}") or "" for other in range(world_size) if other not in reports}
    told = f"{describe_hang(reports, nodes, world_size)} ({reason})"
    if rank == 0:
        store.set("verdict", told)
        until = time.monotonic() + _READ_SECONDS
        # The store goes with this process.
        while store.add("heard", 0) < len(reports) - 1 and time.monotonic() < until:
            time.sleep(_PAUSE)
    return told


def _get(store: KeyValueStore, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _named(ranks: Iterable[int], nodes: dict[int, str]) -> str:
    ranks = list(ranks)
    shown = [f"{rank} on {nodes[rank]}" if nodes.get(rank) else str(rank) for rank in ranks[:_SHOWN]]
    more = f" and {len(ranks) - _SHOWN:,} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}{more}"

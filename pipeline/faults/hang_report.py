"""What the ranks find out about a hang together: where each one is, who is behind, and who does not answer.

The watchdog threads communicate through the store of the process group. On one machine it is a file; else the leader
hosts it, so that calls may block while the leader's process is stopped, and others on the network may write to it: what
is read from it is bounded, and what a terminal would obey is escaped.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from data.files.json_records import parse_json
from data.text.printable import one_line
from pipeline.ranks.distributed import KeyValueStore

PHASES = ("", "reading", "computing", "exchanging")

_ANSWER_SECONDS = 10.0  # for the watchdogs of all ranks to answer an alarm
_READ_SECONDS = 5.0  # for them to read the leader's assessment
GATHER_SECONDS = _ANSWER_SECONDS + 2 * _READ_SECONDS
_POLL_SECONDS = 0.1
_MOST_NAMED = 8  # ranks in a message
_MOST_BYTES = 2000  # of a value in the store


@dataclass(frozen=True, slots=True)
class RankPosition:
    """Where a rank is; steps and its own micro-batches count from 0."""

    node: str
    section: str
    transitions: int
    """Sections entered and left so far: equal on ranks that have come equally far."""
    step: int
    micro_batch: int
    phase: str
    """One of `PHASES`; empty in sections without phases."""

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase: {self.phase!r}")

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sorts positions; the smallest is furthest behind."""
        return self.transitions, self.step, self.micro_batch, PHASES.index(self.phase)

    def __str__(self) -> str:
        where = f"in section {self.section}"
        if self.phase == "exchanging":
            return f"{where}, exchanging in step {self.step + 1:,}"
        return (
            f"{where}, {self.phase} micro-batch {self.micro_batch} of step {self.step + 1:,}" if self.phase else where
        )


def describe_hang(positions: dict[int, RankPosition], nodes: dict[int, str], world_size: int) -> str:
    """Which ranks are behind or silent, and where the others are.

    Args:
        positions: by rank, of those that answered (at least one).
        nodes: by rank, as announced at the start.
        world_size: the number of ranks expected to answer.
    """
    if world_size == 1:
        return f"this rank is {positions[0]}"
    first = max(positions.values(), key=lambda position: position.order)
    silent = [rank for rank in range(world_size) if rank not in positions]
    if silent:
        who, verb = _named(silent, nodes), "does" if len(silent) == 1 else "do"
        return f"{who} {verb} not answer, as when a process or a node is stopped; the others are {first}"
    last = min(positions.values(), key=lambda position: position.order)
    if last.order == first.order:
        return f"all {world_size} ranks are {first}"
    behind = [rank for rank in sorted(positions) if positions[rank].order == last.order]
    who, verb = _named(behind, {rank: positions[rank].node for rank in behind}), "is" if len(behind) == 1 else "are"
    return f"{who} {verb} behind, {last}; the others are {first}"


def announce_node(store: KeyValueStore, rank: int, node: str) -> None:
    """Publish where `rank` runs, in case it cannot answer later."""
    store.set(f"node/{rank}", node)


def alarm_reason(store: KeyValueStore) -> str | None:
    """Why a rank has raised the alarm; None if none has."""
    return _get(store, "alarm")


def gather_hang_report(store: KeyValueStore, rank: int, world_size: int, position: RankPosition, reason: str) -> str:
    """Raise the alarm for `reason` unless another rank has, publish this rank's position, and return the assessment.

    The leader assesses for all ranks; if it does not answer, each rank does so by itself. Takes at most
    `GATHER_SECONDS`.
    """
    store.set(f"position/{rank}", json.dumps(asdict(position)))
    reason = _printable(store.compare_set("alarm", "", reason))
    deadline = time.monotonic() + _ANSWER_SECONDS
    if rank != 0:
        while time.monotonic() < deadline + _READ_SECONDS:
            from_leader = _get(store, "assessment")
            if from_leader is not None:
                store.add("received", 1)
                return from_leader
            time.sleep(_POLL_SECONDS)
    positions: dict[int, RankPosition] = {}
    while True:
        for other in range(world_size):
            answer = None if other in positions else _position(store, other)
            if answer is not None:
                positions[other] = answer
        if len(positions) == world_size or time.monotonic() >= deadline:
            break
        time.sleep(_POLL_SECONDS)
    nodes = {other: _get(store, f"node/{other}") or "" for other in range(world_size) if other not in positions}
    assessment = f"{describe_hang(positions, nodes, world_size)} ({reason})"
    if rank == 0:
        store.set("assessment", assessment)
        deadline = time.monotonic() + _READ_SECONDS
        # The store ends with this process.
        while store.add("received", 0) < len(positions) - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    return assessment


def _get(store: KeyValueStore, key: str) -> str | None:
    return _printable(store.get(key)) if store.check([key]) else None


def _position(store: KeyValueStore, rank: int) -> RankPosition | None:
    """What `rank` has published; None if it has not, or if that is no position."""
    key = f"position/{rank}"
    try:
        found = parse_json(RankPosition, store.get(key)[:_MOST_BYTES]) if store.check([key]) else None
    except ValueError:
        return None
    if found is None:
        return None
    return replace(found, node=_printable(found.node.encode()), section=_printable(found.section.encode()))


def _printable(value: bytes) -> str:
    return one_line(value[:_MOST_BYTES].decode(errors="backslashreplace"))


def _named(ranks: Iterable[int], nodes: dict[int, str]) -> str:
    ranks = list(ranks)
    named = [f"{rank} on {nodes[rank]}" if nodes.get(rank) else str(rank) for rank in ranks[:_MOST_NAMED]]
    more = f" and {len(ranks) - _MOST_NAMED:,} more" if len(ranks) > _MOST_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{more}"

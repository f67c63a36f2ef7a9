"""The assessment of a hang: which rank is behind, from their positions and from which of them answer."""

import json
import threading
from dataclasses import asdict
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.faults.hang_report import RankPosition, alarm_reason, announce_node, describe_hang, gather_hang_report
from pipeline.ranks.distributed import KeyValueStore


def at(
    phase: str, step: int = 12, micro_batch: int = 1, *, section: str = "step", transitions: int = 9
) -> RankPosition:
    return RankPosition("node-a", section, transitions, step, micro_batch, phase)


WAITS = at("exchanging")


@pytest.mark.parametrize(
    ("positions", "found"),
    [
        ([WAITS, at("reading")],
         "rank 1 on node-a is behind, in section step, reading micro-batch 1 of step 13; "
         "the others are in section step, exchanging in step 13"),
        ([at("computing", micro_batch=0), WAITS, at("reading")], "rank 0 on node-a is behind, in section step, computing"),
        ([at("reading", 13, 0), at("exchanging"), WAITS], "ranks 1 on node-a, 2 on node-a are behind, in section step, exch"),
        ([WAITS, at("", section="save", transitions=10)], "rank 0 on node-a is behind, in section step, exchanging"),
        ([at("", section="save", transitions=10), at("reading", 13, transitions=12)], "rank 0 on node-a is behind, in section save; the"),
        ([WAITS, None, WAITS], "rank 1 on node-1 does not answer, as when a process or a node is stopped; the others are in"),
        ([None, WAITS, None], "ranks 0 on node-0, 2 on node-2 do not answer"),
        ([WAITS, WAITS], "all 2 ranks are in section step, exchanging in step 13"),
        ([at("", 0, 0, section="setup", transitions=0)], "this rank is in section setup"),
        ([WAITS] + 12 * [at("reading")], "7 on node-a, 8 on node-a and 4 more are behind"),
    ],
)  # fmt: skip
def test_the_ranks_behind_are_named_with_their_positions(positions: list[RankPosition | None], found: str) -> None:
    answered = {rank: position for rank, position in enumerate(positions) if position}
    nodes = {rank: f"node-{rank}" for rank in range(len(positions))}
    assert found in describe_hang(answered, nodes, len(positions))


@pytest.mark.parametrize("silent", [None, 0, 2])
def test_all_ranks_get_the_same_assessment_and_silent_ranks_are_named(
    silent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.faults.hang_report._ANSWER_SECONDS", 1.0)
    monkeypatch.setattr("pipeline.faults.hang_report._READ_SECONDS", 1.0)
    store: KeyValueStore = dist.HashStore()  # type: ignore[attr-defined]
    assessments: dict[int, str] = {}

    def take_part(rank: int) -> None:
        position = at("reading") if rank == 1 else WAITS
        assessments[rank] = gather_hang_report(store, rank, 3, position, f"reason of {rank}")

    assert alarm_reason(store) is None
    for rank in range(3):
        announce_node(store, rank, f"node-{rank}")
    threads: list[Any] = [threading.Thread(target=take_part, args=[rank]) for rank in range(3) if rank != silent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(assessments) == len(threads)
    assert len(set(assessments.values())) == 1
    assert (alarm_reason(store) or "").startswith("reason of ")
    expected = "rank 1 on node-a is behind" if silent is None else f"rank {silent} on node-{silent} does not answer"
    assert expected in assessments[1]
    assert f"({alarm_reason(store)})" in assessments[1]


@pytest.mark.parametrize(
    "planted",
    [
        b"\xff\x1b[2J", b"[" * 10**6, b"{}", b"null", b'{"node": 3}', b"9" * 5000,
        json.dumps(asdict(at("computing")) | {"phase": "\033"}).encode(),
        json.dumps(asdict(at("computing")) | {"step": "0"}).encode(),
    ],
    ids=range(8),
)  # fmt: skip
def test_an_answer_that_is_none_is_that_of_a_silent_rank(planted: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.faults.hang_report._ANSWER_SECONDS", 0.0)
    monkeypatch.setattr("pipeline.faults.hang_report._READ_SECONDS", 0.0)
    store: KeyValueStore = dist.HashStore()  # type: ignore[attr-defined]
    store.set("position/1", planted)  # type: ignore[arg-type] # torch takes both
    found = gather_hang_report(store, 0, 2, WAITS, "a reason")
    assert found.startswith("rank 1 does not answer")
    assert found.isprintable()


def test_what_the_store_says_is_escaped_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.faults.hang_report._ANSWER_SECONDS", 0.0)
    monkeypatch.setattr("pipeline.faults.hang_report._READ_SECONDS", 0.0)
    store: KeyValueStore = dist.HashStore()  # type: ignore[attr-defined]
    store.set("alarm", "\033[2J\ndone: " + "x" * 10**6)
    store.set("node/2", "\033]0;title\a")
    store.set("position/1", json.dumps(asdict(at("", section="\u202ecod")) | {"node": "\033[1mbold"}))
    found = gather_hang_report(store, 0, 3, WAITS, "a reason")
    assert found.startswith(r"rank 2 on \x1b]0;title\x07 does not answer")
    assert r"(\x1b[2J\ndone: xxx" in found
    assert found.isprintable()
    assert len(found) < 5000
    store.set("position/2", json.dumps(asdict(at("", section="\u202ecod", transitions=1)) | {"node": "\033[1mbold"}))
    found = gather_hang_report(store, 0, 3, WAITS, "a reason")
    assert r"2 on \x1b[1mbold is behind, in section \u202ecod" in found

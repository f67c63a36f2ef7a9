"""The ranks of a run divide the verification of its local shards, and remember it in the run folder."""

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.index import read_index
from data.shard_verification import FileState, LocalShard, ShardVerifier
from pipeline.faults.watchdog import Watchdog
from pipeline.plan import Plan, TrainPlan, plan_stage
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.sections import WatchdogSettings
from pipeline.runs.run_folder import RunFolder
from pipeline.shard_verification import ShardVerification
from pipeline.verified_shards import record_hashed
from tests.pipeline.checkpoints.small import ALONE, together
from tests.support.recipes import write_recipe
from tests.support.training import end_here


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards."""
    return shutil.copytree(shards, tmp_path / "shards")


def planned(shards: Path, folder: Path, *overrides: str, stage: str = "pretrain", ranks: int = 1) -> Plan:
    return plan_stage(load_recipe(write_recipe(folder, shards), list(overrides)), stage, ranks)


def verify(plan: Plan, folder: Path, ranks: Ranks) -> str | None:
    """Verify what a start of `plan` has to on one rank; returns the remark."""
    watchdog = Watchdog(WatchdogSettings(), ranks.rank, ranks.world_size, "node", folder / "log", end_here)
    folder.mkdir(parents=True, exist_ok=True)
    with ShardVerification(plan, RunFolder(folder), ranks) as verification:
        assert verification.wait(watchdog, lambda: None, lambda: [0.0]) == []
        assert not verification.check()
        return verification.remark


def hashed(folder: Path) -> dict[str, list[str]]:
    """The names of the shards that each rank has hashed so far."""
    files = sorted((folder / "verified_shards").glob("*.jsonl"))
    return {
        file.stem: [Path(json.loads(line)["path"]).name for line in file.read_text().splitlines()] for file in files
    }


def names(shards: Path, *sets: str) -> list[str]:
    return [shard.name for name in sets for shard in read_index(shards / name).shards]


def test_each_shard_is_verified_by_one_rank_and_by_no_later_start_or_stage(copied: Path, tmp_path: Path) -> None:
    plan, run = planned(copied, tmp_path, ranks=2), tmp_path / "run"
    remarks = together(2, lambda ranks: verify(plan, run / "pretrain", ranks))
    assert remarks == ["10 local shards to verify (0.0 GB), 0 verified by earlier starts"] * 2
    first, second = hashed(run / "pretrain").values()
    assert abs(len(first) - len(second)) <= 1
    assert sorted(first + second) == sorted(names(copied, "train", "validation"))

    assert verify(plan, run / "pretrain", ALONE) == "0 local shards to verify (0.0 GB), 10 verified by earlier starts"
    finetune = planned(copied, tmp_path, stage="finetune")
    assert (
        verify(finetune, run / "finetune", ALONE) == "0 local shards to verify (0.0 GB), 10 verified by earlier starts"
    )
    assert list(hashed(run / "pretrain").values()) == [first, second]
    assert hashed(run / "finetune") == {}

    (run / "finetune/verified_shards/rank-00000.jsonl").mkdir(parents=True)
    with open(run / "pretrain/verified_shards/rank-00000.jsonl", "a") as file:
        file.write('{"path": "cut sh')
    rewritten = copied / "train" / first[0]
    rewritten.write_bytes(rewritten.read_bytes())
    assert verify(plan, run / "pretrain", ALONE) == "1 local shard to verify (0.0 GB), 9 verified by earlier starts"
    last = (run / "pretrain/verified_shards/rank-00000.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["path"] == str(rewritten)


def test_a_start_reads_each_record_once_at_most(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, opened = tmp_path / "run", list[str]()
    read_text = Path.read_text

    def counted(self: Path, *arguments: Any, **options: Any) -> str:
        if self.suffix == ".jsonl":
            opened.append(self.stem)
        return read_text(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", counted)
    for count, reads in ((3, []), (3, [0, 1, 2]), (4, [0, 0, 1, 1, 2, 2])):
        plan = planned(copied, tmp_path, ranks=count, *["batch.global_size=12", "batch.micro_size=1"])  # noqa: B026
        opened.clear()
        done = together(count, lambda ranks, plan=plan: verify(plan, run, ranks))  # type: ignore[misc]
        # The ranks their own, and where there are shards that they have not hashed the leader those of all.
        assert sorted(opened) == [f"rank-{rank:05d}" for rank in reads]
    assert done == ["0 local shards to verify (0.0 GB), 10 verified by earlier starts"] * 4


def test_a_file_that_any_rank_knows_to_be_another_is_hashed_first(copied: Path, tmp_path: Path) -> None:
    plan, run = planned(copied, tmp_path, ranks=2), RunFolder(tmp_path / "run")
    path = copied / "validation" / names(copied, "validation")[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run.path.mkdir()
    record_hashed(run, 7, FileState.of(str(path), path.stat()), "0" * 64)

    def first(ranks: Ranks) -> str | None:
        with ShardVerification(plan, run, ranks) as verification:
            return next(iter(verification._verifier._shards), LocalShard("", 0, "")).path

    assert first(ALONE) == str(path)
    assert str(path) in together(2, first)


def test_ranks_with_copies_of_their_own_verify_these(copied: Path, tmp_path: Path) -> None:
    other = shutil.copytree(copied, tmp_path / "node1/shards")
    plans = [planned(copied, tmp_path / "node0"), planned(other, tmp_path / "node1")]
    together(3, lambda ranks: verify(plans[ranks.rank == 2], tmp_path / "run", ranks))
    first, second, third = hashed(tmp_path / "run").values()
    assert sorted(first + second) == sorted(third) == sorted(names(copied, "train", "validation"))


@pytest.mark.parametrize(
    ("stage", "overrides", "sets"),
    [
        ("evaluate", [], ["validation"]),
        ("pretrain", ["data.verify_shards=false"], []),
        ("pretrain", ["data.validation={shards}/train"], ["train"]),
    ],
)
def test_what_a_stage_reads_is_verified_once(
    shards: Path, tmp_path: Path, stage: str, overrides: Sequence[str], sets: Sequence[str]
) -> None:
    overrides = [override.format(shards=shards) for override in overrides]
    verify(planned(shards, tmp_path, *overrides, stage=stage), tmp_path / "run", ALONE)
    assert sorted(itertools.chain(*hashed(tmp_path / "run").values())) == sorted(names(shards, *sets))


def test_a_short_stage_verifies_the_training_shards_that_it_reads(shards: Path, tmp_path: Path) -> None:
    short = ["pretrain.steps=1", "pretrain.optimizer.warmup_steps=0", "data.lanes=1", "data.shuffle_window=1"]
    plan = planned(shards, tmp_path, *short)
    assert isinstance(plan, TrainPlan)
    verify(plan, tmp_path / "run", ALONE)
    drawn = {plan.train.index.shards[number].name for number in plan.order.at(0, 0, 12).shard}
    found = hashed(tmp_path / "run")["rank-00000"]
    assert set(found[: len(drawn)]) == drawn
    assert len(found) <= len(drawn) + 1 + len(names(shards, "validation")) < len(names(shards, "train", "validation"))


def test_a_request_to_stop_ends_the_wait_on_all_ranks(shards: Path, tmp_path: Path) -> None:
    plan = planned(shards, tmp_path, ranks=2)
    os.mkfifo(tmp_path / "slow.tar")
    begun: list[int] = []

    def wait(ranks: Ranks) -> Sequence[float]:
        watchdog = Watchdog(WatchdogSettings(), ranks.rank, 2, "node", tmp_path / "log", end_here)
        with ShardVerification(plan, RunFolder(tmp_path), ranks) as verification:
            if ranks.rank == 1:
                verification._verifier = ShardVerifier([LocalShard(f"{tmp_path}/slow.tar", 1, "")], _ignore)

            def flag() -> Sequence[float]:
                return [float(ranks.rank == 0 and bool(begun)), 0.0]

            flags = verification.wait(watchdog, lambda: begun.append(ranks.rank), flag)
            if ranks.rank == 1:
                verification._verifier._closed.set()
                (tmp_path / "slow.tar").write_bytes(b"x")
            return flags

    assert together(2, wait) == [[1.0, 0.0]] * 2
    assert sorted(begun) == [0, 1]


def _ignore(state: FileState, sha256: str) -> None:
    pass

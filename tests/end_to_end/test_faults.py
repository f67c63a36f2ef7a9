"""A run that is killed and stopped fifty times ends with the results of an uninterrupted one.

`python -m tests.end_to_end.fault_driver --kills 1000` does it a thousand times.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.fault_driver import (
    assert_audit_is_exact,
    assert_equal,
    disturbed,
    greatest_differences,
    in_bucket,
    undisturbed,
)
from tests.end_to_end.faulty_run import Run
from tests.end_to_end.random_faults import KINDS, Setup, draw_faults, steps_for
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.slow(seconds=130)


@dataclass(frozen=True)
class Ended:
    """A run that survived `faults` faults."""

    run: Run
    faults: int


@pytest.fixture(scope="module")
def on_disk(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two ranks, ZeRO 2, some steps that are not finite."""
    setup = Setup(zero=(2,), row=3)
    faults = draw_faults(29, setup, fresh=0, rng=random.Random(20))
    return Ended(disturbed(tmp_path_factory.mktemp("disk"), shards, faults, setup), len(faults))


@pytest.fixture(scope="module")
def on_s3(shards: Path, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two ranks, ZeRO 1, checkpoints in an S3 server whose connections fail."""
    setup = Setup()
    faults = draw_faults(8, setup, fresh=1, rng=random.Random(21))
    folder = tmp_path_factory.mktemp("s3")
    with in_bucket(s3_server, folder / "copies") as place:
        return Ended(disturbed(folder, shards, faults, setup, place), len(faults))


@pytest.fixture(scope="module")
def on_changing_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Each start with another number of ranks and another ZeRO stage."""
    setup = Setup(worlds=(1, 2, 3, 6), zero=(1, 2))
    faults = draw_faults(13, setup, fresh=1, rng=random.Random(22))
    return Ended(disturbed(tmp_path_factory.mktemp("changing"), shards, faults, setup), len(faults))


def test_every_kind_of_fault_occurred(on_disk: Ended, on_s3: Ended, on_changing_ranks: Ended) -> None:
    for ended in (on_disk, on_s3, on_changing_ranks):
        counts = ended.run.counts
        assert sum(counts[f"{number.name} of {victim}"] for victim, number in KINDS) == ended.faults
        assert all(counts[f"{number.name} of {victim}"] for victim, number in KINDS)
        assert counts["inside a save"]
    counts = on_disk.run.counts + on_s3.run.counts + on_changing_ranks.run.counts
    assert counts["inside an evaluation"]
    assert counts["inside a roll-back"]
    assert counts["new interpreters"] == 2
    assert all(on_changing_ranks.run.counts[f"with {world} ranks"] for world in on_changing_ranks.run.setup.worlds)


def test_on_a_fixed_number_of_ranks_every_curve_and_byte_equals_the_uninterrupted_run(
    on_disk: Ended, shards: Path, tmp_path: Path
) -> None:
    assert_equal(on_disk.run, undisturbed(tmp_path, shards, steps_for(on_disk.faults), on_disk.run.setup))


def test_with_checkpoints_in_a_failing_storage_too(on_s3: Ended, shards: Path, tmp_path: Path) -> None:
    assert_equal(on_s3.run, undisturbed(tmp_path, shards, steps_for(on_s3.faults), on_s3.run.setup, fresh=True))


def test_on_changing_numbers_of_ranks_only_rounding_differs(
    on_changing_ranks: Ended, shards: Path, tmp_path: Path
) -> None:
    run = on_changing_ranks.run
    differences = greatest_differences(run, undisturbed(tmp_path, shards, run.steps, run.setup))
    assert differences.train_loss < 1e-4
    assert differences.validation_loss < 1e-3
    assert differences.weights < 1e-4


def test_the_audit_of_samples_is_exact(on_disk: Ended, on_s3: Ended, on_changing_ranks: Ended) -> None:
    for ended in (on_disk, on_s3, on_changing_ranks):
        assert_audit_is_exact(ended.run)

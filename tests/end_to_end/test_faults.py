"""A run that is killed and stopped fifty times ends with the results of an uninterrupted one.

`python -m tests.end_to_end.fault_driver --kills 1000` does it a thousand times.
"""

import random
from pathlib import Path

import pytest

from tests.end_to_end.fault_driver import (
    KINDS,
    Run,
    assert_audit_is_exact,
    assert_equal,
    disturbed,
    draw_faults,
    greatest_differences,
    steps_for,
    undisturbed,
)

pytestmark = pytest.mark.slow(seconds=100)

ON_TWO_RANKS, ON_CHANGING_RANKS = 35, 15


@pytest.fixture(scope="module")
def on_two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    faults = draw_faults(ON_TWO_RANKS, worlds=(2,), fresh=1, rng=random.Random(20))
    return disturbed(tmp_path_factory.mktemp("two"), shards, faults)


@pytest.fixture(scope="module")
def on_changing_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    faults = draw_faults(ON_CHANGING_RANKS, worlds=(1, 2, 4), fresh=1, rng=random.Random(21))
    return disturbed(tmp_path_factory.mktemp("changing"), shards, faults)


def test_every_kind_of_fault_occurred(on_two_ranks: Run, on_changing_ranks: Run) -> None:
    for run, faults in ((on_two_ranks, ON_TWO_RANKS), (on_changing_ranks, ON_CHANGING_RANKS)):
        counts = run.counts
        assert sum(counts[f"{number.name} of {victim}"] for victim, number in KINDS) == faults
        assert all(counts[f"{number.name} of {victim}"] for victim, number in KINDS)
        assert counts["inside a save"]
        assert counts["new interpreters"]
    assert all(on_changing_ranks.counts[f"with {world} ranks"] for world in (1, 2, 4))


def test_on_a_fixed_number_of_ranks_every_curve_and_byte_equals_the_uninterrupted_run(
    on_two_ranks: Run, shards: Path, tmp_path: Path
) -> None:
    assert_equal(on_two_ranks, undisturbed(tmp_path, shards, steps_for(ON_TWO_RANKS), fresh=True))


def test_on_changing_numbers_of_ranks_only_rounding_differs(
    on_changing_ranks: Run, shards: Path, tmp_path: Path
) -> None:
    differences = greatest_differences(on_changing_ranks, undisturbed(tmp_path, shards, steps_for(ON_CHANGING_RANKS)))
    assert differences["train/loss"] < 1e-4
    assert differences["validation/loss"] < 1e-2
    assert differences["weights"] < 1e-2


def test_the_audit_of_samples_is_exact(on_two_ranks: Run, on_changing_ranks: Run) -> None:
    assert_audit_is_exact(on_two_ranks)
    assert_audit_is_exact(on_changing_ranks)

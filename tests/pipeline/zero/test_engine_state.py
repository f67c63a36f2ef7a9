"""The sharded state of real DeepSpeed engines: norms and histograms computed from it, and the memory it takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe.sections import CommunicationSettings
from pipeline.state_bytes import bucket_bytes, bytes_of_state
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

# The cases on one rank separate the memory that the ranks share from the memory that each rank needs.
CASES = [(case, 1) for case in ("1-fp32", "1-bf16", "2-bf16", "3-bf16")]
CASES += [(f"{stage}-{precision}", 2) for precision in ("fp32", "bf16", "bf16_autocast") for stage in (1, 2, 3)]
CASES += [("0-fp32", 2)]

Measured = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """What the leader wrote, by case and number of ranks."""
    folder = tmp_path_factory.mktemp("state")
    for count in (1, 2):
        cases = [case for case, of in CASES if of == count]
        run_ranks(count, Path(__file__).with_name("state_worker.py"), folder, *cases)
    return {(case, count): json.loads((folder / f"{case}-{count}.json").read_text()) for case, count in CASES}


@pytest.mark.parametrize(("case", "count"), CASES)
def test_norms_are_those_of_the_whole_weights_and_of_a_copy_from_before_the_step(
    measured: Measured, case: str, count: int
) -> None:
    found = measured[case, count]
    expected = found["norms_of_a_copy"]
    assert {tag: found["norms"][tag] for tag in expected} == pytest.approx(expected, rel=1e-5)
    assert all(value > 1e-4 for value in expected.values())


@pytest.mark.parametrize(("case", "count"), CASES)
def test_histograms_are_those_of_the_whole_weights(measured: Measured, case: str, count: int) -> None:
    found = measured[case, count]
    assert found["histograms"] == found["histograms_of_whole_weights"]
    assert sum(map(sum, found["histograms"].values())) == found["parameters"]


@pytest.mark.parametrize(("case", "count"), CASES)
def test_engines_use_the_estimated_memory(measured: Measured, case: str, count: int) -> None:
    stage, precision = int(case[0]), case[2:]
    found = measured[case, count]
    parameters = found["parameters"]
    state = sum(bytes_of_state(parameters, precision, stage, count))  # type: ignore[arg-type]
    communication = bucket_bytes(parameters, precision, stage, count, CommunicationSettings())  # type: ignore[arg-type]
    # What ZeRO 3 has gathered is smaller than a bucket here and counts with the state. So does the float32 copy of
    # gradients, which exists only while they are summed.
    gathered = (2 if precision == "bf16" else 4) * parameters if stage == 3 and count == 2 else 0
    copied = 4 * parameters if (stage, precision) == (2, "bf16") else 0
    # Statistics of BatchNorm and the micro-batch add a little.
    assert found["held"] == pytest.approx(state + gathered, rel=0.02)
    assert found["buckets"] == communication - gathered - copied

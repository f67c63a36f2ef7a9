"""The arithmetic of partitions and of the files of checkpoints, over all ranks."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from models.registry import create_model
from pipeline.checkpoints.host_copy import HostFile
from pipeline.errors import RunFailed
from pipeline.rehearsal.checkpoint_layout import CheckpointLayout, buffer_layout, kinds_of
from pipeline.rehearsal.partitions import ElementRange, ModelParameters, Partitioning

SHAPES = {"a.weight": (5, 7), "a.bias": (5,), "b.weight": (11, 3), "b.bias": (11,), "c.scale": (1,)}
SMALL = ModelParameters(SHAPES, frozenset({"a.bias", "b.bias", "c.scale"}))
WORLDS = [1, 2, 3, 7, 16, 200]


@pytest.fixture(scope="module")
def debug() -> ModelParameters:
    return ModelParameters.of(create_model("coatnet_debug", num_classes=3, image_size=32, device="meta"))


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_element_is_owned_once(zero_stage: int, ranks: int, debug: ModelParameters) -> None:
    for parameters in (SMALL, debug):
        partitioning = Partitioning(parameters, zero_stage, ranks)
        assert partitioning.check_owned_once() == partitioning.elements == sum(parameters.sizes.values())


@pytest.mark.parametrize("change", ["gap", "twice", "short"])
def test_an_element_that_is_not_owned_once_is_an_error(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Partitioning.ranges

    def ranges(of: Partitioning, rank: int) -> list[ElementRange]:
        found = real(of, rank)
        if rank == 1:
            first = found[0]
            if change == "gap":
                found[0] = replace(first, start=first.start + 1)
            elif change == "twice":
                found[0] = replace(first, start=first.start - 1)
        return found[:-1] if change == "short" and rank == 2 else found

    monkeypatch.setattr(Partitioning, "ranges", ranges)
    with pytest.raises(RunFailed, match="the rehearsal is wrong, please report it"):
        Partitioning(SMALL, 2, 3).check_owned_once()


@pytest.mark.parametrize("ranks", WORLDS)
def test_flat_groups_are_padded_to_two_elements_for_each_rank_and_shared_evenly(ranks: int) -> None:
    partitioning = Partitioning(SMALL, 2, ranks)
    held = [partitioning.masters(rank) for rank in range(ranks)]
    assert len({used + padding for used, padding in held}) == 1
    groups = [sum(math.prod(SHAPES[name]) for name in names) for names in (["a.weight", "b.weight"], SMALL.undecayed)]
    padded = [-(-size // (2 * ranks)) * 2 * ranks for size in groups]
    assert sum(used + padding for used, padding in held) == sum(padded)
    assert sum(padding for _, padding in held) == sum(padded) - sum(groups)


def test_ranges_of_a_flat_group_follow_each_other_over_the_ranks() -> None:
    # 68 elements with weight decay and 17 without, as 72 and 24 on three ranks.
    partitioning = Partitioning(SMALL, 1, 3)
    assert [(p.parameter, p.start, p.stop) for p in partitioning.ranges(0)] == [("a.weight", 0, 24), ("a.bias", 0, 5), ("b.bias", 0, 1)]  # fmt: skip
    assert [(p.parameter, p.start, p.stop) for p in partitioning.ranges(1)] == [("a.weight", 24, 35), ("b.weight", 0, 13), ("b.bias", 1, 7)]  # fmt: skip
    assert [(p.parameter, p.start, p.stop) for p in partitioning.ranges(2)] == [("b.weight", 13, 33), ("b.bias", 7, 11), ("c.scale", 0, 1)]  # fmt: skip


def test_zero_3_gives_each_rank_a_part_of_each_parameter_and_leaves_late_ranks_without() -> None:
    partitioning = Partitioning(SMALL, 3, 4)
    parts = [{p.parameter: (p.start, p.stop) for p in partitioning.ranges(rank)} for rank in range(4)]
    assert [part.get("a.bias") for part in parts] == [(0, 2), (2, 4), (4, 5), None]
    assert [part.get("c.scale") for part in parts] == [(0, 1), None, None, None]
    assert [partitioning.masters(rank) for rank in (0, 3)] == [(9 + 2 + 9 + 3 + 1, 0), (8 + 0 + 6 + 2 + 0, 8)]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_sizes_are_those_of_the_estimate_up_to_padding(zero_stage: int, debug: ModelParameters) -> None:
    from pipeline.state_bytes import bytes_of_state

    ranks, precision = 4, "fp32" if zero_stage == 0 else "bf16"
    partitioning = Partitioning(debug, zero_stage, ranks)
    sizes = partitioning.sizes(0, precision, moving_average=True)  # type: ignore[arg-type]
    weights, gradients, state = bytes_of_state(partitioning.elements, precision, zero_stage, ranks)  # type: ignore[arg-type]
    most = 4 * 3 * ranks * len(debug.shapes)  # bytes of padding, three kinds of state
    assert 0 <= sizes.weights.bytes - weights <= most
    assert 0 <= sizes.gradients.bytes - gradients <= most
    assert 0 <= sizes.masters.bytes + sizes.moments.bytes - state <= most
    assert sizes.average is not None
    assert sizes.average.bytes * 2 == sizes.moments.bytes
    assert sizes.bytes == sum(s.bytes for s in (sizes.weights, sizes.gradients, sizes.masters, sizes.moments)) + (
        sizes.average.bytes
    )


def test_a_moving_average_and_masters_in_use_leave_out_tensors_of_padding_alone() -> None:
    # 17 elements without weight decay are 2 on each of 40 ranks, and 68 with weight decay as well.
    partitioning = Partitioning(SMALL, 2, 40)
    assert partitioning.masters(20) == (2, 2)
    assert partitioning.masters(20, in_use=True) == (2, 0)
    average = partitioning.sizes(20, "fp32", moving_average=True).average
    assert average is not None
    assert average.bytes == 8


def test_zero_0_in_float32_optimizes_the_weights_themselves() -> None:
    sizes = Partitioning(SMALL, 0, 3).sizes(2, "fp32", moving_average=False)
    assert (sizes.weights.elements, sizes.masters.elements, sizes.moments.elements) == (85, 0, 170)
    assert sizes.average is None


def test_files_of_all_ranks_have_different_names_and_hold_all_state_once(debug: ModelParameters) -> None:
    model = create_model("coatnet_debug", num_classes=3, image_size=32, device="meta")
    layout = CheckpointLayout(
        Partitioning(debug, 3, 7), buffer_layout(model, moving_average=True), kinds_of(moving_average=True), ("a",)
    )
    files = layout.files()
    assert len({file.name for file in files}) == len(files) == 9
    of_ranks = [file for file in files if file.name.startswith("rank-")]
    assert [one.name < other.name for one, other in pairwise(of_ranks)] == [True] * 6
    # Four kinds of float32; a header of a hundred bytes or so for each of them.
    state = 16 * sum(debug.sizes.values())
    assert state < sum(file.bytes for file in of_ranks) < state + 4 * 150 * sum(file.fragments for file in of_ranks)


def test_a_rank_that_saves_nothing_has_the_file_of_no_tensors() -> None:
    layout = CheckpointLayout(Partitioning(SMALL, 0, 9), {}, kinds_of(moving_average=False), ())
    empty = sum(map(len, HostFile({}, pinned=False).blocks))
    assert (layout.rank_file(8).bytes, layout.rank_file(8).fragments) == (empty, 0)

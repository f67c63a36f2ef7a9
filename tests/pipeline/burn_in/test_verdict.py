"""Who computes wrong values, by the bits of all devices."""

from collections.abc import Mapping

import pytest

from pipeline.burn_in.verdict import DeviceBits, suspects

A, B, C = ("loss=1 gradient=1 statistics=1", "loss=2 gradient=2 statistics=1", "loss=1 gradient=3 statistics=1")


def device(number: int, bits: Mapping[str, int], kind: str = "H200") -> DeviceBits:
    return DeviceBits(f"rank {number} on n{number}", f"n{number}", kind, f"GPU-{number}", kind, bits, 5.0)


@pytest.mark.parametrize(
    ("bits", "found"),
    [
        ([{A: 5}], []),
        ([{A: 5}, {A: 7}], []),
        ([{A: 5}, {A: 4, B: 1}], [(1, "itself", 1, ("loss", "gradient"))]),
        ([{A: 5}, {B: 1, A: 4}, {A: 5}], [(1, "itself", 1, ("loss", "gradient"))]),
        ([{A: 3, B: 1, C: 1}], [(0, "itself", 2, ("loss", "gradient"))]),
        ([{A: 5}, {A: 5}, {C: 5}], [(2, "others", 5, ("gradient",))]),
        ([{C: 5}, {B: 5}, {A: 5}, {A: 5}, {A: 5}], [(0, "others", 5, ("gradient",)), (1, "others", 5, ("loss", "gradient"))]),
        ([{A: 5}, {C: 5}], [(0, "undecided", 5, ("gradient",)), (1, "undecided", 5, ("gradient",))]),
        ([{A: 5}, {A: 5}, {C: 5}, {C: 5}], [(n, "undecided", 5, ("gradient",)) for n in range(4)]),
        # One that differs from itself has no voice.
        ([{A: 5}, {C: 4, B: 1}], [(1, "itself", 1, ("loss", "gradient"))]),
        ([{A: 5}, {C: 5}, {C: 4, A: 1}], [(0, "undecided", 5, ("gradient",)), (1, "undecided", 5, ("gradient",)), (2, "itself", 1, ("gradient",))]),
    ],
)  # fmt: skip
def test_the_majority_of_a_kind_says_who_is_wrong(
    bits: list[dict[str, int]], found: list[tuple[int, str, int, tuple[str, ...]]]
) -> None:
    devices = [device(number, one) for number, one in enumerate(bits)]
    said = [(devices.index(one.device), one.reason, one.wrong, one.values) for one in suspects(devices)]
    assert said == found


def test_devices_of_different_kinds_are_not_compared() -> None:
    devices = [
        device(0, {A: 5}),
        device(1, {B: 5}, "A100"),
        device(2, {A: 5}),
        device(3, {C: 5}, "A100"),
        device(4, {A: 5}),
    ]
    assert [one.device.where for one in suspects(devices)] == ["rank 1 on n1", "rank 3 on n3"]
    assert {one.reason for one in suspects(devices)} == {"undecided"}
    assert suspects(devices[:3]) == ()


def test_a_suspect_is_named_with_its_device_and_what_it_did() -> None:
    (once,) = suspects([device(3, {A: 56, C: 1})])
    assert once.text == "rank 3 on n3 (H200, GPU-3) computed other bits than itself in 1 of 57 repetitions, in gradient"
    *_, always = suspects([device(0, {A: 5}), device(1, {A: 5}), device(2, {C: 5})])
    assert (
        always.text
        == "rank 2 on n2 (H200, GPU-2) always computes other bits than most of 2 others of its kind, in gradient"
    )
    _, one = suspects([device(0, {A: 5}), device(1, {B: 5})])
    assert one.text == (
        "rank 1 on n1 (H200, GPU-1) computes other bits than 1 other of its kind, in loss, gradient, and no majority says "
        "which are right"
    )

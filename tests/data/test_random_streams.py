"""Draws for different purposes are independent and fixed, since they are part of the identity of every run."""

import itertools

import pytest

from data.random_streams import RandomStream


def test_the_values_are_fixed() -> None:
    assert {stream.name: stream.value for stream in RandomStream} == {
        "SHARD_ORDER": 1, "WINDOW_ORDER": 2, "AUGMENTATION": 3, "STOCHASTIC_DEPTH": 4, "MIXUP": 5,
        "REPLACEMENT": 6, "ERASING": 7, "CUTMIX": 8,
    }  # fmt: skip
    assert RandomStream.MIXUP.generator(3, 1).integers(1 << 30) == 569990753
    assert RandomStream.STOCHASTIC_DEPTH.torch_seed(3, 1) == 3833255778399125166


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(RandomStream, 2)))
def test_streams_differ_at_the_same_place(one: RandomStream, other: RandomStream) -> None:
    assert one.generator(7, 2, 5).bytes(16) != other.generator(7, 2, 5).bytes(16)
    assert one.torch_seed(7, 2, 5) != other.torch_seed(7, 2, 5)

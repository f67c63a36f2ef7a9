"""Checksums of tensors: of their bits, in the order of their elements, and the same in parts."""

import pytest
import torch

from pipeline.fingerprint import checksum


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_a_checksum_changes_with_any_bit_and_leaves_its_tensor_alone(dtype: torch.dtype) -> None:
    x = torch.arange(99).reshape(9, 11).to(dtype)
    before = x.clone()
    once = int(checksum(x))
    assert torch.equal(x, before)
    size = x.element_size()
    for place in range(99 * size):
        for bit in (0, 7):
            changed = x.clone()
            changed.view(-1).view(torch.uint8)[place] ^= 1 << bit
            assert int(checksum(changed)) != once


def test_the_checksums_of_parts_are_added_to_that_of_the_whole() -> None:
    x = torch.randn(1000)
    assert torch.equal(checksum(x[:300]) + checksum(x[300:], 300), checksum(x))
    assert checksum(torch.zeros(0)) == 0


def test_it_is_that_of_the_elements_wherever_they_are_in_memory() -> None:
    x = torch.randn(4, 5, 6, 7)
    assert torch.equal(checksum(x.to(memory_format=torch.channels_last)), checksum(x))
    assert torch.equal(checksum(x.transpose(0, 1)), checksum(x.transpose(0, 1).contiguous()))

"""A fingerprint of tensors, computed where they are: that of one that differs in a single element is another one."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_CHUNK = 1 << 24  # elements: a copy of them as int64 has 128 MiB
_ODD = -7046029254386353131  # 2^64 / golden ratio, as a signed number; Knuth, The Art of Computer Programming, 6.4
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits for names, shapes, dtypes and bits of `tensors`, in the order of the names.

    Copying the state of a large model to the host and hashing it there would take longer than all of its steps.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_weighted_sum(tensor)}\n".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _weighted_sum(tensor: Tensor) -> int:
    """The bits of the elements as integers, each times an odd number of its own, summed modulo 2^64.

    Integers are added in any order to the same sum. A difference in one element changes it, since an odd factor can be
    inverted; several differences cancel out once in 2^64 times.
    """
    flat, total = tensor.detach().contiguous().reshape(-1), 0
    for start in range(0, flat.numel(), _CHUNK):
        bits = flat[start : start + _CHUNK].view(_INTEGERS[flat.element_size()]).to(torch.int64)
        factors = torch.arange(start, start + bits.numel(), dtype=torch.int64, device=bits.device).mul_(_ODD)
        factors.bitwise_xor_(factors >> 29).mul_(2).add_(1)
        total = (total + int(bits.mul_(factors).sum())) % 2**64
    return total

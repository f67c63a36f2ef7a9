"""A fingerprint of tensors, computed where they are: that of one that differs in a single element is another one."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements: a copy of them as int64 has 32 MiB, and there are three
_ODD = -7046029254386353131  # 2^64 / golden ratio, as a signed number; Knuth, The Art of Computer Programming, 6.4
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits for names, shapes, dtypes and bits of `tensors`, in the order of the names.

    Copying the state of a large model to the host and hashing it there would take longer than all of its steps.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(checksum(tensor)) % 2**64}\n".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def checksum(tensor: Tensor, start: int = 0) -> Tensor:
    """The bits of the elements as integers, each times an odd number of its own, summed modulo 2^64.

    Integers are added in any order to the same sum. A difference in one element changes it, since an odd factor can be
    inverted; several differences cancel out once in 2^64 times. Nothing waits for the device.

    Args:
        tensor: of any shape, and a dtype of 1, 2, 4 or 8 bytes.
        start: position of its first element among those of several tensors, whose checksums may then be added.

    Returns:
        () int64 on the device of `tensor`.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first in range(0, flat.numel(), _CHUNK):
        bits = flat[first : first + _CHUNK].view(_INTEGERS[flat.element_size()])
        begin = start + first
        factors = torch.arange(begin, begin + bits.numel(), dtype=torch.int64, device=bits.device).mul_(_ODD)
        factors.bitwise_xor_(factors >> 29).mul_(2).add_(1)
        total += factors.mul_(bits).sum()
    return total

"""Activation checkpointing: the activations of a block are not stored for its backward, but recomputed in it."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.drop import Kept
from models.norm import recording_paused
from models.options import CheckpointingPolicy


def recomputed_blocks(policy: CheckpointingPolicy, convolves: list[bool]) -> list[bool]:
    """For each block, the stem first, whether `policy` recomputes it; `convolves` says which are convolutional.

    Raises:
        ValueError: an unknown policy, or k below 1.
    """
    if policy == "none":
        return [False] * len(convolves)
    if policy == "every_block":
        return [True] * len(convolves)
    if policy == "mbconv":
        return list(convolves)
    if not isinstance(policy, int) or isinstance(policy, bool) or policy < 1:
        raise ValueError(
            f"activation checkpointing {policy!r}: must be none, every_block, mbconv, or k for every k-th block"
        )
    return [number % policy == 0 for number in range(len(convolves))]


def recompute_in_backward(block: nn.Module, x: Tensor, *kept: tuple[Kept, ...] | None) -> Tensor:
    """`block(x, *kept)`, storing only its inputs for the backward.

    Gradients and BatchNorm's statistics equal those of the plain call to the bit: the recomputation draws no random
    numbers and records no statistics.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), recording_paused(block)

    # The reentrant form gives gradients that are equal up to rounding only; DeepSpeed's own fails with ZeRO stage 3.
    y: Tensor = checkpoint(block, x, *kept, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return y

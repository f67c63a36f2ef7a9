"""The exponential moving average of weights and BatchNorm statistics."""

import torch
from torch import Tensor

_EXCHANGED_AT_ONCE = 2**24  # elements: bounds the extra memory of an exchange


class MovingAverage:
    """Averages of float32 tensors that others own, such as the masters of this rank; needs no communication.

    Update n = 0, 1, ... keeps min(decay, (1 + n) / (10 + n)) of the average, TensorFlow's warm-up of
    `tf.train.ExponentialMovingAverage`, so that the initial weights do not stay in it for long.
    """

    def __init__(self, decay: float, live: list[Tensor]) -> None:
        assert all(tensor.dtype == torch.float32 for tensor in live)
        self._decay = decay
        self._live = [tensor.detach() for tensor in live]
        self.averages = [tensor.clone() for tensor in self._live]
        """In the order of the live ones."""
        self.updates = 0
        """Number of calls of `update`, a part of the state like the averages."""

    @torch.no_grad()
    def restart(self) -> None:
        """Start again as a copy of the live tensors."""
        torch._foreach_copy_(self.averages, self._live)
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the live tensors."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self._live, 1.0 - decay)
        self.updates += 1

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the averages with the live tensors; a second call swaps them back."""
        for average, live in zip(self.averages, self._live, strict=True):
            parts = (torch.split(tensor.view(-1), _EXCHANGED_AT_ONCE) for tensor in (average, live))
            for one, other in zip(*parts, strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

"""What is compared of a micro-batch: its loss, the gradient of each block of the model, BatchNorm's statistics.

Of each there is a checksum of its bits, computed on the device without waiting for it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.norm import recorded_statistics
from pipeline.fingerprint import checksum
from pipeline.zero.engine import ZeroEngine

LOSS = "loss"
STATISTICS = "BatchNorm statistics"
_GRADIENT = "gradient of "


class _Place(NamedTuple):
    """Where the gradient of a parameter belongs."""

    number: int
    """Of its block's checksum."""
    start: int
    """Position of its first element among those of the block."""


class Checksums:
    """Makes the checksums of micro-batches that `engine` computes, as (values,) int64 on its device.

    Attributes:
        names: of the values.
        parameters: of the model.
    """

    def __init__(self, engine: ZeroEngine, device: torch.device) -> None:
        self._model: nn.Module = engine.module
        self._device = device
        blocks: dict[str, int] = {}
        places: list[_Place] = []
        # With ZeRO 3, parameters are empty outside of a forward, and have no shape.
        for name, shape in engine.parameters.shapes.items():
            start = blocks.setdefault(_block(name), 0)
            places.append(_Place(1 + list(blocks).index(_block(name)), start))
            blocks[_block(name)] += math.prod(shape)
        named = dict(self._model.named_parameters())
        self.parameters = [named[name] for name in engine.parameters.shapes]
        self._places = places
        self.names = (LOSS, *(f"{_GRADIENT}{block}" for block in blocks), STATISTICS)

    def of_forward(self, loss: Tensor) -> Tensor:
        """The values after the first forward since the records of BatchNorm were cleared; gradients have 0."""
        values = torch.zeros(len(self.names), dtype=torch.int64, device=self._device)
        values[0] = checksum(loss)
        values[-1] = checksum(recorded_statistics(self._model))
        return values

    @contextmanager
    def add_gradients(self, values: Tensor, *, freed: bool = False) -> Iterator[None]:
        """Inside, a backward adds the gradients of its micro-batch to `values`, before anything else sees them.

        Args:
            values: as `of_forward` returns them.
            freed: whether each gradient is freed once it is added; the backward then gives zeros for all of them.
        """
        handles = [
            parameter.register_hook(partial(_add_gradient, values, place, freed))  # type: ignore[no-untyped-call]
            for parameter, place in zip(self.parameters, self._places, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def kind_of(name: str) -> str:
    """`loss`, `gradient` or `statistics`: the kind of the value `name`."""
    return "gradient" if name.startswith(_GRADIENT) else {LOSS: "loss", STATISTICS: "statistics"}[name]


def _block(parameter: str) -> str:
    """`stem`, `blocks.N` or `head`."""
    first, second, *_ = parameter.split(".")
    return f"{first}.{second}" if first == "blocks" else first


def _add_gradient(values: Tensor, place: _Place, freed: bool, gradient: Tensor) -> Tensor | None:
    values[place.number] += checksum(gradient, place.start)
    return gradient.new_zeros(()).expand_as(gradient) if freed else None

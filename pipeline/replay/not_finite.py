"""Where numbers stop being finite: the first tensor of a computation that holds an infinite one or NaN."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import TransformerBlock
from models.coatnet import CoAtNet
from models.drop import Kept
from models.relative_bias import RelativeBias
from pipeline.replay.watch import Seen, SeenKind


@dataclass(frozen=True, slots=True)
class NotFinite:
    """The first tensor with elements that are infinite or NaN."""

    name: str
    """Of a parameter or a buffer; of a module such as `blocks.3.depthwise`, for its output and the gradient of that;
    `images` for the input; `loss` for the losses."""
    kind: SeenKind
    count: int | None
    """Such elements. None if a repetition to find the module had none: without the recipe's `deterministic`, GPUs may
    compute other bits each time. Then `name` is the stem, a block or the head."""
    size: int
    """All elements."""
    samples: tuple[int, ...]
    """Positions in the micro-batch of the samples that have such elements; none for weights and their gradients."""


@torch.no_grad()
def first_in_state(model: nn.Module, buffers: Mapping[str, Tensor]) -> NotFinite | None:
    """The first of the model's parameters, and then of `buffers`, that is not finite. Waits for the device."""
    state = dict(model.named_parameters()) | dict(buffers)
    norms = torch.stack(torch._foreach_norm(list(state.values()), 2, torch.float64)).tolist()
    for (name, tensor), norm in zip(state.items(), norms, strict=True):
        if not math.isfinite(norm):
            count = tensor.numel() - int(tensor.isfinite().sum())
            return NotFinite(name, "weight", count, tensor.numel(), ())
    return None


def not_finite_in_rows(x: Tensor) -> Tensor:
    """The elements of `x` (n, ...) that are not finite, in each row: (n,) int64. A measure of a `Watch`."""
    return x.isfinite().logical_not_().reshape(x.shape[0], -1).sum(dim=1)


@contextmanager
def noted_draws(model: CoAtNet) -> Iterator[dict[str, tuple[Kept, ...]]]:
    """Inside, a forward notes by block what stochastic depth keeps in Transformer blocks, which compute only that."""
    draws: dict[str, tuple[Kept, ...]] = {}

    def note(name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        draws[name] = arguments[1] or ()

    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, TransformerBlock)]
    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in blocks]
    try:
        yield draws
    finally:
        for handle in handles:
            handle.remove()


def first_seen(
    seen: Sequence[Seen], modules: Mapping[str, nn.Module], draws: Mapping[str, tuple[Kept, ...]]
) -> NotFinite | None:
    """The first of the tensors, measured by `not_finite_in_rows`, that is not finite. Waits for the device.

    Args:
        seen: in order of computation.
        modules: those that were watched.
        draws: see `noted_draws`.
    """
    counts = torch.stack([one.measure.sum() for one in seen]).tolist()
    found = next(((one, count) for one, count in zip(seen, counts, strict=True) if count), None)
    if found is None:
        return None
    one, count = found
    samples: list[int] = []
    if one.name in ("images", "loss") or (one.name in modules and not isinstance(modules[one.name], RelativeBias)):
        samples = one.measure.nonzero().flatten().tolist()
        if (kept := _kept_in(one.name, draws)) is not None:
            samples = kept.samples[samples].tolist()
    return NotFinite(one.name, one.kind, count, one.size, tuple(samples))


def _kept_in(module: str, draws: Mapping[str, tuple[Kept, ...]]) -> Kept | None:
    """The samples of a module's rows, if it is in a branch of a Transformer block; None for all of the micro-batch."""
    for block, kept in draws.items():
        part = module.removeprefix(f"{block}.")
        if part != module and kept:
            branches = dict(zip(("attention", "feed_forward"), kept, strict=True))
            return next((one for branch, one in branches.items() if part.startswith(branch)), None)
    return None

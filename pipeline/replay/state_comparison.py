"""A recomputed state held against a checkpoint: every tensor, to the bit."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.files.json_records import parse_json, to_json
from pipeline.checkpoints.checkpoint import AVERAGED, Checkpoint
from pipeline.checkpoints.host_copy import LiveState
from pipeline.checkpoints.manifest import CheckpointFacts
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.schema import Precision
from pipeline.replay.report import Number, number
from pipeline.zero.fragments import Fragment

_NAMED = 5
WEIGHTS = "master"
"""Kind of state: the float32 weights."""
_STATISTICS = "statistics"
"""Kind of state: BatchNorm's, and their moving averages."""
_COUNTS = ("samples", "optimizer_steps", "ema_updates")
"""Of the manifest, which follow from the steps as well."""
_APART: dict[Precision, float] = {"fp32": 1e-3, "bf16_autocast": 0.1, "bf16": 0.1}
"""Where bits are not expected to be equal: how far states may be apart by rounding. Weights, as a share of the way that
they have gone: AdamW divides gradients by their usual size, so that one that is nearly zero moves a weight by the
learning rate to either side, whichever way it was rounded. Other kinds, as a share of their norm. docs/replay.md has
measured ones."""
_FACTORS = {"exp_avg": 5.0}
"""First moments, the newest gradients above all, are farther apart than weights."""


@dataclass(frozen=True, slots=True)
class ComparedState:
    """What a replay has after a step beside the checkpoint of that step."""

    step: int
    location: str
    tensors: int
    """Tensors of state: weights, moments, moving averages and statistics."""
    equal: int
    """Of them, those with equal bits."""
    different: tuple[str, ...]
    """The first of the others, by kind and name, after counts in the manifest that are not those of the replay."""
    distances: Mapping[str, Number]
    """How far they are apart, by kind: weights (`master`) as a share of the way that they have gone since the start of
    the replay, others as a share of their norm."""
    beyond_rounding: tuple[str, ...]
    """Kinds that rounding does not explain; empty where bits are expected."""
    holds: bool

    @property
    def text(self) -> str:
        """The result, for a person."""
        if self.holds and self.equal == self.tensors:
            return f"equal to the bit: all {self.tensors} tensors"
        more = ", ..." if self.tensors - self.equal > _NAMED else ""
        which = "" if self.holds else f" (not {', '.join(self.different)}{more})"
        result = "within rounding" if self.holds else "different"
        farther = [kind for kind in self.beyond_rounding if kind != WEIGHTS]
        others = [f", {kind} {float(self.distances[kind]):.2g} of its norm" for kind in farther]
        return (
            f"{result}: {self.equal} of {self.tensors} tensors are equal to the bit{which}; the weights are "
            f"{float(self.distances[WEIGHTS]):.2g} of the way apart that they have gone{''.join(others)}"
        )


@dataclass(slots=True)
class _Distance:
    """Sums of squares, in float64."""

    apart: float = 0.0
    """Of the differences."""
    whole: float = 0.0
    """Of what they are a share of."""

    def add(self, live: Tensor, saved: Tensor, origin: Tensor | None = None) -> None:
        """Add a part of a tensor; `origin` is where its way began, None for its norm."""
        self.apart += float((live.double() - saved.double()).square().sum())
        self.whole += float((saved.double() - (0 if origin is None else origin.double())).square().sum())

    @property
    def share(self) -> float:
        return math.sqrt(self.apart / self.whole) if self.whole else math.sqrt(self.apart)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one rank has compared."""

    equal: dict[str, bool]
    distances: dict[str, _Distance]


def compare_state(
    live: LiveState, checkpoint: Checkpoint, began: Sequence[Tensor], ranks: Ranks, *, bits: bool
) -> ComparedState | None:
    """Compare on all ranks together; the leader gets the result. Where `bits` are expected, nothing counts as rounding.

    Args:
        live: the recomputed state.
        checkpoint: of the same step.
        began: `own_weights` when the replay began, to measure the way that the weights have gone.
        ranks: all of them.

    Raises:
        ConfigError: a file of the checkpoint is damaged, or another model's.
    """
    part = _Part({}, defaultdict(_Distance))
    for fragment, origin in zip(_own(live.fragments), began, strict=True):
        for kind, tensor in fragment.tensors.items():
            saved = checkpoint.read(fragment.parameter, kind, fragment.start, fragment.stop)
            own = tensor.detach().cpu()
            part.equal[f"{kind} {fragment.parameter}"] = _is_equal(own, saved)
            part.distances[kind].add(own, saved, origin if kind == WEIGHTS else None)
    if ranks.is_leader:
        saved_buffers = checkpoint.buffers()
        saved_buffers |= {AVERAGED + name: tensor for name, tensor in checkpoint.buffers("ema").items()}
        for name, buffer in live.buffers.items():
            own, saved = buffer.detach().cpu(), saved_buffers[name]
            part.equal[f"{_STATISTICS} {name}"] = _is_equal(own, saved)
            part.distances[_STATISTICS].add(own, saved)
    texts = ranks.gather_texts(json.dumps(to_json(part)))
    if not ranks.is_leader:
        return None
    return _together([parse_json(_Part, text) for text in texts], live.facts, checkpoint, bits=bits)


def _together(parts: Sequence[_Part], ours: CheckpointFacts, checkpoint: Checkpoint, *, bits: bool) -> ComparedState:
    theirs = checkpoint.manifest.facts
    equal, sums = dict[str, bool](), defaultdict[str, _Distance](_Distance)
    for part in parts:
        for name, is_equal in part.equal.items():
            equal[name] = equal.get(name, True) and is_equal
        for kind, found in part.distances.items():
            sums[kind].apart += found.apart
            sums[kind].whole += found.whole
    distances = {kind: found.share for kind, found in sums.items()}
    allowed = _APART[theirs.run.precision]  # type: ignore[index]
    within = {kind: share <= allowed * _FACTORS.get(kind, 1.0) for kind, share in distances.items()}  # NaN is not
    beyond = () if bits else tuple(kind for kind, is_within in within.items() if not is_within)
    counts = [name for name in _COUNTS if getattr(ours, name) != getattr(theirs, name)]
    unequal = [name for name, is_equal in equal.items() if not is_equal]
    return ComparedState(
        theirs.step,
        checkpoint.location,
        len(equal),
        len(equal) - len(unequal),
        (*counts, *unequal[:_NAMED]),
        {kind: number(share) for kind, share in distances.items()},
        beyond,
        holds=not counts and not (unequal if bits else beyond),
    )


def own_weights(fragments: Sequence[Fragment]) -> list[Tensor]:
    """Copies on the host of the float32 weights that this rank holds, for `compare_state`."""
    return [fragment.tensors[WEIGHTS].detach().cpu().clone() for fragment in _own(fragments)]


def _own(fragments: Sequence[Fragment]) -> list[Fragment]:
    return [fragment for fragment in fragments if fragment.saved_here]


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether their bits are equal; NaN is equal to itself."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))

"""A recomputed state held against a checkpoint: every tensor, to the bit."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.schema import Precision
from pipeline.training.training_state import TrainingState
from pipeline.weights import persistent_buffers
from pipeline.zero.fragments import Fragment

_NAMED = 5
_OF_THE_WAY: dict[Precision, float] = {"fp32": 1e-3, "bf16_autocast": 0.1, "bf16": 0.1}
"""Where bits are not expected to be equal: how far weights may be apart, as a share of the way that they have gone.

AdamW divides gradients by their usual size: one that is nearly zero moves a weight by the learning rate to either side,
whichever way it was rounded."""


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
    """The first of the others, by kind and name."""
    distance: float
    """Of the weights from each other, as a share of the way that they have gone since the start of the replay."""
    holds: bool

    @property
    def text(self) -> str:
        """The result, for a person."""
        if self.equal == self.tensors:
            return f"equal to the bit: all {self.tensors} tensors"
        more = ", ..." if self.tensors - self.equal > len(self.different) else ""
        which = "" if self.holds else f" (not {', '.join(self.different)}{more})"
        kind = "within rounding" if self.holds else "different"
        return (
            f"{kind}: {self.equal} of {self.tensors} tensors are equal to the bit{which}; the weights are "
            f"{self.distance:.2g} of the way apart that they have gone"
        )


def compare_state(
    state: TrainingState, checkpoint: Checkpoint, began: Sequence[Tensor], ranks: Ranks, *, bits: bool
) -> ComparedState:
    """Compare on all ranks together; where `bits` are expected, nothing counts as rounding.

    Args:
        state: the recomputed one.
        checkpoint: of the same step.
        began: `own_weights` when the replay began, to measure the way that the weights have gone.
        ranks: all of them.
    """
    facts = checkpoint.manifest.facts
    tensors, unequal = dict[str, bool](), list[str]()
    apart = way = 0.0
    for fragment, first in zip(_own(state), began, strict=True):
        for kind, live in fragment.tensors.items():
            saved = checkpoint.read(fragment.parameter, kind, fragment.start, fragment.stop).to(live.device)
            name = f"{kind} {fragment.parameter}"
            tensors[name] = tensors.get(name, True) and _is_equal(live, saved)
            if kind == "master":
                apart += float((live.double() - saved.double()).square().sum())
                way += float((saved.double().cpu() - first.double()).square().sum())
    if ranks.is_leader:
        own, saved_buffers = persistent_buffers(state.engine.module), checkpoint.buffers()
        tensors |= {f"statistics {name}": _is_equal(own[name], tensor) for name, tensor in saved_buffers.items()}
    found: dict[str, bool] = {}
    for text in ranks.gather_texts(json.dumps(tensors)):
        for name, is_equal in json.loads(text).items():
            found[name] = found.get(name, True) and is_equal
    unequal = [name for name, is_equal in found.items() if not is_equal]
    squares = ranks.sum(torch.tensor([apart, way], dtype=torch.float64, device=ranks.device)).tolist()
    distance = math.sqrt(squares[0] / squares[1]) if squares[1] else math.sqrt(squares[0])
    allowed = 0.0 if bits else _OF_THE_WAY[facts.run.precision]  # type: ignore[index]
    holds = not unequal or (not bits and distance <= allowed)
    return ComparedState(
        facts.step, checkpoint.location, len(found), len(found) - len(unequal), tuple(unequal[:_NAMED]), distance, holds
    )


def own_weights(state: TrainingState) -> list[Tensor]:
    """Copies on the host of the float32 weights that this rank holds, for `compare_state`."""
    return [fragment.tensors["master"].detach().cpu().clone() for fragment in _own(state)]


def _own(state: TrainingState) -> list[Fragment]:
    return [fragment for fragment in state.fragments if fragment.saved_here]


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether their bits are equal; NaN is equal to itself."""
    return torch.equal(one.contiguous().view(torch.int32).cpu(), other.contiguous().view(torch.int32).cpu())

"""Norms of the weights and of their last update, by stage of the model, from the sharded state of AdamW."""

from bisect import bisect_right
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from models.variants import Variant
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.sections import OptimizerSettings
from pipeline.zero.fragments import Fragment

_CHUNK = 2**22  # elements taken at a time, so that temporaries fit beside a full GPU


def stage_names(variant: Variant) -> tuple[str, ...]:
    """The stages of the model: stem, s1, s2, ..., head."""
    return ("stem", *(f"s{number + 1}" for number in range(len(variant.stages))), "head")


def stage_index(variant: Variant) -> Callable[[str], int]:
    """A function from a parameter's name to the index of its stage in `stage_names`."""
    ends = list(accumulate(stage.depth for stage in variant.stages))

    def index(parameter: str) -> int:
        part, _, rest = parameter.partition(".")
        if part == "blocks":
            return 1 + bisect_right(ends, int(rest.partition(".")[0]))
        return {"stem": 0, "head": len(ends) + 1}[part]

    return index


@dataclass(frozen=True, slots=True)
class AdamWStep:
    """What AdamW's last step depended on, besides the state of each parameter."""

    settings: OptimizerSettings
    rate: float
    """The learning rate."""
    number: int
    """Steps that AdamW has taken; 0 before its first step, when no weight has moved."""
    undecayed: Container[str]
    """Parameters without weight decay."""
    rate_scale: Mapping[str, float]
    """Factor on the rate, by parameter; 1 if missing."""

    def update(self, parameter: str, weight: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """What the step subtracted from (part of) `parameter`, whose weights and moments after it are given."""
        rate = self.rate * self.rate_scale.get(parameter, 1.0)
        decay = 0.0 if parameter in self.undecayed else rate * self.settings.weight_decay
        first, second = self.settings.betas
        moved = mean / (variance.sqrt().div_((1 - second**self.number) ** 0.5).add_(self.settings.eps))
        moved *= rate / (1 - first**self.number)
        # after = (1 - decay) before - moved, solved for before - after.
        return moved.add_(weight, alpha=decay).div_(1 - decay)


@torch.no_grad()
def weight_and_update_norms(
    fragments: Sequence[Fragment], variant: Variant, step: AdamWStep, ranks: Ranks
) -> dict[str, float]:
    """The norm of the weights of each stage, and the ratio of AdamW's last update to it; all ranks call this together.

    The update follows from the moments after the last step, so no copy of the weights is needed.

    Args:
        fragments: the state of this rank.
        variant: of the model.
        step: the last one.
        ranks: all of them.

    Returns:
        `weight_norm/<stage>` and `update_ratio/<stage>`, with `all` for the whole model.
    """
    names, index = stage_names(variant), stage_index(variant)
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=ranks.device)
    for fragment in fragments:
        if not fragment.saved_here:  # replicated state counts once
            continue
        stage = index(fragment.parameter)
        state = (torch.split(fragment.tensors[kind], _CHUNK) for kind in ("master", "exp_avg", "exp_avg_sq"))
        for weight, mean, variance in zip(*state, strict=True):
            sums[0, stage] += _square_sum(weight)
            if step.number:
                sums[1, stage] += _square_sum(step.update(fragment.parameter, weight, mean, variance))
    squares = ranks.sum(sums).cpu()
    squares = torch.cat([squares, squares.sum(dim=1, keepdim=True)], dim=1)
    norms, updates = squares.sqrt().tolist()
    scalars = {}
    for name, norm, update in zip((*names, "all"), norms, updates, strict=True):
        scalars[f"weight_norm/{name}"] = norm
        scalars[f"update_ratio/{name}"] = update / norm if norm else 0.0
    return scalars


def _square_sum(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm.square()

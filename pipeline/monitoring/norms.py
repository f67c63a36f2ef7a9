"""How large the weights are and how far the last step moved them, stage by stage, from the sharded state of AdamW."""

from bisect import bisect_right
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from models.variants import Variant
from pipeline.distributed import Ranks
from pipeline.recipe.sections import OptimizerSettings
from pipeline.zero.fragments import Fragment

# Elements taken at a time, so that temporaries stay small beside a full GPU.
_PIECE = 2**22


def stage_names(variant: Variant) -> tuple[str, ...]:
    """The stages of the model: stem, s1, s2, ..., head."""
    return ("stem", *(f"s{number + 1}" for number in range(len(variant.stages))), "head")


def stage_places(variant: Variant) -> Callable[[str], int]:
    """A function from a parameter's name to the place of its stage in `stage_names`."""
    ends = list(accumulate(stage.depth for stage in variant.stages))

    def place(parameter: str) -> int:
        part, _, rest = parameter.partition(".")
        if part == "blocks":
            return 1 + bisect_right(ends, int(rest.partition(".")[0]))
        return {"stem": 0, "head": len(ends) + 1}[part]

    return place


@torch.no_grad()
def weight_and_update_norms(
    fragments: Sequence[Fragment],
    variant: Variant,
    settings: OptimizerSettings,
    ranks: Ranks,
    *,
    rate: float,
    steps: int,
    undecayed: Container[str],
    rate_scale: Mapping[str, float],
) -> dict[str, float]:
    """The norm of the weights of each stage, and that of AdamW's last update over it; all ranks call it together.

    The update is worked out from the moments that the last step left, so no copy of the weights is kept.

    Args:
        fragments: the state of this rank.
        variant: of the model.
        settings: AdamW's.
        rate: learning rate of the last step.
        steps: how often AdamW has stepped; before its first step the updates are 0.
        undecayed: parameters without weight decay.
        rate_scale: factor on the rate, by parameter; 1 where there is none.

    Returns:
        `weight_norm/<stage>` and `update_ratio/<stage>`, with `all` for the whole model.
    """
    names, place = stage_names(variant), stage_places(variant)
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=ranks.device)
    for fragment in fragments:
        if not fragment.saved_here:  # replicated state counts once
            continue
        stage = place(fragment.parameter)
        scaled = rate * rate_scale.get(fragment.parameter, 1.0)
        decay = 0.0 if fragment.parameter in undecayed else scaled * settings.weight_decay
        state = (torch.split(fragment.tensors[kind], _PIECE) for kind in ("master", "exp_avg", "exp_avg_sq"))
        for weight, mean, variance in zip(*state, strict=True):
            sums[0, stage] += _square_sum(weight)
            if steps:
                sums[1, stage] += _square_sum(_update(weight, mean, variance, scaled, decay, steps, settings))
    squares = ranks.sum(sums).cpu()
    squares = torch.cat([squares, squares.sum(dim=1, keepdim=True)], dim=1)
    norms, updates = squares.sqrt().tolist()
    scalars = {}
    for name, norm, update in zip((*names, "all"), norms, updates, strict=True):
        scalars[f"weight_norm/{name}"] = norm
        scalars[f"update_ratio/{name}"] = update / norm if norm else 0.0
    return scalars


def _update(
    weight: Tensor, mean: Tensor, variance: Tensor, rate: float, decay: float, steps: int, settings: OptimizerSettings
) -> Tensor:
    """What AdamW's step `steps` took from the weights, which are `weight` after it."""
    first, second = settings.betas
    moved = mean / (variance.sqrt().div_((1 - second**steps) ** 0.5).add_(settings.eps))
    moved *= rate / (1 - first**steps)
    # after = (1 - decay) before - moved, solved for before - after.
    return moved.add_(weight, alpha=decay).div_(1 - decay)


def _square_sum(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm.square()

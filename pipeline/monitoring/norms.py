"""Norms of the weights and of their last update, by parts of the model, from the sharded state of AdamW."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from models.variants import Variant
from pipeline.ranks.distributed import Ranks
from pipeline.recipe.sections import OptimizerSettings
from pipeline.zero.fragments import Fragment

_CHUNK = 2**22
"""Elements of one tensor; longer ones are cut."""
_TOGETHER = 2**23
"""Elements taken at a time, so that temporaries, two of that size, fit beside a full GPU."""

_State = tuple[Tensor, Tensor, Tensor]
"""Weights and AdamW's two moments, each (n,) float32."""


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


def block_names(variant: Variant) -> tuple[str, ...]:
    """Stem, blocks and head, as their parameters begin: stem, blocks.0, blocks.1, ..., head."""
    return ("stem", *(f"blocks.{number}" for number in range(sum(stage.depth for stage in variant.stages))), "head")


def block_index(variant: Variant) -> Callable[[str], int]:
    """A function from a parameter's name to the index of its block in `block_names`."""
    numbers = {name: number for number, name in enumerate(block_names(variant))}

    def index(parameter: str) -> int:
        first, second, *_ = parameter.split(".")
        return numbers[f"blocks.{second}" if first == "blocks" else first]

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

    def rate_and_decay(self, parameter: str) -> tuple[float, float]:
        """The learning rate of `parameter`, and the share of its weights that decayed."""
        rate = self.rate * self.rate_scale.get(parameter, 1.0)
        return rate, 0.0 if parameter in self.undecayed else rate * self.settings.weight_decay

    def updates(self, state: Sequence[_State], rate: float, decay: float) -> list[Tensor]:
        """What the step subtracted from parameters of one `rate` and `decay`, whose state after it is given."""
        weights, means, variances = (list(kind) for kind in zip(*state, strict=True))
        first, second = self.settings.betas
        roots = torch._foreach_sqrt(variances)
        torch._foreach_div_(roots, (1 - second**self.number) ** 0.5)
        torch._foreach_add_(roots, self.settings.eps)
        moved = torch._foreach_div(means, roots)
        torch._foreach_mul_(moved, rate / (1 - first**self.number))
        # after = (1 - decay) before - moved, solved for before - after.
        torch._foreach_add_(moved, weights, alpha=decay)
        torch._foreach_div_(moved, 1 - decay)
        return list(moved)


def weight_and_update_norms(
    fragments: Sequence[Fragment], variant: Variant, step: AdamWStep, ranks: Ranks
) -> dict[str, float]:
    """The norm of the weights of each stage, and the ratio of AdamW's last update to it; all ranks call this together.

    Args:
        fragments: the state of this rank.
        variant: of the model.
        step: the last one.
        ranks: all of them.

    Returns:
        `weight_norm/<stage>` and `update_ratio/<stage>`, with `all` for the whole model.
    """
    names = stage_names(variant)
    weights, updates = norms_by_part(fragments, len(names), stage_index(variant), step, ranks)
    scalars = {}
    for name, norm, update in zip((*names, "all"), _with_all(weights), _with_all(updates), strict=True):
        scalars[f"weight_norm/{name}"] = norm
        scalars[f"update_ratio/{name}"] = update / norm if norm else 0.0
    return scalars


@torch.no_grad()
def norms_by_part(
    fragments: Sequence[Fragment], parts: int, part_of: Callable[[str], int], step: AdamWStep, ranks: Ranks
) -> tuple[list[float], list[float]]:
    """The norms of the weights and of AdamW's last update, in each of `parts` parts; all ranks call this together.

    The update follows from the moments after the last step, so no copy of the weights is needed.

    Args:
        fragments: the state of this rank.
        parts: into which the model is divided.
        part_of: the part of a parameter, by its name.
        step: the last one.
        ranks: all of them.
    """
    numbers: list[int] = []
    found: list[list[Tensor]] = [[], []]
    for (rate, decay), pieces in _together(fragments, step):
        state = [tensors for _, tensors in pieces]
        numbers += [part_of(parameter) for parameter, _ in pieces]
        found[0] += _norms([weight for weight, _, _ in state])
        if step.number:
            found[1] += _norms(step.updates(state, rate, decay))
    sums = torch.stack([squared_norms_by_part(norms, numbers, parts, ranks.device) for norms in found])
    weights, updates = ranks.sum(sums).sqrt().tolist()
    return weights, updates


def squared_norms_by_part(norms: Sequence[Tensor], numbers: Sequence[int], parts: int, device: torch.device) -> Tensor:
    """The sums of the squares of `norms`, each () float64, over those of each part; (parts,) float64.

    `numbers` are their parts; there may be no norms at all.
    """
    total = torch.zeros(parts, dtype=torch.float64, device=device)
    if norms:
        # Not index_add, which adds in any order on GPUs.
        member = (torch.arange(parts)[:, None] == torch.tensor(numbers)).to(device, non_blocking=True)
        total += torch.where(member, torch.stack(list(norms)).square(), 0.0).sum(dim=1)
    return total


def _with_all(norms: Sequence[float]) -> list[float]:
    """With the norm of all parts together."""
    return [*norms, math.sqrt(sum(norm * norm for norm in norms))]


def _together(
    fragments: Sequence[Fragment], step: AdamWStep
) -> Iterator[tuple[tuple[float, float], list[tuple[str, _State]]]]:
    """Rate and decay, and pieces of parameters that have them, with their names: few lists of many small tensors."""
    groups: dict[tuple[float, float], list[tuple[str, _State]]] = {}
    sizes: Counter[tuple[float, float]] = Counter()
    for fragment in fragments:
        if not fragment.saved_here:  # replicated state counts once
            continue
        key = step.rate_and_decay(fragment.parameter)
        pieces = (torch.split(fragment.tensors[kind], _CHUNK) for kind in ("master", "exp_avg", "exp_avg_sq"))
        for weight, mean, variance in zip(*pieces, strict=True):
            if key in groups and sizes[key] + weight.numel() > _TOGETHER:
                yield key, groups.pop(key)
                sizes[key] = 0
            groups.setdefault(key, []).append((fragment.parameter, (weight, mean, variance)))
            sizes[key] += weight.numel()
    yield from groups.items()


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor, () float64."""
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float64))

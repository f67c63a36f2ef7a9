"""AdamW for one stage: two parameter groups, a rate for each layer, and steps that can be refused."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from models.coatnet import CoAtNet
from pipeline.recipe.sections import OptimizerSettings
from pipeline.zero.fragments import ParameterSlice


class AdamW(torch.optim.AdamW):
    """Fused AdamW that steps only while `allowed`, and with a fraction of the rate in some ranges of its tensors.

    DeepSpeed flattens a parameter group into one tensor. So that layers with rates of their own do not each need a
    group, and with it a partition and its collectives, `scales` says of which range what fraction of the group's rate
    is meant. A step is then the same arithmetic as with a group for each rate.
    """

    allowed: Callable[[], bool]
    """Asked at each step; one that is refused changes nothing. Refuses until told otherwise: DeepSpeed steps at other
    times, too."""
    scales: dict[Tensor, list[tuple[int, int, float]]]
    """Tensor -> start, stop and fraction of ranges of its elements that cover all that is used of it; empty where all
    have the whole rate."""

    def __init__(self, parameters: Any, settings: OptimizerSettings) -> None:
        super().__init__(parameters, lr=settings.peak_learning_rate, betas=settings.betas, eps=settings.eps, fused=True)
        self.allowed = lambda: False
        self.scales = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient, if it is allowed."""
        assert closure is None
        if not self.allowed():
            return
        if not self.scales:
            super().step()
            return
        for group in self.param_groups:
            self._scaled_step(group)

    def _scaled_step(self, group: dict[str, Any]) -> None:
        """What `torch.optim.AdamW` does with `group`, range by range."""
        ranges: dict[float, list[tuple[Tensor, ...]]] = {}
        for holder in group["params"]:
            if holder.grad is None:
                continue
            state = self.state[holder]
            tensors = (holder.data, holder.grad, state["exp_avg"], state["exp_avg_sq"])
            for start, stop, scale in self.scales[holder]:
                # The count is a copy, since the kernel counts up for every range.
                parts = (*(_part(tensor, start, stop) for tensor in tensors), state["step"].clone())
                ranges.setdefault(scale, []).append(parts)
            state["step"] += 1
        beta1, beta2 = group["betas"]
        for scale, parts_of_ranges in ranges.items():
            parameters, gradients, exp_avgs, exp_avg_sqs, steps = (
                list(kind) for kind in zip(*parts_of_ranges, strict=True)
            )
            adamw(
                parameters, gradients, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=group["lr"] * scale, weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip


def build_adamw(model: CoAtNet, settings: OptimizerSettings) -> AdamW:
    """AdamW over two groups, with weight decay and without; the model says which parameters decay spares."""
    spared = model.no_weight_decay()
    decayed = [p for name, p in model.named_parameters() if name not in spared]
    undecayed = [p for name, p in model.named_parameters() if name in spared]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return AdamW(groups, settings)


def layer_numbers(model: CoAtNet) -> dict[str, int]:
    """Parameter name -> its layer: 0 is the stem, then one for each block, then the head."""
    matcher = model.group_matcher()
    patterns = [(matcher["stem"], None), *matcher["blocks"]]
    keys = {}
    for name, _ in model.named_parameters():
        matches = [(order, re.match(pattern, name)) for order, (pattern, _) in enumerate(patterns)]
        keys[name] = next((order, *map(int, match.groups())) for order, match in matches if match)
    numbers = {key: number for number, key in enumerate(sorted(set(keys.values())))}
    return {name: numbers[key] for name, key in keys.items()}


def rate_scales(layers: dict[str, int], layer_decay: float) -> dict[str, float]:
    """Parameter name -> fraction of the learning rate: `layer_decay` to the power of the layers that follow its own."""
    last = max(layers.values())
    return {name: layer_decay ** (last - layer) for name, layer in layers.items()}


def scaled_ranges(
    everything: list[ParameterSlice], scales: dict[str, float]
) -> dict[Tensor, list[tuple[int, int, float]]]:
    """`AdamW.scales` for the places of one rank; neighbours with the same scale are one range."""
    result: dict[Tensor, list[tuple[int, int, float]]] = {}
    for place in sorted(everything, key=lambda place: place.offset):
        ranges = result.setdefault(place.holder, [])
        start, stop, scale = place.offset, place.offset + place.stop - place.start, scales[place.parameter]
        if ranges and ranges[-1][1:] == (start, scale):
            start = ranges.pop()[0]
        ranges.append((start, stop, scale))
    return result


def _part(tensor: Tensor, start: int, stop: int) -> Tensor:
    # A whole tensor may have strides that do not flatten.
    return tensor if stop - start == tensor.numel() else tensor.view(-1)[start:stop]

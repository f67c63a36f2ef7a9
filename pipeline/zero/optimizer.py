"""AdamW for one stage: clipping, two parameter groups, a learning rate for each layer, and steps that can be refused.

The gradient of some parameters is zero, and what is computed for it is rounding error. AdamW divides a gradient by its
usual size, and so would move them at the full learning rate. They keep their initial values instead.
"""

import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from models.coatnet import CoAtNet
from pipeline.recipe.sections import OptimizerSettings
from pipeline.zero.fragments import ParameterSlice

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """Fused AdamW that clips the gradient, and takes a fraction of the learning rate in ranges of its tensors.

    It steps only if the norm of the gradient is finite, which is decided on the device: nothing waits for the norm.

    DeepSpeed flattens a parameter group into one tensor. A group for each layer's learning rate would cost a partition
    and its collectives each; instead `scales` holds the fraction for each range of a tensor. The arithmetic of a step
    is the same as with separate groups.
    """

    gradient_norm: Callable[[], Tensor] | None
    """Called at each step: the global norm of the gradient, () float32. If it is negative or not finite, the step
    changes nothing. None refuses every step, because DeepSpeed also steps at times when no step is wanted."""
    scales: dict[Tensor, list[tuple[int, int, float]]]
    """Tensor -> (start, stop, fraction) of ranges that cover all elements in use; empty if every fraction is 1."""

    without_gradient: dict[Tensor, list[tuple[int, int]]]
    """Tensor -> (start, stop) of ranges whose gradient is taken for zero."""

    def __init__(self, parameters: Any, settings: OptimizerSettings) -> None:
        super().__init__(parameters, lr=settings.peak_learning_rate, betas=settings.betas, eps=settings.eps, fused=True)
        self.gradient_norm = None
        self._clip = settings.gradient_clip
        self.scales = {}
        self.without_gradient = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient, which is clipped in place."""
        assert closure is None
        if self.gradient_norm is None:
            return
        norm = self.gradient_norm()
        # The kernel does nothing where this is 1, and torch takes it off the step counts again.
        self.found_inf = (~(norm.isfinite() & (norm >= 0))).float()
        if self._clip > 0:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            # As in DeepSpeed's ZeRO optimizers, which would wait for the norm before they clip.
            torch._foreach_mul_(gradients, 1.0 / torch.clamp((norm + 1e-6) / self._clip, min=1.0))
        rounding = [
            gradient.view(-1)[start:stop]
            for holder, ranges in self.without_gradient.items()
            if (gradient := holder.grad) is not None
            for start, stop in ranges
        ]
        if rounding:
            torch._foreach_zero_(rounding)
        if not self.scales:
            super().step()
            return
        for group in self.param_groups:
            self._scaled_step(group)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The moments of a tensor that it optimizes, created as zeros before the first step."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return {name: state[name] for name in MOMENTS}

    @property
    def steps(self) -> int:
        """Steps taken so far, as its bias correction counts them."""
        return max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)

    @steps.setter
    def steps(self, steps: int) -> None:
        for state in self.state.values():
            state["step"].fill_(steps)

    def _scaled_step(self, group: dict[str, Any]) -> None:
        """Step `group` as `torch.optim.AdamW` does, range by range."""
        ranges: dict[float, list[tuple[Tensor, ...]]] = {}
        for holder in group["params"]:
            if holder.grad is None:
                continue
            state = self.state[holder]
            tensors = (holder.data, holder.grad, state["exp_avg"], state["exp_avg_sq"])
            for start, stop, scale in self.scales[holder]:
                # A copy of the step count, since the kernel increments it for every range.
                parts = (*(_part(tensor, start, stop) for tensor in tensors), state["step"].clone())
                ranges.setdefault(scale, []).append(parts)
            state["step"] += 1 - self.found_inf
        beta1, beta2 = group["betas"]
        for scale, parts_of_ranges in ranges.items():
            parameters, gradients, exp_avgs, exp_avg_sqs, steps = (
                list(kind) for kind in zip(*parts_of_ranges, strict=True)
            )
            adamw(
                parameters, gradients, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=group["lr"] * scale, weight_decay=group["weight_decay"], eps=group["eps"],
                found_inf=self.found_inf,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ParameterTable:
    """Properties of a model's parameters, by name: collected before ZeRO 3, which leaves the tensors empty."""

    shapes: dict[str, tuple[int, ...]]
    undecayed: frozenset[str]
    """Names of the parameters without weight decay."""
    rate_scales: dict[str, float]
    """Fraction of the learning rate that each parameter trains with."""
    without_gradient: dict[str, tuple[int, int]]
    """See `CoAtNet.parameters_without_gradient`."""

    @classmethod
    def of(cls, model: CoAtNet, settings: OptimizerSettings) -> Self:
        """The table of `model`, whose parameters are still whole."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        scales = rate_scales(layer_numbers(model), settings.layer_decay)
        return cls(shapes, frozenset(model.no_weight_decay()), scales, model.parameters_without_gradient())


def build_adamw(model: CoAtNet, settings: OptimizerSettings, undecayed: Container[str]) -> AdamW:
    """AdamW over two parameter groups: with weight decay, and without it for the names in `undecayed`."""
    decayed = [p for name, p in model.named_parameters() if name not in undecayed]
    spared = [p for name, p in model.named_parameters() if name in undecayed]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return AdamW(groups, settings)


def layer_numbers(model: CoAtNet) -> dict[str, int]:
    """Parameter name -> number of its layer: 0 for the stem, then one for each block, then the head."""
    matcher = model.group_matcher()
    patterns = [(matcher["stem"], None), *matcher["blocks"]]
    keys = {}
    for name, _ in model.named_parameters():
        matches = [(order, re.match(pattern, name)) for order, (pattern, _) in enumerate(patterns)]
        keys[name] = next((order, *map(int, match.groups())) for order, match in matches if match)
    numbers = {key: number for number, key in enumerate(sorted(set(keys.values())))}
    return {name: numbers[key] for name, key in keys.items()}


def rate_scales(layers: dict[str, int], layer_decay: float) -> dict[str, float]:
    """Parameter name -> fraction of the learning rate: `layer_decay` to the power of the number of layers after it."""
    last = max(layers.values())
    return {name: layer_decay ** (last - layer) for name, layer in layers.items()}


def scaled_ranges(slices: list[ParameterSlice], scales: dict[str, float]) -> dict[Tensor, list[tuple[int, int, float]]]:
    """`AdamW.scales` for the slices of one rank; adjacent slices with the same scale become one range."""
    result: dict[Tensor, list[tuple[int, int, float]]] = {}
    for part in sorted(slices, key=lambda part: part.offset):
        ranges = result.setdefault(part.holder, [])
        start, stop, scale = part.offset, part.offset + part.stop - part.start, scales[part.parameter]
        if ranges and ranges[-1][1:] == (start, scale):
            start = ranges.pop()[0]
        ranges.append((start, stop, scale))
    return result


def ranges_without_gradient(
    slices: list[ParameterSlice], elements: dict[str, tuple[int, int]]
) -> dict[Tensor, list[tuple[int, int]]]:
    """`AdamW.without_gradient` for the slices of one rank and the `elements` of whole parameters."""
    result: dict[Tensor, list[tuple[int, int]]] = {}
    for part in slices:
        first, last = elements.get(part.parameter, (0, 0))
        start, stop = max(first, part.start), min(last, part.stop)
        if start < stop:
            shift = part.offset - part.start
            result.setdefault(part.holder, []).append((start + shift, stop + shift))
    return result


def _part(tensor: Tensor, start: int, stop: int) -> Tensor:
    # A whole tensor may have strides that do not flatten.
    return tensor if stop - start == tensor.numel() else tensor.view(-1)[start:stop]

"""Forward and backward of each part of the model, beside what the data sheet of the device allows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from models.activation_checkpointing import recompute_in_backward
from models.coatnet import CoAtNet
from models.complexity import Cost, count_costs
from pipeline.compiler import compiler_options
from pipeline.gpu_benchmark.machine import this_device
from pipeline.gpu_benchmark.record import Parts, PartWork
from pipeline.gpu_benchmark.subject import MeasuredStage, join, noise, noise_images
from pipeline.gpu_benchmark.timing import Roofline, median_seconds
from pipeline.plan import TrainPlan
from pipeline.precision import autocast, model_dtype
from pipeline.recipe.schema import Precision
from pipeline.training.images import normalized
from pipeline.weights import build_model, to_precision


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    modules: tuple[nn.Module, ...]
    recomputed: tuple[bool, ...]
    costs: tuple[Cost, ...]

    def forward(self, x_BHWC: Tensor) -> Tensor:
        for module, again in zip(self.modules, self.recomputed, strict=True):
            x_BHWC = recompute_in_backward(module, x_BHWC) if again and torch.is_grad_enabled() else module(x_BHWC)
        return x_BHWC

    def step(self, x_BHWC: Tensor, precision: Precision) -> None:
        """Forward and backward, with a gradient of ones; gradients are dropped."""
        with autocast(precision, x_BHWC.device):  # of its own: a weight is cast anew for each micro-batch
            y = self.forward(x_BHWC)
        torch.autograd.backward(y, torch.ones_like(y))
        x_BHWC.grad = None
        for module in self.modules:
            module.zero_grad(set_to_none=True)

    def operations(self, images: int) -> int:
        """Of forward and backward, which counts as two forwards; a recomputation does not count, as in the MFU."""
        return 6 * images * sum(cost.multiply_adds for cost in self.costs)

    def bytes(self, images: int, in_float32: bool) -> int:
        """That have to be moved, whatever the kernels: what the backward needs is written by the forward and read by
        the backward, a weight is read by both, and its gradient is written."""
        stored = images * sum(cost.activation_bytes for cost in self.costs) * (2 if in_float32 else 1)
        weights = sum(p.numel() * p.element_size() for module in self.modules for p in module.parameters())
        return 2 * stored + 3 * weights


def measure_parts(subject: MeasuredStage) -> Parts:
    """The input, stem, stages and head of the model, compiled, fused and recomputed as the stage says.

    All samples are computed, as without stochastic depth, so that the parts add up to more than a step with it.
    """
    plan = subject.plan()
    stage, device = plan.stage, join(plan).device
    roofline = Roofline.of(this_device(device), stage.precision)
    dtype = model_dtype(stage.precision)
    model = build_model(plan, device)
    to_precision(model, dtype)
    model.set_grad_checkpointing(policy=stage.activation_checkpointing)
    model.set_fused_depthwise(stage.fused_depthwise)
    if stage.compile:
        model.compile_blocks(dynamic=False, options=compiler_options(deterministic=stage.deterministic))
    model.train()
    found = [_input(plan, device, roofline)]
    x = noise_images(plan, device, dtype)
    for part in _parts(model, plan):
        source = x.detach().requires_grad_(part.name != "S0 stem")
        run: Callable[[], None] = partial(part.step, source, stage.precision)
        operations = part.operations(stage.batch.micro_size)
        size = part.bytes(stage.batch.micro_size, stage.precision == "fp32")
        found.append(PartWork(part.name, roofline.work(median_seconds(run, device), operations, size)))
        with torch.no_grad(), autocast(stage.precision, device):
            x = part.forward(x)
    return Parts(tuple(found))


def _parts(model: CoAtNet, plan: TrainPlan) -> list[_Part]:
    costs = count_costs(model.variant, plan.stage.resolution, len(plan.classes))
    again = [*model.recomputed, False]
    modules = cast(list[nn.Module], [model.stem, *model.blocks, model.head])
    names = ["S0 stem"]
    for number, stage in enumerate(model.variant.stages, 1):
        names += [f"S{number} {stage.depth} x {stage.kind}"] * stage.depth
    names.append("head")
    found = []
    for name in dict.fromkeys(names):
        chosen = [place for place, other in enumerate(names) if other == name]
        found.append(
            _Part(
                name,
                tuple(modules[place] for place in chosen),
                tuple(again[place] for place in chosen),
                tuple(costs[place] for place in chosen),
            )
        )
    return found


def _input(plan: TrainPlan, device: torch.device, roofline: Roofline) -> PartWork:
    """The copy of a micro-batch to the device and its normalization there."""
    images = next(noise(plan, device)).images
    seconds = median_seconds(lambda: normalized(images, device, torch.float32), device)
    # A byte is read and a float32 written for each value, in the device's memory.
    return PartWork("input: copy, normalization", roofline.work(seconds, 2 * images.size, 5 * images.size))

"""What happens inside one micro-batch of a step, on given weights: a model without an engine, watched."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.random_streams import RandomStream
from data.stream import MicroBatch
from models.host_tensors import to_device
from models.norm import discard_recorded_statistics
from pipeline.plan import TrainPlan
from pipeline.precision import autocast, model_dtype
from pipeline.replay.not_finite import (
    NotFinite,
    first_in_state,
    first_seen,
    not_finite_in_rows,
    noted_draws,
)
from pipeline.replay.watch import Seen, Watch
from pipeline.training.inputs import prepared_inputs
from pipeline.training.loss import classification_loss
from pipeline.weights import build_model, copy_tensors, persistent_buffers, to_precision


@dataclass(frozen=True, slots=True)
class BlockNorms:
    """Euclidean norms of one block in one micro-batch, computed in float64; inf or nan if something is not finite."""

    name: str
    """`stem`, `blocks.0`, ..., `head`."""
    output: float
    """Of its output."""
    output_gradient: float | None
    """Of the gradient that arrives at its output; None without a backward, as for the next one."""
    parameter_gradient: float | None
    """Of the gradient of all its parameters."""


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One micro-batch of m samples as the model computes it in training. Tensors are on the CPU but for the images."""

    loss: float
    """The mean of `losses`: of the step's own, to the bit on the same kind of device with the same compute threads."""
    losses: Tensor
    """(m,) float32."""
    predicted: Tensor
    """(m,) int64, the classes with the highest logits."""
    probabilities: Tensor
    """(m,) float32, of the predicted classes, by softmax or sigmoid as in the recipe's loss."""
    label_probabilities: Tensor
    """(m,) float32, of the first labelled class; nan for samples without a label."""
    sample_gradients: Tensor | None
    """(m,) float64, Euclidean norms of each sample's gradient where it arrives at the stem's output, of the mean loss:
    a sample that moves the weights more than the others stands out, whatever its loss. Through BatchNorm and mixing it
    also has a share in the losses of others. None without a backward."""
    images: Tensor
    """(m, S, S, 3) float32 on the device: normalized, erased and mixed, before the model's precision rounds them."""
    blocks: tuple[BlockNorms, ...]
    """From the stem to the head. All gradients are those of this micro-batch's `loss`."""
    not_finite: NotFinite | None
    """The first weight or buffer that is not finite, otherwise the first output or loss, otherwise the first gradient
    in the order of the backward. None although a gate inside a block may have saturated at an infinity: what leaves the
    block is finite, and so are all gradients."""


class ObservedModel:
    """The model of a step without DeepSpeed, whose forwards and backwards can be watched and repeated.

    It computes as the step did, but never compiled, which may change last digits; and gradients are those of a
    micro-batch's mean loss, which an engine with several micro-batches on a rank divides by their number beforehand.
    Nothing is moved by it: neither weights nor running statistics.

    The memory that it needs is that of the weights in their precision, of what the stage's activation checkpointing
    keeps for the backward, and of the gradient of one parameter at a time.

    Args:
        plan: of the step, see `TrainPlan.at`.
        device: to compute on.
    """

    def __init__(self, plan: TrainPlan, device: torch.device) -> None:
        stage = plan.stage
        self.model = build_model(plan, device)
        """In training mode, with the initial weights until others are loaded."""
        to_precision(self.model, model_dtype(stage.precision))
        self.model.set_grad_checkpointing(policy=stage.activation_checkpointing)
        self.model.set_fused_depthwise(stage.fused_depthwise)
        self.model.train()
        self.plan, self._device = plan, device
        self._blocks: dict[str, nn.Module] = {
            "stem": self.model.stem,
            **{f"blocks.{number}": block for number, block in enumerate(self.model.blocks)},
            "head": self.model.head,
        }
        self._parameters = dict(self.model.named_parameters())
        self._of_state: NotFinite | None = None

    def load(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Copy whole float32 weights, and buffers as `persistent_buffers` names them, into the model.

        Raises:
            ValueError: names or shapes differ from the model's.
        """
        own = persistent_buffers(self.model)
        copy_tensors(dict(weights), {name: parameter.data for name, parameter in self._parameters.items()})
        copy_tensors(dict(buffers), own)
        self._of_state = first_in_state(self.model, own)

    def observe(self, batch: MicroBatch, step: int, number: int, *, backward: bool = True) -> Observation:
        """Micro-batch `number` of step `step`, both from 0: its forward and, unless told otherwise, its backward.

        Waits for the device once; something that is not finite is then found by computing all of it again.
        """
        watch = Watch(_norm, by_sample="stem")
        images, losses, logits = self._compute(batch, step, number, watch, self._blocks, backward=backward)
        kind = self.plan.stage.loss.kind
        probabilities = logits.softmax(dim=1) if kind == "softmax" else logits.sigmoid()
        predicted = logits.argmax(dim=1)
        labels = to_device(torch.from_numpy(batch.labels), self._device)[:, 0]
        of_label = probabilities.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        per_sample = [losses, predicted, probabilities.gather(1, predicted[:, None])[:, 0], of_label]
        of_samples = watch.sample_gradients
        per_sample.append(torch.zeros_like(losses) if of_samples is None else of_samples)
        numbers = [losses.mean()[None], *per_sample, torch.stack([one.measure for one in watch.seen])]
        # The one place where it waits. Float64 holds float32 and the numbers of classes exactly.
        read = torch.cat([one.double() for one in numbers]).cpu()
        loss, *columns, norms = torch.split(read, [len(one) for one in numbers])
        in_order = norms.tolist()
        first = next((one for one, norm in zip(watch.seen, in_order, strict=True) if not math.isfinite(norm)), None)
        not_finite = self._of_state or (first and self._located(batch, step, number, first))
        return Observation(
            loss=loss.item(),
            losses=columns[0].float(),
            predicted=columns[1].long(),
            probabilities=columns[2].float(),
            label_probabilities=torch.where(torch.from_numpy(batch.labels[:, 0]) < 0, math.nan, columns[3]).float(),
            sample_gradients=None if of_samples is None else columns[4],
            images=images,
            blocks=self._block_norms(watch.seen, in_order, backward=backward),
            not_finite=not_finite,
        )

    def is_finite(self, batch: MicroBatch, step: int, number: int) -> bool:
        """Whether `observe` finds nothing that is not finite, without looking for where it is."""
        watch = Watch(_norm)
        self._compute(batch, step, number, watch, self._blocks, backward=True)
        return self._of_state is None and bool(torch.stack([one.measure for one in watch.seen]).isfinite().all())

    def _compute(
        self,
        batch: MicroBatch,
        step: int,
        number: int,
        watch: Watch,
        modules: Mapping[str, nn.Module],
        *,
        backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (m, S, S, 3), losses (m,) and logits (m, classes), float32 on the device, as `take_step` has them."""
        plan = self.plan
        images, targets = prepared_inputs(batch, plan, step, number, self._device)
        watch.note("images", "input", images)
        torch.manual_seed(RandomStream.STOCHASTIC_DEPTH.torch_seed(plan.seed, step, number))
        try:
            # Without gradients, attention would choose another kernel, with other last digits.
            with watch.over(modules, self._parameters), torch.enable_grad():
                with autocast(plan.stage.precision, self._device):
                    logits = self.model(images.to(model_dtype(plan.stage.precision)))
                losses = classification_loss(logits, targets, plan.stage.loss.kind)
                watch.note("loss", "output", losses)
                if backward:
                    watch.backward(losses.mean())
        finally:
            discard_recorded_statistics(self.model)
        return images, losses.detach(), logits.detach().float()

    def _located(self, batch: MicroBatch, step: int, number: int, first: Seen) -> NotFinite:
        """The module in which it begins, where the blocks have shown `first` to be not finite."""
        watch = Watch(not_finite_in_rows)
        modules = {name: module for name, module in self.model.named_modules() if name}
        with noted_draws(self.model) as draws:
            self._compute(batch, step, number, watch, modules, backward=first.kind == "gradient")
        found = first_seen(watch.seen, modules, draws)
        return found or NotFinite(first.name, first.kind, None, first.size, ())

    def _block_norms(self, seen: list[Seen], norms: list[float], *, backward: bool) -> tuple[BlockNorms, ...]:
        outputs, gradients, of_parameters = dict[str, float](), dict[str, float](), defaultdict[str, list[float]](list)
        for one, norm in zip(seen, norms, strict=True):
            if one.kind == "output":
                outputs[one.name] = norm
            elif one.name in self._blocks:
                gradients[one.name] = norm
            elif one.name in self._parameters:
                of_parameters[next(block for block in self._blocks if one.name.startswith(f"{block}."))].append(norm)
        return tuple(
            BlockNorms(
                name,
                outputs[name],
                gradients[name] if backward else None,
                math.sqrt(math.fsum(norm * norm for norm in of_parameters[name])) if backward else None,
            )
            for name in self._blocks
        )


def _norm(x: Tensor) -> Tensor:
    """() float64. Not finite exactly if an element is: squares of float32 do not overflow there."""
    return torch._foreach_norm([x], 2, torch.float64)[0]

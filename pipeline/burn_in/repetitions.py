"""One micro-batch of a stage computed again and again on a device: forward, backward, and the bits of both."""

import time
from collections import Counter

import torch
from torch import Tensor

from data.random_streams import RandomStream
from data.text.counted import counted
from models.norm import discard_recorded_statistics, recorded_statistics
from pipeline.burn_in.verdict import DeviceBits
from pipeline.fingerprint import fingerprint
from pipeline.gpu_benchmark.machine import is_memory_full
from pipeline.gpu_benchmark.subject import noise
from pipeline.host import processor_name
from pipeline.plan import TrainPlan
from pipeline.precision import autocast, model_dtype
from pipeline.ranks.gpus import gpu_uuid
from pipeline.training.inputs import prepared_inputs
from pipeline.training.loss import classification_loss
from pipeline.weights import build_model, to_precision

LEAST_REPETITIONS = 3


def burn_in(plan: TrainPlan, device: torch.device, *, where: str, node: str, seconds: float) -> DeviceBits:
    """Compute the first micro-batch of a training stage on `device` for `seconds`, `LEAST_REPETITIONS` times at least.

    Images are noise and weights are the initial ones, both by the recipe's seed: the same on all devices. The model is
    in the stage's precision, with its activation checkpointing, and is not compiled. After `prepare_devices`, which
    says whether the algorithms are deterministic.

    Args:
        plan: of the stage.
        device: a GPU, or the CPU.
        where: which device it is, for people.
        node: where it is.
        seconds: after which no further repetition begins.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bits, spent, problem = dict[str, int](), 0.0, None
    try:
        bits, spent = _repeated(plan, device, seconds)
    except RuntimeError as error:
        if not is_memory_full(error):
            raise
        problem = f"the memory of the GPU is full ({str(error).strip().partition('. ')[0]})"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else processor_name()
    return DeviceBits(where, node, name, gpu_uuid(device) if on_gpu else "", _kind(device, name), bits, spent, problem)


def _repeated(plan: TrainPlan, device: torch.device, seconds: float) -> tuple[dict[str, int], float]:
    """The results with their numbers, and the seconds that they took."""
    micro_batch, bits = _MicroBatch(plan, device), Counter[str]()
    began = time.monotonic()
    while bits.total() < LEAST_REPETITIONS or time.monotonic() < began + seconds:
        bits[micro_batch.compute()] += 1
    return dict(bits), time.monotonic() - began


class _MicroBatch:
    """The model, the inputs, and what is computed of them."""

    def __init__(self, plan: TrainPlan, device: torch.device) -> None:
        self._plan, self._device, stage = plan, device, plan.stage
        self._model = build_model(plan, device)
        to_precision(self._model, model_dtype(stage.precision))
        self._model.set_grad_checkpointing(policy=stage.activation_checkpointing)
        self._model.set_fused_depthwise(stage.fused_depthwise)
        self._model.train()
        self._parameters = dict(self._model.named_parameters())
        self._batch = next(noise(plan, device))  # stays, since the device copies from it
        images, self._targets = prepared_inputs(self._batch, plan, 0, 0, device)
        self._images = images.to(model_dtype(stage.precision))

    def compute(self) -> str:
        """Forward and backward; returns the fingerprints of loss, gradient and BatchNorm's statistics with names."""
        stage = self._plan.stage
        torch.manual_seed(RandomStream.STOCHASTIC_DEPTH.torch_seed(self._plan.seed, 0, 0))
        with autocast(stage.precision, self._device):
            logits = self._model(self._images)
        loss = classification_loss(logits, self._targets, stage.loss.kind).mean()
        found = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        gradient = {name: one for name, one in zip(self._parameters, found, strict=True) if one is not None}
        values: dict[str, dict[str, Tensor]] = {
            "loss": {"": loss}, "gradient": gradient, "statistics": {"": recorded_statistics(self._model)},
        }  # fmt: skip
        result = " ".join(f"{name}={fingerprint(tensors)}" for name, tensors in values.items())
        discard_recorded_statistics(self._model)
        return result


def _kind(device: torch.device, name: str) -> str:
    """What decides which kernels run: on CPUs also their instructions, and the threads that share a sum."""
    if device.type != "cuda":
        name += f" with {torch.backends.cpu.get_cpu_capability()} and {counted(torch.get_num_threads(), 'thread')}"
    else:
        name += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    return f"{name}, torch {torch.__version__}"

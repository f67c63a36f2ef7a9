"""What passes through the modules of a model in one forward and backward, in order of computation."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

SeenKind = Literal["weight", "input", "output", "gradient"]
"""A parameter or a buffer; the images; what a module returns, or the losses; a gradient of an output or a parameter."""


class Seen(NamedTuple):
    """A measured tensor: its name, what it is, its number of elements, and the measure, on the device."""

    name: str
    """Of the module or of the parameter; `images` or `loss`."""
    kind: SeenKind
    size: int
    measure: Tensor


class Watch:
    """Measures outputs of modules in a forward, and in its backward their gradients and those of parameters.

    Nothing waits for the device, and no tensor is kept but the measures. The gradients of parameters are freed one by
    one. What activation checkpointing computes a second time is not measured again.

    Args:
        measure: of a tensor of any shape and dtype, under `no_grad`.
        by_sample: the module whose gradient of the output is also measured for each sample of the micro-batch.
    """

    def __init__(self, measure: Callable[[Tensor], Tensor], by_sample: str | None = None) -> None:
        self.seen: list[Seen] = []
        """In order of computation."""
        self.sample_gradients: Tensor | None = None
        """(m,) float64, Euclidean norms of the gradients of `by_sample`; None before a backward."""
        self._by_sample = by_sample
        self._measure = measure
        self._in_backward = False

    @torch.no_grad()
    def note(self, name: str, kind: SeenKind, tensor: Tensor) -> None:
        """Measure a tensor."""
        self.seen.append(Seen(name, kind, tensor.numel(), self._measure(tensor.detach())))

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, whose forward was watched; inside `over`."""
        self._in_backward = True
        loss.backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def over(self, modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Inside, one forward, and `backward`, are watched."""
        handles = [module.register_forward_hook(partial(self._output, name)) for name, module in modules.items()]
        for name, parameter in parameters.items():
            hook = partial(self._parameter, name)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _output(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._in_backward:
            return
        self.note(name, "output", output)
        output.register_hook(partial(self.note, name, "gradient"))  # type: ignore[no-untyped-call]
        if name == self._by_sample:
            output.register_hook(self._samples)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _samples(self, gradient: Tensor) -> None:
        self.sample_gradients = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)

    def _parameter(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self.note(name, "gradient", gradient)

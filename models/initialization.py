"""Initial weights: N(0, std), and norms as the identity, as in MaxViT, which shares authors with CoAtNet."""

import hashlib
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from models.norm import BatchNorm
from models.relative_bias import RelativeBias

RELATIVE_BIAS_STD = 0.02


def initialize_parameters(
    model: nn.Module, seed: int, *, weight_std: float | None, only: Container[str] | None = None
) -> None:
    """Fill parameters and buffers in place, on any device.

    Weights are N(0, `weight_std`), or N(0, 1 / fan-in) for None; relative tables N(0, 0.02); biases 0. The values of a
    parameter depend only on the seed, its name and the kind of device. So several processes can each fill the
    parameters that they own, named in `only`; the `running_mean` there stands for all of a BatchNorm's statistics.
    """
    tasks = []
    # A CPU draws normal numbers in one thread; CoAtNet-7 has 2.4 billion of them.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for prefix, module in model.named_modules():
            if isinstance(module, BatchNorm) and (only is None or f"{prefix}.running_mean" in only):
                module.reset_statistics()
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if only is not None and name not in only:
                    continue
                fill = partial(_fill, module, name, parameter, seed, weight_std)
                if parameter.device.type == "cpu":
                    tasks.append(threads.submit(fill))
                else:
                    fill()
    for task in tasks:
        task.result()


@torch.no_grad()
def _fill(module: nn.Module, name: str, parameter: Tensor, seed: int, weight_std: float | None) -> None:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    if name.endswith(".bias"):
        parameter.zero_()
    elif isinstance(module, nn.Linear | nn.Conv2d):
        parameter.normal_(0.0, weight_std or parameter[0].numel() ** -0.5, generator=generator)
    elif isinstance(module, RelativeBias):
        parameter.normal_(0.0, RELATIVE_BIAS_STD, generator=generator)
    else:
        assert isinstance(module, nn.LayerNorm | BatchNorm), name
        parameter.fill_(1.0)

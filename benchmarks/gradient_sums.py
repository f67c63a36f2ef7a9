"""What summing the gradients of the ranks as bf16 costs in accuracy, beside what computing them in bf16 costs.

python -m benchmarks.gradient_sums --variant coatnet_debug --ranks 2 8 32 128

Each rank's gradient is that of a micro-batch of noise. The sum as bf16 is a ring's, as gloo and NCCL make it: on its
way around, the partial sum of an element is rounded at every rank that adds to it, from another rank on for each part
of the tensor. The errors are relative to float64 sums, in the Euclidean norm over all parameters.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import report
from models.registry import create_model
from models.variants import VARIANTS


def gradients(variant: str, ranks: int, *, image_size: int, micro_batch: int, dtype: torch.dtype) -> Tensor:
    """(ranks, parameters) float32: the gradient of each rank's micro-batch, of a model computed in `dtype`."""
    model = create_model(variant, num_classes=10, image_size=image_size).train()
    model.initialize(0)
    model = model.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.float()
    rows = []
    for rank in range(ranks):
        draws = torch.Generator().manual_seed(rank)
        images = torch.randn(micro_batch, image_size, image_size, 3, generator=draws)
        labels = torch.randint(10, (micro_batch,), generator=draws)
        model.zero_grad()
        F.cross_entropy(model(images.to(dtype)).float(), labels).backward()  # type: ignore[no-untyped-call]
        rows.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    return torch.stack(rows)


def ring_sum(rows: Tensor) -> Tensor:
    """The sum (parameters,) of bf16 `rows` (ranks, parameters), rounded to bf16 at every rank on the way around."""
    ranks = len(rows)
    parts = []
    for number, columns in enumerate(torch.tensor_split(rows, ranks, dim=1)):
        total = columns[number]
        for step in range(1, ranks):
            total = total + columns[(number + step) % ranks]
        parts.append(total)
    return torch.cat(parts)


def main() -> None:
    """Print the errors for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="coatnet_debug", choices=VARIANTS)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = {"image_size": arguments.image_size, "micro_batch": arguments.micro_batch}
    exact = gradients(arguments.variant, max(arguments.ranks), dtype=torch.float32, **options).double()
    rounded = gradients(arguments.variant, max(arguments.ranks), dtype=torch.bfloat16, **options)

    def error(found: Tensor, expected: Tensor) -> float:
        return float((found.double() - expected).norm() / expected.norm())

    rows: list[dict[str, Any]] = [
        {
            "ranks": ranks,
            "computed in bf16": error(rounded[:ranks].double().sum(0), exact[:ranks].sum(0)),
            "summed as fp32": error(rounded[:ranks].sum(0), rounded[:ranks].double().sum(0)),
            "summed as bf16": error(ring_sum(rounded[:ranks].bfloat16()), rounded[:ranks].double().sum(0)),
        }
        for ranks in arguments.ranks
    ]
    report(f"Relative error of the summed gradient, {arguments.variant}", rows, arguments.json)


if __name__ == "__main__":
    main()

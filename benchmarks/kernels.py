"""The operators of a training step, forward and backward, each of which is at least one kernel on a GPU.

python -m benchmarks.kernels --variant coatnet_0 --micro-batches 2

Counted on the meta device, in seconds and without memory, in eager mode, with the attention of a GPU. Views and
allocations launch nothing and do not count; AdamW, the exchange of gradients and the input are left out.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.timing import report
from models.complexity import _MemoryEfficientAttention
from models.norm import move_running_statistics, recorded_statistics
from models.registry import create_model
from models.variants import VARIANTS
from pipeline.planner.trace.recording import LAUNCH_NOTHING


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        tensors = (x for x in tree_leaves((arguments, keywords, result)) if isinstance(x, torch.Tensor))
        name = function.overloadpacket.__name__
        if name not in LAUNCH_NOTHING and any(tensor.is_meta for tensor in tensors):  # draws are made on the host
            self.counts[name] += 1
        return result


def count_operators(
    variant: str, *, image_size: int, micro_batch: int, micro_batches: int, dtype: torch.dtype, drop_path_rate: float
) -> Counter[str]:
    """Calls of each operator in a step of a model whose weights and images are `dtype`."""
    with torch.device("meta"):
        model = create_model(variant, num_classes=1000, image_size=image_size, drop_path_rate=drop_path_rate)
    for parameter in model.train().parameters():
        parameter.data = parameter.data.to(dtype)
    images = torch.empty(micro_batch, image_size, image_size, 3, dtype=dtype, device="meta")
    counting = _Counting()
    with counting, _MemoryEfficientAttention():
        for _ in range(micro_batches):
            model(images).float().mean().backward()
        move_running_statistics(model, recorded_statistics(model) / micro_batches)
    return counting.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="coatnet_0", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--drop-path-rate", type=float, default=0.2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    counts = count_operators(
        arguments.variant,
        image_size=arguments.image_size,
        micro_batch=arguments.micro_batch,
        micro_batches=arguments.micro_batches,
        dtype=torch.bfloat16 if arguments.precision == "bf16" else torch.float32,
        drop_path_rate=arguments.drop_path_rate,
    )
    rows: list[dict[str, Any]] = [{"operator": "all", "calls": counts.total()}]
    rows += [{"operator": name, "calls": count} for name, count in counts.most_common()]
    report(f"Operators of a step of {arguments.variant}", rows, arguments.json)


if __name__ == "__main__":
    main()

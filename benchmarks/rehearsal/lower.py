"""One block as torch.compile lowers it for an H100 that is not there: kernels, atomics, timed configurations.

bash benchmarks/rehearsal/run.sh lower --kind transformer
bash benchmarks/rehearsal/run.sh lower --kind mbconv --stochastic-depth

The block is compiled as `build_engine` does, as one graph, forward and backward, with the settings of
`prepare_devices`; its kernels are compiled to machine code. Exit code 1 if the settings ask for deterministic code and
there is an atomic addition, or a kernel with several configurations.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from benchmarks.rehearsal.generated_code import read_generated_code
from benchmarks.rehearsal.lowering import cubin_bytes, lowered
from benchmarks.rehearsal.pretended_gpu import DEVICE, pretended_gpu
from benchmarks.timing import report
from models.attention import TransformerBlock
from models.complexity import _MemoryEfficientAttention
from models.drop import Kept, draw_kept
from models.mbconv import MBConv
from models.variants import find_variant
from pipeline.compiler import compiler_options
from pipeline.ranks.device_settings import prepare_devices

_SIDES = {"transformer": 14, "mbconv": 56}
_WIDTHS = {"transformer": 768, "mbconv": 192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(_SIDES), default="transformer", help="a block of coatnet_3")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--precision", choices=["bf16_autocast", "bf16"], default="bf16")
    parser.add_argument("--stochastic-depth", action="store_true")
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--code", type=Path, help="write the generated code to this file")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_devices(gpus=True, deterministic=arguments.deterministic)
    warnings.filterwarnings("ignore")
    codes = _lower(arguments)
    graphs = [read_generated_code(code) for code in codes]
    rows: list[dict[str, Any]] = []
    for name, graph in zip(("forward", "backward"), graphs, strict=True):
        print(
            f"{name}: {len(graph.kernels)} Triton kernels, {graph.atomics} atomic additions; calls {dict(graph.calls)}"
        )
        rows += [
            {
                "graph": name, "kernel": kernel.name, "configurations": len(sizes := cubin_bytes(kernel)),
                "atomics": kernel.atomics, "machine code bytes": sizes[0],
            }
            for kernel in graph.kernels
        ]  # fmt: skip
    report(f"Kernels of a {arguments.kind} block", rows, arguments.json)
    if arguments.code is not None:
        arguments.code.write_text("\n\n".join(codes))
    undefined = [row["kernel"] for row in rows if row["atomics"] or row["configurations"] > 1]
    if arguments.deterministic and undefined:
        sys.exit(f"not deterministic: {', '.join(undefined)}")


def _lower(arguments: argparse.Namespace) -> list[str]:
    """The generated code of forward and backward."""
    side, width = _SIDES[arguments.kind], _WIDTHS[arguments.kind]
    variant = find_variant("coatnet_3")
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    with pretended_gpu():
        block: TransformerBlock | MBConv
        with torch.device(DEVICE):
            if arguments.kind == "transformer":
                block = TransformerBlock(width, width, stride=1, grid=(side, side), variant=variant)
            else:
                block = MBConv(width, width, stride=1, variant=variant)
            x_BHWC = torch.empty(arguments.micro_batch, side, side, width, dtype=dtype, requires_grad=True)
        for parameter in block.parameters():
            parameter.data = parameter.data.to(dtype)
        kept = _kept(block.branches, arguments.micro_batch) if arguments.stochastic_depth else None
        options = compiler_options(deterministic=arguments.deterministic)
        nn.Module.compile(block.train(), fullgraph=True, dynamic=False, options=options)
        autocast = arguments.precision == "bf16_autocast"
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), _MemoryEfficientAttention():
            return lowered(lambda: block(x_BHWC, kept))


def _kept(branches: int, batch: int) -> tuple[Kept, ...]:
    """A draw whose number of samples is a symbol in the code, as in a compiled model."""
    with unset_fake_temporarily():
        drawn = draw_kept([0.5] * branches, batch, torch.device("cpu"))
    kept = tuple(Kept(*(torch.empty(x.shape, dtype=x.dtype, device=DEVICE) for x in one)) for one in drawn)
    for one in kept:
        torch._dynamo.maybe_mark_dynamic(one.samples, 0)
    return kept


if __name__ == "__main__":
    main()

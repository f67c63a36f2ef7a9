"""What the Triton kernels of MBConv use of a GPU, by compiling them for it; no GPU is needed.

    python -m benchmarks.kernel_resources        # every kernel, for sm_80 (A100) and sm_90 (H100)

Registers of a thread, bytes that spill to memory, bytes of shared memory of a program, and how many warps of the 64
that an SM can hold fit by registers. Needs `triton`, whose wheel has NVIDIA's assembler and disassembler.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.kernels import depthwise, normalization
from models.kernels.launch import CHANNELS, COLUMNS, PIXELS

WARPS = 4
"""Of a program, Triton's default, with which the kernels are launched."""
REGISTERS = 65_536
"""Of an SM of both architectures (CUDA C++ Programming Guide, compute capabilities)."""
KERNELS: dict[str, tuple[Any, dict[str, bool | int]]] = {
    "moments": (normalization.moments, {}),
    "depthwise": (depthwise.depthwise, {"STRIDE": 1}),
    "depthwise, stride 2": (depthwise.depthwise, {"STRIDE": 2}),
    "activate": (normalization.activate, {}),
    "activate_backward": (normalization.activate_backward, {}),
    "input_gradient, activated": (normalization.input_gradient, {"ACTIVATED": True}),
    "depthwise_backward": (depthwise.depthwise_backward, {"STRIDE": 1}),
    "depthwise_backward, stride 2": (depthwise.depthwise_backward, {"STRIDE": 2}),
    "input_gradient": (normalization.input_gradient, {"ACTIVATED": False}),
}
"""By name, in the order of a training step, with what they are compiled for beside GELU."""
_IMAGES = ("x", "y", "dy", "dz", "out", "gradient")
"""Arguments in the images' dtype; the other tensors are float32."""
_TILE = {"BP": PIXELS, "BW": COLUMNS, "BC": CHANNELS}


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one compiled kernel."""

    registers: int
    """Of a thread; at most 255."""
    spilled: int
    """Bytes of local memory and stack of a thread."""
    shared: int
    """Bytes of shared memory of a program."""

    @property
    def warps(self) -> int:
        """Of an SM, by registers, which are given to warps in units of 256; at most 64."""
        each = -(-self.registers * 32 // 256) * 256
        return min(64, REGISTERS // (each * WARPS) * WARPS)


def compiled(name: str, architecture: int, *, tanh: bool, dtype: str) -> Resources:
    """The kernel `name` for a GPU such as sm_`architecture`, its channels a multiple of 16.

    Args:
        name: of `KERNELS`.
        architecture: 80, 90.
        tanh: the form of GELU.
        dtype: of the images: `bf16` or `fp32`.
    """
    kernel, constants = KERNELS[name]
    values = {"TANH": tanh, **_TILE, **constants}
    types, constexprs, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in values:
            types[argument], constexprs[(place,)] = "constexpr", values[argument]
            continue
        kind = f"*{dtype if argument in _IMAGES else 'fp32'}"
        types[argument] = "i32" if argument.isupper() else kind
        if argument == "C" or not argument.isupper():
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=types, constexprs=constexprs, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"\b{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local, made.metadata.shared)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    dtype = parser.parse_args().dtype
    print(f"triton {triton.__version__}, {dtype}")
    print("| kernel | GELU | GPU | registers | spilled bytes | shared bytes | warps of 64 |")
    print("|---|---|---|---|---|---|---|")
    for name, tanh, architecture in product(KERNELS, (True, False), (80, 90)):
        if "TANH" not in KERNELS[name][0].arg_names and not tanh:
            continue
        found = compiled(name, architecture, tanh=tanh, dtype=dtype)
        cells = (name, "tanh" if tanh else "exact", f"sm_{architecture}", found.registers, found.spilled, found.shared)
        print("|", " | ".join(map(str, (*cells, found.warps))), "|", flush=True)


if __name__ == "__main__":
    main()

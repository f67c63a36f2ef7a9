"""What stands in the code that Inductor generates: Triton kernels with their configurations, atomics, other calls."""

import re
from collections import Counter
from dataclasses import dataclass

_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
_CALL = re.compile(r"(extern_kernels\.\w+|torch\.ops\.aten\.[\w.]+?)\(")


@dataclass(frozen=True, slots=True)
class GeneratedKernel:
    """One Triton kernel."""

    name: str
    source: str
    """A Python module that defines it."""

    @property
    def atomics(self) -> int:
        """Places where it adds by atomic instructions, whose order is not defined."""
        return self.source.count("tl.atomic_add")


@dataclass(frozen=True, slots=True)
class GeneratedGraph:
    """The code of one graph: of a forward or of a backward."""

    kernels: tuple[GeneratedKernel, ...]
    calls: Counter[str]
    """Calls of kernels that are not generated, such as matrix products."""

    @property
    def atomics(self) -> int:
        """The sum over its kernels."""
        return sum(kernel.atomics for kernel in self.kernels)


def read_generated_code(code: str) -> GeneratedGraph:
    """The kernels and calls in the Python code that Inductor generates for one graph."""
    kernels = tuple(GeneratedKernel(name, source) for name, source in _KERNEL.findall(code))
    return GeneratedGraph(kernels, Counter(_CALL.findall(code)))

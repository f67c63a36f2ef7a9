"""A CUDA device that is not there: what torch has to be told so that fake tensors on it train a model.

Tensors on the device have a shape, a dtype and memory that is counted, and no values. Tensors on the host are real.
Needs the CUDA build of torch and what run.sh builds of native/.
"""

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85_000_000_000, multi_processor_count=132,
    max_threads_per_multi_processor=2048, warp_size=32, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20,
    gcnArchName="", uuid="0", is_integrated=False, clock_rate=1_980_000, memory_clock_rate=2_619_000,
    memory_bus_width=5120,
)  # fmt: skip
"""What torch.cuda.get_device_properties says of an H100 SXM."""


class _Quiet:
    """A stream or an event: everything has been done. `on_wait` is told of what waits for the device."""

    on_wait: Callable[[str], None] = staticmethod(lambda kind: None)
    cuda_stream = stream_id = device_index = 0
    device = DEVICE

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def method(*arguments: Any, **keywords: Any) -> Any:
            if "synchronize" in name:
                _Quiet.on_wait(f"{name} of a stream or event")
            return {"query": True, "elapsed_time": 0.0}.get(name)

        return method

    def __enter__(self) -> "_Quiet":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def pretended_gpu(on_wait: Callable[[str], None] | None = None) -> Iterator[FakeTensorMode]:
    """Inside, `cuda:0` is an H100 of fake tensors; for the rest of the process, as torch cannot be told otherwise.

    Args:
        on_wait: called with the kind of each wait for the device that is not an operation on a tensor.

    Raises:
        SystemExit: this is torch's build for CPUs, or run.sh has not started it.
    """
    folder = os.environ.get("REHEARSAL_NATIVE")
    if torch.version.cuda is None or folder is None:
        raise SystemExit("this needs the CUDA build of torch, and libraries: start it by benchmarks/rehearsal/run.sh")
    count = ctypes.CDLL(str(Path(folder) / "device_count.so")).pretend_devices
    guard = ctypes.CDLL(str(Path(folder) / "device_guard.so"))
    if on_wait is not None:
        _Quiet.on_wait = staticmethod(on_wait)
    _replace(torch.cuda, _cuda_functions())
    _replace(fake_tensor, {"init_gpu_context": lambda device: None})
    _replace(FakeTensorMode, {"avoid_device_init": property(lambda self: True)})
    _replace(nn.Module, {"_apply": _apply_in_place})
    _replace(torch.Tensor, {"record_stream": lambda tensor, stream: None})
    # With a device autograd runs on a thread of its own, which would not be in the modes of this one.
    torch._C._set_multithreading_enabled(False)
    _count_devices_in_backwards(count)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        guard.install_guard()
        _replace(torch._C, {"_ensureCUDADeviceGuardSet": lambda: None})  # it would put the real one back
        torch._C._set_only_lift_cpu_tensors(True)
        yield mode


def _replace(owner: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def _cuda_functions() -> dict[str, Any]:
    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_name": PROPERTIES.name, "get_device_capability": (9, 0), "get_device_properties": PROPERTIES,
        "is_bf16_supported": True, "is_current_stream_capturing": False, "empty_cache": None, "_lazy_init": None,
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
        "reset_peak_memory_stats": None, "manual_seed": None, "manual_seed_all": None, "get_rng_state": state,
        "set_rng_state": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "cudart": None,
    }  # fmt: skip

    def always(answer: Any) -> Callable[..., Any]:
        return lambda *arguments, **keywords: answer

    return {
        **{name: always(answer) for name, answer in answers.items()},
        "current_stream": lambda *arguments: _Quiet(),
        "default_stream": lambda *arguments: _Quiet(),
        "Stream": _Quiet,
        "Event": _Quiet,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda *arguments: _Quiet.on_wait("torch.cuda.synchronize"),
    }


def _apply_in_place(module: nn.Module, function: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for fake tensors: torch's own would put new parameters in the place of the optimizer's."""
    for child in module.children():
        child._apply(function)  # type: ignore[no-untyped-call]
    for parameter in filter(None.__ne__, module._parameters.values()):
        assert parameter is not None
        new = function(parameter.detach())
        if (new.dtype, new.device) != (parameter.dtype, parameter.device):
            parameter.data = new
    module._buffers.update({name: None if x is None else function(x) for name, x in module._buffers.items()})
    return module


def _count_devices_in_backwards(count: Callable[[int], None]) -> None:
    """One device while autograd runs, which otherwise refuses gradients on it; none in operations of fake tensors,
    which would ask the driver for its properties."""
    devices = deque([0])

    @contextmanager
    def counted(number: int) -> Iterator[None]:
        devices.append(number)
        count(number)
        try:
            yield
        finally:
            devices.pop()
            count(devices[-1])

    def within(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            with counted(number):
                return function(*arguments, **keywords)

        return run

    _replace(FakeTensorMode, {"__torch_dispatch__": within(0, FakeTensorMode.__torch_dispatch__)})
    _replace(torch.autograd, {name: within(1, getattr(torch.autograd, name)) for name in ("grad", "backward")})

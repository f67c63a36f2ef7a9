"""Makes Inductor compile for an H100 that is not there, and keeps the code in the place of running it."""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from benchmarks.rehearsal.generated_code import GeneratedKernel
from benchmarks.rehearsal.pretended_gpu import DEVICE, PROPERTIES

CAPABILITY = 90


class _Compiled(Exception):
    """Raised where the generated code would run."""


def lowered(function: Callable[[], object]) -> list[str]:
    """The code of forward and backward of a compiled module that `function` calls; once, within `pretended_gpu`."""
    codes: list[str] = []
    _prepare_compiler(codes)
    try:
        function()
    except _Compiled:
        return codes
    raise AssertionError("nothing was compiled")


def _prepare_compiler(codes: list[str]) -> None:
    _pretend_driver()
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.graph import GraphLowering

    inductor, functorch = torch._inductor.config, torch._functorch.config
    # In this process, which pretends; every time, since the code is the result; and not by the launcher that keeps no
    # machine code to measure.
    settings = {"compile_threads": 1, "fx_graph_cache": False, "use_static_cuda_launcher": False}
    # Folding computes constants on the device, which has no values.
    settings["joint_graph_constant_folding"] = False
    for name, value in settings.items():
        setattr(inductor, name, value)
    # Otherwise the backward's graph is compiled when it first runs.
    for name in ("force_non_lazy_backward_lowering", "enable_autograd_cache"):
        setattr(functorch, name, name.startswith("force"))

    def keep_code(graph: Any) -> SimpleNamespace:
        code = graph.codegen()[0]
        codes.append(getattr(code, "value", code))
        return SimpleNamespace(call=stop, __file__="none")

    def stop(arguments: object) -> NoReturn:
        raise _Compiled

    setattr(GraphLowering, "compile_to_module", keep_code)  # noqa: B010


def cubin_bytes(kernel: GeneratedKernel) -> list[int]:
    """Compile a kernel to machine code with each of its configurations; more than one are chosen from by a timing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kernel.name}.py"
        path.write_text(kernel.source)
        spec = importlib.util.spec_from_file_location(kernel.name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[kernel.name] = module
        spec.loader.exec_module(module)  # Triton reads the file
        tuner = getattr(module, kernel.name)
        compiled = [tuner._precompile_config(configuration) for configuration in tuner.configs]
    return [len(getattr(one, "kernel", one).asm["cubin"]) for one in compiled]


def _pretend_driver() -> None:
    import triton
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    def always(answer: Any) -> Callable[..., Any]:
        return lambda *arguments, **keywords: answer

    limits = {"max_shared_mem": PROPERTIES.shared_memory_per_block_optin, "multiprocessor_count": 132}
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=always(GPUTarget("cuda", CAPABILITY, PROPERTIES.warp_size)),
            get_current_device=always(0),
            get_device_capability=always((9, 0)),
            get_device_interface=always(torch.cuda),
            get_active_torch_device=always(DEVICE),
            get_benchmarker=always(None),
            is_active=always(True),
            utils=SimpleNamespace(get_device_properties=always(limits)),
        )
    )
    triton_helpers.set_driver_to_gpu = always(None)
    answers = {
        "current_device": 0, "device_count": 1, "get_device_properties": PROPERTIES, "get_raw_stream": 0,
        "get_compute_capability": CAPABILITY, "is_available": True, "is_triton_capable": True, "synchronize": None,
        "raise_if_triton_unavailable": None,
    }  # fmt: skip
    for interface in (device_interface.CudaInterface, device_interface.CudaInterface.Worker):
        for name, answer in answers.items():
            setattr(interface, name, staticmethod(always(answer)))

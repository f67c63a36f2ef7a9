"""The device that the measurements run on."""

import subprocess
from dataclasses import replace

import torch

from pipeline.gpu_benchmark.record import Device
from pipeline.ranks.gpus import PEAKS, known_name, memory_bandwidth

_SECONDS = 20.0
_MEMORY_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def this_device(device: torch.device) -> Device:
    """`device` with its peaks by the data sheets, and the versions of the libraries that compute on it."""
    if device.type != "cuda":
        return Device("CPU", False, torch.__version__)
    properties = torch.cuda.get_device_properties(device)
    kind = known_name(properties.name)
    return Device(
        name=properties.name,
        is_gpu=True,
        torch=torch.__version__,
        kind=kind,
        memory_bytes=properties.total_memory,
        peak=PEAKS[kind] if kind else None,
        bandwidth=memory_bandwidth(properties.name),
        cuda=torch.version.cuda or getattr(torch.version, "hip", None),
        cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        nccl=".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
    )


def present_device(on_gpus: bool) -> Device:
    """The device of a rank here that may use GPUs or not, with its driver, too."""
    if not on_gpus or not torch.cuda.is_available():
        return this_device(torch.device("cpu"))
    return replace(this_device(torch.device("cuda", 0)), driver=_driver())


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where its program does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def is_memory_full(error: BaseException) -> bool:
    """Whether `error` means that the memory of a GPU is full: that of torch's allocator, or of a library beside it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _MEMORY_FULL)

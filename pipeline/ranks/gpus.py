"""GPUs whose peak performance is known: the one table of them."""

from dataclasses import dataclass

import torch

PEAKS = {
    "GB200": 2500e12, "B200": 2250e12,
    "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12,
    "RTX 6000 Ada": 364e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
    "MI300X": 1307e12,
}  # fmt: skip
"""Dense bf16 peaks in FLOP/s, with sums in float32, from the makers' data sheets, by a part of the name that torch
has for a device. The first key that is in a name counts, so those with more words stand before those with fewer."""

BANDWIDTHS = {
    "GB200": 8.0e12, "B200": 8.0e12,
    "GH200 144G": 4.9e12, "GH200": 4.0e12, "H200": 4.8e12,
    "H100 NVL": 3.9e12, "H100 PCIe": 2.0e12, "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12, "A100 80GB PCIe": 1.935e12, "A100": 1.555e12, "L40S": 0.864e12,
    "RTX 6000 Ada": 0.96e12, "RTX 5090": 1.792e12, "RTX 4090": 1.008e12, "RTX 3090": 0.936e12,
    "MI300X": 5.3e12,
}  # fmt: skip
"""Peaks of the GPU's own memory in bytes per second, from the makers' data sheets, by names as in `PEAKS`. An A100
whose name does not say 80 GB has 40."""

FLOAT32_PEAKS = {
    "GB200": 80e12, "B200": 75e12,
    "GH200": 67e12, "H200 NVL": 60e12, "H200": 67e12,
    "H100 NVL": 60e12, "H100 PCIe": 51e12, "H100": 67e12,
    "A100": 19.5e12, "L40S": 91.6e12,
    "RTX 6000 Ada": 91.1e12, "RTX 5090": 104.8e12, "RTX 4090": 82.6e12, "RTX 3090": 35.6e12,
    "MI300X": 163.4e12,
}  # fmt: skip
"""Float32 peaks in FLOP/s outside of tensor cores, from the makers' data sheets, by names as in `PEAKS`."""


def known_name(name: str) -> str | None:
    """The key in `PEAKS` of a GPU that torch calls `name`; None for one that is not in the table."""
    return _key(PEAKS, name)


def memory_bandwidth(name: str) -> float | None:
    """Bytes per second by `BANDWIDTHS` of a GPU that torch calls `name`; None for one that is not in the table."""
    key = _key(BANDWIDTHS, name)
    return BANDWIDTHS[key] if key else None


def known_gpu(device: torch.device) -> str | None:
    """The key in `PEAKS` of `device`; None for a GPU that is not in the table, or for a CPU."""
    return known_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def has_gpu() -> bool:
    """Whether this process may use a GPU. Takes none of its memory, as asking for its name does."""
    return torch.cuda.is_available()


def present_gpu() -> str | None:
    """The key in `PEAKS` of this process's GPU; None if there is no GPU, or it is not in the table."""
    return known_gpu(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process may use."""

    name: str
    """As torch names it."""
    memory: int
    """Bytes."""

    @property
    def peak(self) -> float | None:
        """Dense bf16 operations per second by `PEAKS`; None for one that is not in the table."""
        key = known_name(self.name)
        return PEAKS[key] if key else None


def present_gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, in the order of their numbers."""
    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count()))
    return tuple(Gpu(properties.name, properties.total_memory) for properties in found)


def device_name(device: torch.device) -> str:
    """What a device is called in messages."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _key(table: dict[str, float], name: str) -> str | None:
    return next((key for key in table if key in name), None)


def visible_gpus() -> int:
    """GPUs that this process can use; 0 without any."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_uuid(device: torch.device) -> str:
    """The UUID of a GPU as `nvidia-smi -L` prints it; empty if torch does not know it."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # since torch 2.4
    return f"GPU-{uuid}" if uuid else ""

"""GPUs whose peak performance is known."""

from dataclasses import dataclass

import torch

PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "MI300X": 1307e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 peaks in FLOP/s from the makers' data sheets, by a part of the name that torch gives the device."""


def known_gpu(device: torch.device) -> str | None:
    """The key in `PEAKS` of `device`; None for a GPU that is not in the table, or for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((key for key in PEAKS if key in name), None)


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
        return next((peak for key, peak in PEAKS.items() if key in self.name), None)


def present_gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, in the order of their numbers."""
    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count()))
    return tuple(Gpu(properties.name, properties.total_memory) for properties in found)

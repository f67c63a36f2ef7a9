"""Follows the bytes of tensors that are alive while a computation runs, and the most that were at a time."""

import gc
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.planner.trace.recording import in_layout


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, counts the storages of tensors of one device that operators make, and notices when they are freed.

    Works on the meta device, where nothing is allocated, as on a real one. What kernels allocate for themselves is not
    seen.

    Args:
        device: type of the device, such as `cpu` or `meta`.
        held: tensors that exist already.
    """

    def __init__(self, device: str, held: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes that are alive now."""
        self.peak = 0
        """The most that were alive at a time since the beginning, or since `restart`."""
        self._device = device
        self._sizes: dict[int, int] = {}
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        result = in_layout(function.overloadpacket.__name__, arguments, function(*arguments, **keywords))
        for value in tree_leaves((arguments, keywords, result)):  # an argument may have been resized or made elsewhere
            if isinstance(value, Tensor):
                self._add(value)
        return result

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.live

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        before = self._sizes.get(key)
        if before is None:
            weakref.finalize(storage, self._remove, key)
        if size != before:
            self._sizes[key] = size
            self.live += size - (before or 0)
            self.peak = max(self.peak, self.live)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def living_tensors(device: str) -> list[Tensor]:
    """The tensors of a type of device that Python knows of."""
    gc.collect()
    return [found for found in gc.get_objects() if _is_tensor(found) and found.device.type == device]


def _is_tensor(found: object) -> bool:
    return isinstance(found, torch.Tensor)

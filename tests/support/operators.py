"""Which operators run: a record of what autograd and modules dispatch, below them, and of what the host reads."""

import sys
from collections import Counter
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = frozenset({"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"})


class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, counts operators by name, and keeps what `_to_copy` and `copy_` convert.

    Attributes:
        counts: name, such as `native_batch_norm` -> number of calls.
        casts: (shape, dtype before, dtype after) of each conversion.
        of_size: names of the operators, views left out, that have tensors of `size` elements, each with the numbers of
            those among its arguments and among its results.
    """

    def __init__(self, size: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = size
        self.of_size: list[tuple[str, int, int]] = []
        self.counts: Counter[str] = Counter()
        self.casts: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.counts[name] += 1
        result = function(*arguments, **(keywords or {}))
        if self.size and not function.is_view and name != "_unsafe_view":
            sides = (arguments, result if isinstance(result, tuple) else (result,))
            found = [sum(isinstance(t, Tensor) and t.numel() == self.size for t in side) for side in sides]
            if any(found):
                self.of_size.append((name, found[0], found[1]))
        if name in ("_to_copy", "copy_"):
            before = arguments[1] if name == "copy_" else arguments[0]
            if before.dtype != result.dtype:
                self.casts.append((tuple(before.shape), before.dtype, result.dtype))
        return result


class HostReads(TorchFunctionMode):
    """Inside, notes where Python reads the values of tensors: there, a host waits for its GPU.

    Attributes:
        modules: the module of each such place, but for `models.drop`, which draws on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[str] = []

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if getattr(function, "__name__", "") in _READS:
            frame = sys._getframe(1)
            while frame.f_back and frame.f_globals["__name__"].startswith("torch."):
                frame = frame.f_back
            if frame.f_globals["__name__"] != "models.drop":
                self.modules.append(frame.f_globals["__name__"])
        return function(*arguments, **(keywords or {}))

"""Which operators run: a record of what autograd and modules dispatch, below them."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, counts operators by name, and keeps what `_to_copy` and `copy_` convert.

    Attributes:
        counts: name, such as `native_batch_norm` -> number of calls.
        casts: (shape, dtype before, dtype after) of each conversion.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.casts: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.counts[name] += 1
        result = function(*arguments, **(keywords or {}))
        if name in ("_to_copy", "copy_"):
            before = arguments[1] if name == "copy_" else arguments[0]
            if before.dtype != result.dtype:
                self.casts.append((tuple(before.shape), before.dtype, result.dtype))
        return result

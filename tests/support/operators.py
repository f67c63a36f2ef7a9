"""Which operators run: a record of what autograd and modules dispatch, below them."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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

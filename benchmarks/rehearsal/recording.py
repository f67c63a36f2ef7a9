"""Records what a step does on a pretended GPU: kernels, waits of the host, copies, exchanges, live bytes."""

import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.rehearsal.roofline import Rates, computes_in_float32, count_operations, label, operation_seconds
from pipeline.planner.trace.recording import LAUNCH_NOTHING

_PROJECT = Path(__file__).resolve().parents[2]
_NOT_THE_CAUSE = (str(Path(__file__).parent), str(_PROJECT / "models" / "complexity.py"))
_DATA_DEPENDENT = ("nonzero", "masked_select", "equal", "_unique2")
_COPIES = ("_to_copy", "copy_")


@dataclass(slots=True)
class Operation:
    """All calls of one operator."""

    calls: int = 0
    bytes: int = 0
    operations: int = 0
    seconds: float = 0.0
    """The least time, by `operation_seconds`."""


@dataclass(slots=True)
class Recorded:
    """What was seen since the last `Recording.start_over`."""

    kernels: Counter[str] = field(default_factory=Counter)
    """Calls of operators that launch at least one kernel."""
    operations: dict[str, Operation] = field(default_factory=dict)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kind and source line of what makes the host wait for the device."""
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kind and source line of copies between host and device that do not wait."""
    exchanges: dict[str, Operation] = field(default_factory=dict)
    """Collectives of torch, with their dtype; bytes of the tensors that a rank gives."""
    live: int = 0
    """Bytes on the device at the end."""
    peak: int = 0


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the fake tensors of `pretended_gpu`: operations on host tensors run, those on device tensors are recorded.

    What is read back from the device is 1 if it is a floating-point number, and else 0 or False.
    """

    def __init__(self, rates: Rates | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rates = rates or Rates()
        self.recorded = Recorded()
        self._sizes: dict[int, int] = {}
        self._pinned: set[int] = set()
        """Addresses, which tensors share with the arrays that they are made of."""

    def start_over(self) -> None:
        """Begin a new record; what is live stays so."""
        self.recorded = Recorded(live=self.recorded.live, peak=self.recorded.live)

    def waited(self, kind: str) -> None:
        """Record that the host waits for the device."""
        self.recorded.waits[kind, _source_line()] += 1

    def __enter__(self) -> Self:
        # That of fake tensors reads element by element, and a device copies all of them once.
        FakeTensor.tolist = lambda tensor: self._tolist(tensor)  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[no-untyped-call, no-any-return]

    def _tolist(self, tensor: Tensor) -> Any:
        self.waited("tolist")
        return _list_of_values(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = dict(keywords or {})
        name = function.overloadpacket.__name__
        tensors = list(_tensors((arguments, keywords)))
        device = keywords.get("device")
        made = device is not None and torch.device(device).type == "cuda"
        if not made and all(tensor.device.type != "cuda" for tensor in tensors):
            return self._on_host(function, name, arguments, keywords)
        if name == "_local_scalar_dense":
            self.waited("item")
            return _list_of_values(tensors[0])
        if name in _DATA_DEPENDENT:
            self.waited(name)
        if name in _COPIES and (target := self._copied(name, tensors, arguments, keywords)) is not None:
            return target
        result = function(*arguments, **keywords)
        results = list(_tensors(result))
        for tensor in results:
            self._note_storage(tensor)
        if function.namespace == "c10d":
            self._exchanged(name, tensors)
        elif name not in LAUNCH_NOTHING:
            self._launched(function, arguments, keywords, result, [*tensors, *results])
        return result

    def _on_host(self, function: Any, name: str, arguments: Any, keywords: dict[str, Any]) -> Any:
        """Run it, in memory that is not pinned, which needs a driver, but remembered as if it were."""
        if name == "is_pinned":
            return self._is_pinned(arguments[0])
        pinned = keywords.pop("pin_memory", False) or name == "_pin_memory"
        with unset_fake_temporarily():
            result = arguments[0].clone() if name == "_pin_memory" else function(*arguments, **keywords)
        if pinned:
            storage = result.untyped_storage()
            self._pinned.add(storage.data_ptr())
            weakref.finalize(storage, self._pinned.discard, storage.data_ptr())
        return result

    def _is_pinned(self, tensor: Tensor) -> bool:
        with unset_fake_temporarily():
            return tensor.untyped_storage().data_ptr() in self._pinned

    def _copied(self, name: str, tensors: list[Tensor], arguments: Any, keywords: dict[str, Any]) -> Tensor | None:
        """Record a copy between host and device; for one to the host, the tensor there."""
        target, source = tensors[:2] if name == "copy_" else (None, tensors[0])
        to = target.device if target is not None else torch.device(keywords.get("device") or source.device)
        if to.type == source.device.type:
            return None
        on_host = source if source.device.type == "cpu" else target
        pinned = keywords.get("pin_memory", False) or (on_host is not None and self._is_pinned(on_host))
        asked = bool(keywords.get("non_blocking") or (name == "copy_" and len(arguments) > 2 and arguments[2]))
        size = source.numel() * source.element_size()
        kind = f"{source.device.type} to {to.type}, {size:,} bytes, {'pinned' if pinned else 'pageable'}"
        if asked and pinned:
            self.recorded.copies[kind, _source_line()] += 1
        else:
            # CUDA stages pageable memory, and may wait for the stream in order to (API Synchronization Behavior).
            self.waited(kind + (", non_blocking: may wait" if asked else ""))
        if to.type == "cuda":
            return None
        values = _values(source.shape, keywords.get("dtype") or source.dtype)
        with unset_fake_temporarily():
            return values if target is None else target.copy_(values)

    def _exchanged(self, name: str, tensors: list[Tensor]) -> None:
        given = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        for tensor in given:
            exchange = self.recorded.exchanges.setdefault(
                f"{name.strip('_')} {tensor.dtype}".replace("torch.", ""), Operation()
            )
            exchange.calls += 1
            exchange.bytes += tensor.numel() * tensor.element_size()

    def _launched(self, function: Any, arguments: Any, keywords: Any, result: Any, tensors: list[Tensor]) -> None:
        name = label(function, arguments)
        self.recorded.kernels[name] += 1
        distinct = list({id(tensor): tensor for tensor in tensors if tensor.device.type == "cuda"}.values())
        count = count_operations(function, name, arguments, keywords, result)
        float32 = computes_in_float32(distinct)
        size, seconds = operation_seconds(name, distinct, count, float32=float32, rates=self.rates)
        total = self.recorded.operations.setdefault(name, Operation())
        total.calls, total.bytes = total.calls + 1, total.bytes + size
        total.operations, total.seconds = total.operations + count, total.seconds + seconds

    def _note_storage(self, tensor: Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.recorded.live += storage.nbytes()
            self.recorded.peak = max(self.recorded.peak, self.recorded.live)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.recorded.live -= self._sizes.pop(key, 0)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _values(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    with unset_fake_temporarily():
        return torch.full(shape, 1.0 if dtype.is_floating_point else 0, dtype=dtype)


def _list_of_values(tensor: Tensor) -> Any:
    with unset_fake_temporarily():
        return _values(tensor.shape, tensor.dtype).tolist()


def _source_line() -> str:
    """The innermost line of this project, or else of DeepSpeed, that led here."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(_NOT_THE_CAUSE):
            continue
        package = frame.filename.rpartition("/site-packages/")[2]
        if package.startswith("deepspeed/") or package.startswith(f"{_PROJECT}/"):
            return f"{package.removeprefix(f'{_PROJECT}/')}:{frame.lineno}"
    return "elsewhere"

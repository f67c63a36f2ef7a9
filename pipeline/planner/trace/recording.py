"""Records the operations of a computation on the meta device, as a GPU would run them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.planner.trace.operations import Access, Kind, Operation, Product, Scores, Taps

LAUNCH_NOTHING = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided",
    "expand", "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "device", "resize_", "set_",
}  # fmt: skip
"""Operators that make views or allocate, and launch no kernel."""

_NORMS = {
    "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_softmax", "cudnn_batch_norm",
    "native_batch_norm", "native_group_norm", "native_layer_norm",
}  # fmt: skip
_BATCH_NORM_GRADIENTS = {"native_batch_norm_backward", "cudnn_batch_norm_backward"}
_REDUCTIONS = {"amax", "linalg_vector_norm", "max", "mean", "sum", "var", "var_mean"}
_COPIES = {"_to_copy", "cat", "clone", "constant_pad_nd", "copy_", "flip", "repeat", "roll", "stack"}
_GATHERS = {"embedding", "gather", "index", "index_add", "index_put_", "index_select", "scatter_add"}
_FLASH = "_scaled_dot_product_flash_attention"
_EFFICIENT = "_scaled_dot_product_efficient_attention"


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, collects `operations` of tensors on the meta device, in their order; those of other devices are not
    recorded, such as draws on the host.

    A tensor whose storage several views share is one value; an operation in place gives it a new number.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._values: dict[int, int] = {}
        self._storages: list[Any] = []  # kept, so that no two have one address; on the meta device they are empty
        self._count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        name = function.overloadpacket.__name__
        result = in_layout(name, arguments, function(*arguments, **keywords))
        inputs = _tensors((arguments, keywords))
        outputs = _tensors(result)
        if name in LAUNCH_NOTHING or not any(tensor.is_meta for tensor in [*inputs, *outputs]):
            return result
        written = _written_in_place(function, arguments, keywords)
        kept = {id(tensor) for tensor in written}
        overwrites = name in ("copy_", "fill_", "zero_")  # without reading what was there
        reads = [tensor for tensor in inputs if not (overwrites and id(tensor) in kept)]
        read = _merged(Access(self._value(tensor), _bytes(tensor)) for tensor in reads)
        results = _merged_tensors([*written, *(tensor for tensor in outputs if id(tensor) not in kept)])
        for tensor in written:
            self._renumber(tensor)
        write = _merged(Access(self._value(tensor), _bytes(tensor)) for tensor in results)
        self.operations.extend(_operations(name, arguments, keywords, inputs, outputs, read, write, self._number))
        return result

    def value(self, tensor: Tensor) -> int:
        """The number of what `tensor` holds now."""
        return self._value(tensor)

    def _number(self) -> int:
        self._count += 1
        return self._count

    def _value(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._values:
            self._storages.append(storage)
            self._values[storage._cdata] = self._number()
        return self._values[storage._cdata]

    def _renumber(self, tensor: Tensor) -> None:
        self._value(tensor)
        self._values[tensor.untyped_storage()._cdata] = self._number()


def in_layout(name: str, arguments: Sequence[Any], result: Any) -> Any:
    """The result of an operator; that of a convolution in its layout, which on the meta device is (B, C, H, W)."""
    if name not in ("convolution", "convolution_backward"):
        return result
    tensors = arguments[:3] if name == "convolution_backward" else arguments[:2]
    if not any(tensor.is_meta and _is_channels_last(tensor) for tensor in tensors):
        return result
    if name == "convolution":
        return torch.empty_like(result, memory_format=torch.channels_last)
    images, *rest = result
    return (images if images is None else torch.empty_like(images, memory_format=torch.channels_last), *rest)


def _operations(
    name: str,
    arguments: Sequence[Any],
    keywords: dict[str, Any],
    inputs: list[Tensor],
    outputs: list[Tensor],
    read: tuple[Access, ...],
    write: tuple[Access, ...],
    number: Callable[[], int],
) -> list[Operation]:
    """The kernels that one operator launches."""
    if name == "convolution":
        return _convolution(arguments, outputs[0], read, write, number)
    if name == "convolution_backward":
        return _convolution_gradients(arguments, outputs, number, read, write)
    found = Operation("elementwise", name, read, write, in_float32=_in_float32(inputs))
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return [replace(found, kind="matmul", work=_product(name, arguments))]
    if name.startswith((_FLASH, _EFFICIENT)):
        return [replace(found, kind="attention", work=_scores(name, arguments))]
    found = replace(found, **_pass(name, arguments, inputs, outputs))
    if found.kind == "normalization" and (found.crosses_rows or name == "native_layer_norm_backward"):
        return _two_passes(found, number)
    if name == "native_layer_norm" and not inputs[0].is_contiguous():
        # Torch's kernel takes rows, and copies them first.
        rows = Access(number(), read[0].bytes)
        copy = Operation("copy", "clone", read[:1], (rows,), in_float32=found.in_float32, strided=True)
        return [copy, replace(found, reads=(rows, *read[1:]))]
    return [found]


def _two_passes(found: Operation, number: Callable[[], int]) -> list[Operation]:
    """A norm that sums over rows reads its tensors twice: for the sums, and for the result that needs them.

    LayerNorm's backward reads them for the gradient of its input, and again for those of its weights.
    """
    largest = max(found.writes, key=lambda access: access.bytes)
    sums = tuple(access for access in found.writes if access != largest)
    if found.crosses_rows and not sums:
        sums = (Access(number(), 0),)
    first = replace(found, kind="reduction", name=f"{found.name}_sums", writes=sums, crosses_rows=True)
    second = replace(found, writes=(largest,), crosses_rows=False)
    return [first, replace(second, reads=(*found.reads, *sums))] if found.crosses_rows else [second, first]


def _pass(name: str, arguments: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor]) -> dict[str, Any]:
    """What is special about an operation that only passes over its tensors."""
    largest_in = max((tensor.numel() for tensor in inputs), default=0)
    largest_out = max((tensor.numel() for tensor in outputs), default=0)
    if name in _NORMS:
        training_batch_norm = "batch_norm" in name and name != "_native_batch_norm_legit_no_training" and arguments[5]
        return {"kind": "normalization", "crosses_rows": bool(training_batch_norm)}
    if name in _BATCH_NORM_GRADIENTS:
        return {"kind": "normalization", "crosses_rows": True}
    if name.endswith(("norm_backward", "_softmax_backward_data")):
        return {"kind": "normalization"}
    if name in _REDUCTIONS and largest_in > largest_out:
        return {"kind": "reduction", "crosses_rows": True}
    if name in _GATHERS:
        return {"kind": "gather"}
    if name in _COPIES:
        source = max(inputs, key=torch.Tensor.numel, default=None)
        other_order = (
            source is not None and name not in ("cat", "constant_pad_nd") and _order(source) != _order(outputs[0])
        )
        return {"kind": "copy", "strided": other_order, "is_cast": name == "_to_copy" and not other_order}
    orders = {_order(tensor) for tensor in [*inputs, *outputs] if tensor.numel() == largest_out}
    return {"strided": len(orders) > 1}


def _convolution(
    arguments: Sequence[Any],
    output: Tensor,
    read: tuple[Access, ...],
    write: tuple[Access, ...],
    number: Callable[[], int],
) -> list[Operation]:
    x, weight, bias, groups = arguments[0], arguments[1], arguments[2], arguments[8]
    work = _convolution_work(x, weight, output, groups)
    bias_access = read[-1] if bias is not None else None
    in_float32 = x.dtype == torch.float32
    layout = _is_channels_last(x) or _is_channels_last(output)
    kind: Kind = "depthwise" if isinstance(work, Taps) else "convolution"
    if bias is None:
        return [Operation(kind, "convolution", read, write, work, in_float32, layout)]
    assert bias_access is not None
    if kind == "depthwise" and not layout:  # torch's own kernel, which adds the bias
        return [Operation(kind, "convolution", read, write, work, in_float32, layout)]
    # cuDNN's result, to which torch adds the bias in a pass of its own.
    plain = tuple(Access(number(), access.bytes) for access in write)
    return [
        Operation(kind, "convolution", read[:-1], plain, work, in_float32, layout),
        Operation("elementwise", "add_bias", (*plain, bias_access), write, in_float32=in_float32),
    ]


def _convolution_gradients(
    arguments: Sequence[Any],
    outputs: list[Tensor],
    number: Callable[[], int],
    read: tuple[Access, ...],
    write: tuple[Access, ...],
) -> list[Operation]:
    """The gradients of input, weight and bias, each as far as it is wanted."""
    gradient, x, weight, groups, wanted = (arguments[place] for place in (0, 1, 2, 9, 10))
    work = _convolution_work(x, weight, gradient, groups)
    kind: Kind = "depthwise" if isinstance(work, Taps) else "convolution"
    layout = _is_channels_last(gradient) or _is_channels_last(x)
    in_float32 = x.dtype == torch.float32
    sources = {id(tensor): access for tensor, access in zip((gradient, x, weight), read, strict=False)}
    of_gradient, of_x, of_weight = (sources[id(tensor)] for tensor in (gradient, x, weight))
    found, results = [], iter(write)
    for place, needs in enumerate(((of_gradient, of_weight), (of_gradient, of_x), (of_gradient,))):
        if not wanted[place]:
            continue
        result = next(results)
        if place == 2:
            found.append(Operation("reduction", "bias_gradient", needs, (result,), crosses_rows=True))
            continue
        name = "convolution_input_gradient" if place == 0 else "convolution_weight_gradient"
        turned = _turned(work, weights=place == 1)
        found.append(Operation(kind, name, needs, (result,), turned, in_float32, layout, crosses_rows=place == 1))
    return found


def _turned(work: Product | Taps, *, weights: bool) -> Product | Taps:
    """The product of a gradient: the same operations, with the dimensions exchanged."""
    if isinstance(work, Taps):
        return work
    if weights:
        return Product(work.batch, work.n, work.k, work.m)
    return Product(work.batch, work.m, work.k, work.n)


def _convolution_work(x: Tensor, weight: Tensor, output: Tensor, groups: int) -> Product | Taps:
    taps = prod(weight.shape[2:])
    if groups == x.shape[1] and weight.shape[1] == 1:
        return Taps(output.numel(), taps)
    cells = output.numel() // output.shape[1]
    return Product(groups, cells, weight.shape[0] // groups, weight.shape[1] * taps)


def _product(name: str, arguments: Sequence[Any]) -> Product:
    left, right = arguments[-2:] if name in ("mm", "bmm") else arguments[1:3]
    batch = left.shape[0] if left.dim() == 3 else 1
    return Product(batch, left.shape[-2], right.shape[-1], left.shape[-1])


def _scores(name: str, arguments: Sequence[Any]) -> Scores:
    backward = name.endswith("_backward")
    q, k = arguments[1:3] if backward else arguments[:2]
    bias = arguments[4] if backward else arguments[3] if len(arguments) > 3 else None
    images, heads, queries, size = q.shape
    biased = name.startswith(_EFFICIENT) and isinstance(bias, Tensor)
    return Scores(images * heads, queries, k.shape[-2], size, 5 if backward else 2, biased)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _written_in_place(function: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> list[Tensor]:
    found = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = arguments[place] if place < len(arguments) else keywords.get(argument.name)
        found += _tensors(value)
    return found


def _merged(accesses: Iterator[Access]) -> tuple[Access, ...]:
    """One access to each value, of the most bytes that any of its views has."""
    most: dict[int, int] = {}
    for access in accesses:
        most[access.value] = max(access.bytes, most.get(access.value, 0))
    return tuple(Access(value, size) for value, size in most.items())


def _merged_tensors(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _bytes(tensor: Tensor) -> int:
    """Of its elements; those that an expanded dimension repeats count once."""
    elements = prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return elements * tensor.element_size()


def _in_float32(tensors: list[Tensor]) -> bool:
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.stride(1) == 1 and max(tensor.shape[2:]) > 1


def _order(tensor: Tensor) -> int | None:
    """The dimension whose elements are neighbours in memory."""
    return next(
        (place for place, stride in enumerate(tensor.stride()) if stride == 1 and tensor.shape[place] > 1), None
    )

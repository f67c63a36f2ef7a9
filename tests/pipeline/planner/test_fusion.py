"""Which kernels a compiled graph has, by the rule of `fuse`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.planner.trace.fusion import fuse
from pipeline.planner.trace.operations import Operation
from pipeline.planner.trace.recording import Recording

SIZE = 2 * 4 * 8


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def operations(compute: Callable[[], object]) -> list[Operation]:
    recording = Recording()
    with recording:
        compute()
    return recording.operations


def test_a_chain_reads_once_and_writes_once() -> None:
    (kernel,) = fuse(operations(lambda: F.gelu(meta(4, 8) * 2 + meta(4, 8))))
    assert kernel.name == "mul+add+gelu"
    assert (kernel.bytes_read, kernel.bytes_written) == (2 * SIZE, SIZE)


def test_a_matrix_product_ends_a_kernel() -> None:
    found = operations(lambda: F.gelu(F.linear(meta(4, 8) * 2, meta(8, 8))) * 2)
    before, product, after = fuse(found)
    assert [before.name, product.name, after.name] == ["mul", "mm", "gelu+mul"]
    assert before.writes[0] in product.reads
    assert after.reads == product.writes


def test_rows_of_layer_norm_fit_into_a_kernel() -> None:
    norm, _ = fuse(operations(lambda: F.linear(F.layer_norm(meta(4, 8) + meta(4, 8), (8,)), meta(8, 8))))
    assert norm.name == "add+native_layer_norm"
    assert [access.bytes for access in norm.writes].count(SIZE) == 1


def test_a_sum_over_rows_must_be_complete_before_it_is_used() -> None:
    x = meta(4, 8)
    first, second = fuse(operations(lambda: x * x.sum(0)))
    assert [first.name, second.name] == ["sum", "mul"]
    assert second.bytes_read == SIZE + 2 * 8


def test_what_a_later_kernel_reads_is_written() -> None:
    def compute() -> None:
        x = meta(4, 8) * 2
        F.linear(x, meta(8, 8)).add(x)

    first, _, last = fuse(operations(compute))
    assert first.bytes_written == SIZE
    assert last.bytes_read == 2 * SIZE


def test_a_later_kernel_repeats_a_cast() -> None:
    def compute() -> None:
        wide = meta(4, 8).float()
        F.linear(wide, meta(8, 8, dtype=torch.float32)).add(wide)

    cast, product, addition = fuse(operations(compute))
    assert cast.writes[0] in product.reads
    assert sorted(access.bytes for access in addition.reads) == [SIZE, 2 * SIZE]


def test_a_cast_that_only_fused_kernels_read_is_not_stored() -> None:
    (kernel,) = fuse(operations(lambda: meta(4, 8).float() * 2))
    assert (kernel.bytes_read, kernel.bytes_written) == (SIZE, 2 * SIZE)


def test_what_the_backward_reads_is_written_too() -> None:
    recording = Recording()
    with recording:
        x = meta(4, 8) * 2
        F.gelu(x)
    (alone,) = fuse(recording.operations)
    (kept,) = fuse(recording.operations, {recording.value(x)})
    assert (alone.bytes_written, kept.bytes_written) == (SIZE, 2 * SIZE)


def test_all_arithmetic_stays() -> None:
    found = operations(lambda: F.linear(F.gelu(F.linear(meta(4, 8), meta(32, 8))), meta(8, 32)))
    assert sum(o.flops for o in fuse(found)) == sum(o.flops for o in found) == 4 * 4 * 8 * 32

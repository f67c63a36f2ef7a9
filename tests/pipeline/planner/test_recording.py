"""What is recorded of each operator: kernels, bytes and arithmetic, against counts by hand."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.planner.trace.gpu_functions import GpuFunctions
from pipeline.planner.trace.operations import Access, Product, Scores, Taps
from pipeline.planner.trace.recording import Recording

HALF = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = HALF, channels_last: bool = False) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def test_a_matrix_product_reads_both_matrices_and_the_bias() -> None:
    recording = Recording()
    with recording:
        F.linear(meta(10, 16), meta(32, 16), meta(32))
    (found,) = recording.operations
    assert (found.kind, found.work) == ("matmul", Product(1, 10, 32, 16))
    assert sorted(access.bytes for access in found.reads) == sorted((2 * 10 * 16, 2 * 32 * 16, 2 * 32))
    assert (found.bytes_written, found.flops) == (2 * 10 * 32, 2 * 10 * 32 * 16)


def test_batched_products_are_counted_for_the_whole_batch() -> None:
    recording = Recording()
    with recording:
        torch.baddbmm(meta(8), meta(4, 10, 16), meta(4, 16, 8))
    assert recording.operations[0].work == Product(4, 10, 8, 16)


def test_views_and_draws_on_the_host_are_not_recorded() -> None:
    recording = Recording()
    with recording:
        meta(4, 8).t().unsqueeze(0).expand(3, 8, 4)
        torch.rand(3)
    assert not recording.operations


def test_an_operation_in_place_makes_a_new_value_of_the_same_storage() -> None:
    recording = Recording()
    with recording:
        x = meta(8)
        x.add_(1)
        x.mul_(2)
    first, second = recording.operations
    assert first.reads != first.writes
    assert second.reads == first.writes


def test_zeroing_reads_nothing() -> None:
    recording = Recording()
    with recording:
        meta(8).zero_()
    (found,) = recording.operations
    assert (found.bytes_read, found.bytes_written) == (0, 16)


def test_what_is_expanded_is_read_once() -> None:
    recording = Recording()
    with recording:
        _ = meta(4, 8) + meta(1, 8).expand(4, 8)
    assert sorted(access.bytes for access in recording.operations[0].reads) == [2 * 8, 2 * 4 * 8]


def test_cudnn_adds_no_bias_so_that_it_is_a_pass_of_its_own() -> None:
    recording = Recording()
    with recording:
        F.conv2d(meta(2, 8, 6, 6, channels_last=True), meta(16, 8, 3, 3), meta(16), padding=1)
    convolution, addition = recording.operations
    assert (convolution.kind, convolution.work) == ("convolution", Product(1, 2 * 36, 16, 8 * 9))
    assert convolution.bytes == 2 * (2 * 8 * 36 + 16 * 8 * 9 + 2 * 16 * 36)
    assert (addition.name, addition.kind) == ("add_bias", "elementwise")
    assert (addition.bytes_read, addition.bytes_written) == (2 * (2 * 16 * 36 + 16), 2 * 2 * 16 * 36)
    assert convolution.writes == addition.reads[:1]


def test_a_convolution_passes_the_layout_on() -> None:
    recording = Recording()
    with recording:
        last = F.conv2d(meta(2, 8, 6, 6, channels_last=True), meta(16, 8, 1, 1))
        first = F.conv2d(meta(2, 8, 6, 6), meta(16, 8, 1, 1))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()
    assert [operation.channels_last for operation in recording.operations] == [True, False]


def test_depthwise_convolutions_have_taps() -> None:
    recording = Recording()
    with recording:
        F.conv2d(meta(2, 8, 6, 6, channels_last=True), meta(8, 1, 3, 3), stride=2, padding=1, groups=8)
    (found,) = recording.operations
    assert (found.kind, found.work) == ("depthwise", Taps(2 * 8 * 9, 9))


def test_gradients_of_a_convolution_are_three_kernels() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1, device="meta", dtype=HALF)
    recording = Recording()
    x = meta(2, 8, 6, 6, channels_last=True).requires_grad_()
    with recording:
        y = layer(x)
        recording.operations = []
        torch.autograd.backward(y, torch.empty_like(y))
    of_input, of_weight, of_bias = recording.operations[:3]  # then autograd may copy into the layout of the weight
    cells, gradient = 2 * 36, 2 * 2 * 16 * 36
    assert of_input.work == Product(1, cells, 8 * 9, 16)
    assert of_weight.work == Product(1, 16, 8 * 9, cells)
    assert of_input.flops == of_weight.flops == 2 * cells * 16 * 8 * 9
    assert of_input.bytes == gradient + 2 * 16 * 8 * 9 + 2 * 2 * 8 * 36
    assert of_weight.bytes == gradient + 2 * 2 * 8 * 36 + 2 * 16 * 8 * 9
    assert (of_bias.kind, of_bias.bytes) == ("reduction", gradient + 2 * 16)


def test_attention_has_two_products_and_five_in_the_backward() -> None:
    q, k, v = (meta(2, 3, 16, 8).requires_grad_() for _ in range(3))
    bias = meta(1, 3, 16, 16).requires_grad_()
    recording = Recording()
    with recording, GpuFunctions():
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        torch.autograd.backward(y, torch.empty_like(y))
    found = [operation for operation in recording.operations if operation.kind == "attention"]
    assert [o.work for o in found] == [Scores(6, 16, 16, 8, 2, True), Scores(6, 16, 16, 8, 5, True)]
    assert found[0].flops == 2 * 2 * 6 * 16 * 16 * 8
    assert 2 * 3 * 16 * 16 in [access.bytes for access in found[0].reads]  # the bias, once for all images


def test_batch_norm_in_training_reads_its_input_twice() -> None:
    norm = nn.BatchNorm2d(8, device="meta").train()
    recording = Recording()
    with recording:
        norm(meta(2, 8, 6, 6))
    sums, result = (o for o in recording.operations if "batch_norm" in o.name)
    size = 2 * 2 * 8 * 36
    assert (sums.kind, sums.crosses_rows, result.crosses_rows) == ("reduction", True, False)
    assert [max(access.bytes for access in o.reads) for o in (sums, result)] == [size, size]
    assert size not in [access.bytes for access in sums.writes]
    assert result.bytes_written == size


def test_batch_norm_in_evaluation_is_one_pass() -> None:
    norm = nn.BatchNorm2d(8, device="meta").eval()
    recording = Recording()
    with recording:
        norm(meta(2, 8, 6, 6))
    (found,) = recording.operations
    assert not found.crosses_rows


def test_layer_norm_copies_what_is_not_in_rows() -> None:
    recording = Recording()
    with recording:
        F.layer_norm(meta(2, 8, 6, 6).permute(0, 2, 3, 1), (8,))
    copy, norm = recording.operations
    size = 2 * 2 * 8 * 36
    assert (copy.kind, copy.strided, copy.bytes) == ("copy", True, 2 * size)
    assert norm.reads[0] == copy.writes[0]


def test_a_copy_into_another_order_is_strided_and_a_cast_is_not() -> None:
    recording = Recording()
    with recording:
        meta(4, 8).t().contiguous()
        meta(4, 8).float()
    transposed, cast = recording.operations
    assert (transposed.strided, transposed.is_cast) == (True, False)
    assert (cast.strided, cast.is_cast) == (False, True)
    assert (cast.bytes_read, cast.bytes_written) == (64, 128)


def test_an_operation_without_identity_equals_another_of_its_size() -> None:
    recording = Recording()
    with recording:
        for _ in range(2):
            meta(4, 8).mul(2)
    first, second = recording.operations
    assert first != second
    assert first.without_identity() == second.without_identity()
    assert first.without_identity().reads == (Access(0, 64),)

"""Pixels on their way to the device. There is no GPU here: torch.cuda is faked, and notes what is asked of it."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.images.random_erasing import ErasedRectangle
from pipeline.training import pixels as pixels_module
from pipeline.training.images import erase
from pipeline.training.pixels import pixel_allocator, pixels_to_device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_on_a_cpu_pixels_are_used_where_they_are() -> None:
    pixels = pixel_allocator(CPU)((2, 4, 4, 3))
    assert pixels.shape == (2, 4, 4, 3)
    assert pixels.dtype == np.uint8
    assert pixels_to_device(pixels, CPU).data_ptr() == pixels.ctypes.data


def test_for_a_gpu_pixels_are_copied_in_another_stream_that_the_computing_one_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[Any] = []
    tensor = torch.tensor([7], dtype=torch.uint8)
    computing = SimpleNamespace(wait_stream=lambda stream: did.append(("computing waits for", stream)))

    @contextmanager
    def stream(one: Any) -> Any:
        did.append(("in", one))
        yield
        did.append(("left", one))

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> Any:
        did.append(("to", device, non_blocking, tensor.tolist()))
        return SimpleNamespace(record_stream=lambda stream: did.append(("used by", stream)))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(pixels_module, "_copy_stream", lambda device: "copying")
    monkeypatch.setattr(torch, "from_numpy", lambda array: SimpleNamespace(to=lambda *a, **k: to(tensor, *a, **k)))
    pixels_to_device(np.array([7], np.uint8), GPU)
    assert did == [
        ("in", "copying"),
        ("to", GPU, True, [7]),
        ("left", "copying"),
        ("computing waits for", "copying"),
        ("used by", computing),
    ]


def test_for_a_gpu_pixels_are_pinned_and_if_that_fails_said_once_to_be_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Any] = []

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.append((shape, dtype, pin_memory))
        if len(asked) > 1:
            raise torch.AcceleratorError("CUDA error: out of memory\nand more")
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    allocate = pixel_allocator(GPU)
    with caplog.at_level(logging.WARNING):
        assert [allocate((1, 2)).shape for _ in range(3)] == [(1, 2)] * 3
    assert asked == [((1, 2), torch.uint8, True)] * 3
    assert [record.message for record in caplog.records] == [
        "memory for images cannot be pinned (CUDA error: out of memory); the GPU waits for each micro-batch to be copied"
    ]


def test_rectangles_of_all_shapes_are_erased_in_order() -> None:
    draws = np.random.default_rng(3)
    one_color, pixelwise = draws.random((1, 1, 3), np.float32), draws.random((2, 3, 3), np.float32)
    erased = [
        (0, ErasedRectangle(slice(0, 3), slice(0, 3), one_color)),
        (2, ErasedRectangle(slice(1, 3), slice(1, 4), pixelwise)),
        (0, ErasedRectangle(slice(1, 2), slice(1, 2), np.zeros((1, 1, 3), np.float32))),
    ]
    images = torch.ones(3, 4, 4, 3)
    expected = images.numpy().copy()
    for position, rectangle in erased:
        expected[position, rectangle.rows, rectangle.columns] = rectangle.values
    erase(images, erased)
    assert np.array_equal(images.numpy(), expected)
    erase(images, [])
    assert np.array_equal(images.numpy(), expected)

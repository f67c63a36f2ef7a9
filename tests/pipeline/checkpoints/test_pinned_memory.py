"""Memory for checkpoints that cannot be pinned. There is no GPU here: CUDA's runtime is faked, with its last error."""

import logging

import pytest
import torch

from pipeline.checkpoints.host_copy import HostFile


class Runtime:
    """A CUDA runtime that pins nothing, and keeps the error of a call until it is asked for, as the real one does."""

    def __init__(self) -> None:
        self.last_error = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.last_error = 712
        return self.last_error


def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_leaves_no_error_for_the_next_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, zeros = Runtime(), torch.zeros

    def launch(*size: int, device: str = "cpu") -> torch.Tensor:
        """A kernel: torch asks for the last error after it."""
        error, runtime.last_error = runtime.last_error, 0
        if error:
            raise torch.AcceleratorError(f"CUDA error {error}")
        return zeros(*size)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "zeros", launch)
    with caplog.at_level(logging.WARNING):
        file = HostFile({"a": torch.ones(3)}, pinned=True)
    assert "memory for checkpoints cannot be pinned (CUDA error 712); saves take longer" in caplog.text
    assert runtime.last_error == 0
    file.fill({"a": torch.arange(3.0)})
    assert bytes(file.blocks[1]) == torch.arange(3.0).numpy().tobytes()

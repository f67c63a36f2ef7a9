"""Imported by the command and its measurements: three of them do not end well, and a fourth compiles nothing."""

import os
import signal
import time
from typing import Any, NoReturn

import torch

import pipeline.gpu_benchmark.measure
import pipeline.gpu_benchmark.operations
import pipeline.gpu_benchmark.parts
import pipeline.gpu_benchmark.saving


def hang_in_parts(subject: object) -> NoReturn:
    while True:
        time.sleep(1)


def fill_the_memory(subject: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def crash(subject: object, folder: Any) -> NoReturn:
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


pipeline.gpu_benchmark.measure._SHORT_SECONDS = 3.0
pipeline.gpu_benchmark.parts.measure_parts = hang_in_parts
pipeline.gpu_benchmark.operations.measure_operations = fill_the_memory
pipeline.gpu_benchmark.saving.measure_saves = crash

"""The tables of `coatnet bench gpu`, of a record that is made up: a GPU on which some things go wrong."""

import io
from dataclasses import replace

from jobs.gpu_benchmark_tables import show_benchmark
from pipeline.burn_in.verdict import DeviceBits
from pipeline.gpu_benchmark.record import (
    BurnIn,
    Choice,
    CopySpeed,
    Device,
    EqualBits,
    GpuBenchmark,
    MicroBatchAttempt,
    OperationWork,
    PartWork,
    Saves,
    StepsRun,
    Unmeasured,
    VariantRun,
)
from pipeline.gpu_benchmark.timing import Roofline
from pipeline.monitoring.console import PrintableConsole

WORK = Roofline(100e12, 1e12).work(0.004, 10**11, 2 * 10**9)  # at least 2 ms, by its bytes
STEP = StepsRun((6.9, None), "0" * 16, 3.0, 250.0, 12, 512.0, 20 * 10**9, WORK)
RECORD = GpuBenchmark(
    version=1,
    date="2026-11-29",
    recipe="test",
    stage="pretrain",
    model="coatnet_0",
    resolution=224,
    precision="bf16",
    classes=1000,
    micro_size=128,
    rounds=4,
    rounds_of_stage=4,
    device=Device("NVIDIA H200", True, "2.11", "H200", 141 * 10**9, 989e12, 4.8e12, "580.1", "13.0", 91000, "2.27.5"),
    estimated_bytes=19 * 10**9,
    step=STEP,
    utilization=0.35,
    equal_bits=(EqualBits(True, True), EqualBits(False, False, 2)),
    burn_in=BurnIn(
        (
            DeviceBits("GPU 0", "n1", "NVIDIA H200", "GPU-a", "H200", {"loss=1": 60}, 5.04),
            DeviceBits("GPU 1", "n1", "NVIDIA H200", "GPU-b", "H200", {"loss=1": 55, "loss=2": 2}, 5.0),
            DeviceBits("GPU 2", "n1", "NVIDIA T4", "GPU-c", "T4", {}, 0.0, "the memory of the GPU is full"),
        )
    ),
    cost_of_determinism=0.12,
    variants=(
        VariantRun("eager", {}, STEP, None, 0.0),
        VariantRun("compiled", {}, STEP, None, 0.5),
        VariantRun("other", {}, None, "no time was left"),
    ),
    parts=(PartWork("S0 stem", WORK),),
    operations=(OperationWork("matmul", "S3 product", WORK), OperationWork("attention", "S3 plain", None, "why not")),
    copies=(CopySpeed("pinned memory to the GPU", 52.04),),
    saves=Saves(2 * 10**9, (400.0, 40.0), (3.0, 2.0), "/scratch"),
    micro_batches=(MicroBatchAttempt(256, True, 40 * 10**9, 38 * 10**9), MicroBatchAttempt(512, False, 1, 76 * 10**9)),
    unmeasured=(Unmeasured("parts", "it broke", failed=True), Unmeasured("saves", "no time was left", failed=False)),
    choices=(Choice("compile", False, "as measured", writable=True),),
)


def shown(record: GpuBenchmark) -> list[str]:
    output = io.StringIO()
    show_benchmark(record, PrintableConsole(file=output, width=200))
    return [" ".join(line.split()) for line in output.getvalue().splitlines()]


def test_everything_that_was_measured_is_shown() -> None:
    lines = shown(RECORD)
    for line in (
        "NVIDIA H200, torch 2.11, driver 580.1, CUDA 13.0, NCCL 2.27.5, 141 GB, by its data sheet 989 TFLOP/s in bf16, 4.80 TB/s",
        "250.0 ms, median of 12; 512 images/s, MFU 35.0%; the first step took 3.0 s",
        "memory 20.00 GB, by estimate 19.00 GB",
        "losses 6.9000, not finite",
        "deterministic: true equal to the bit",
        "deterministic: false not equal: the loss of step 2",
        "a step takes +12.0% with deterministic: true",
        "eager 250.0 512 20.00 GB 3.0 s 0.0e+00 equal up to rounding",
        "compiled 250.0 512 20.00 GB 3.0 s 5.0e-01 DIFFERENT losses",
        "other not measured: no time was left",
        "S0 stem 4.000 25 500 2.000 50%",
        "optimizer, once a step 4.000 25 500 2.000 50%",
        "attention S3 plain why not",
        "pinned memory to the GPU: 52.0 GB/s",
        "second: steps waited 40.0 ms (50.00 GB/s), complete after 2.00 s",
        "256 fits 40.00 GB 38.00 GB",
        "512 does not fit 76.00 GB",
        "parts: failed, it broke",
        "saves: left out, no time was left",
        "compile=false # as measured",
    ):
        assert line in lines


def test_a_device_without_a_roofline_says_so() -> None:
    assert shown(replace(RECORD, precision="fp32"))[0].endswith("no roofline for fp32")
    unknown = replace(RECORD, device=Device("GPU X", True, "2.11"))
    assert shown(unknown)[0] == "GPU X, torch 2.11, its peaks are not in the table, so there is no roofline"
    assert shown(replace(RECORD, choices=()))[-1].startswith("set in the recipe: nothing")


def test_a_gpu_that_computes_wrong_values_is_named_beside_those_that_do_not() -> None:
    lines = shown(RECORD)
    place = lines.index("one micro-batch again and again, deterministic")
    assert lines[place + 1 : place + 5] == [
        "GPU 0 (NVIDIA H200, GPU-a): 60 times in 5.0 s: equal to the bit",
        "GPU 1 (NVIDIA H200, GPU-b) computed other bits than itself in 2 of 57 repetitions, in loss",
        "GPU 2 (NVIDIA T4, GPU-c): not computed: the memory of the GPU is full",
        "there are 2 kinds of GPUs, which are not compared with each other",
    ]

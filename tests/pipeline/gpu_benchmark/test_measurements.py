"""The pieces of the measurements that a CPU can show, and the sequence on a GPU with its processes replaced."""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.complexity import count_costs
from models.variants import VARIANTS
from pipeline.fingerprint import fingerprint
from pipeline.gpu_benchmark import machine, measure, micro_batches, processes, timing
from pipeline.gpu_benchmark.copies import copy_speeds
from pipeline.gpu_benchmark.measure import OPTIONAL, BenchmarkRequest
from pipeline.gpu_benchmark.processes import Processes
from pipeline.gpu_benchmark.record import (
    BurnIn,
    Copies,
    CopySpeed,
    Device,
    GpuBenchmark,
    MicroBatchAttempt,
    Operations,
    Parts,
    Saves,
    StepsRun,
    Unmeasured,
)
from pipeline.gpu_benchmark.subject import MeasuredStage, noise
from pipeline.gpu_benchmark.timing import Roofline
from pipeline.ranks.gpus import BANDWIDTHS, PEAKS, memory_bandwidth
from pipeline.recipe.loader import load_recipe
from tests.support.recipes import write_recipe

CPU = torch.device("cpu")


@pytest.fixture
def request_(tmp_path: Path) -> BenchmarkRequest:
    """For a stage whose shards do not exist."""
    recipe = load_recipe(write_recipe(tmp_path, tmp_path / "nowhere"))
    return BenchmarkRequest(recipe, "finetune", 10, 2, 1.0, tmp_path)


def test_a_fingerprint_changes_with_any_bit_name_or_place() -> None:
    x = torch.randn(3, 1000)
    once = fingerprint({"x": x})
    assert fingerprint({"x": x.clone()}) == once
    assert len(once) == 16
    for other in (x.flip(0), x.reshape(1000, 3), -x, x.nextafter(torch.tensor(math.inf))):
        assert fingerprint({"x": other}) != once
    assert fingerprint({"y": x}) != once
    changed = x.clone()
    changed[2, 999] = changed[2, 999].nextafter(torch.tensor(math.inf))
    assert fingerprint({"x": changed}) != once
    assert fingerprint({"zero": torch.tensor([0.0])}) != fingerprint({"zero": torch.tensor([-0.0])})


def test_a_fingerprint_is_that_of_the_whole_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1000).to(torch.bfloat16)
    whole = fingerprint({"x": x})
    monkeypatch.setattr("pipeline.fingerprint._CHUNK", 7)
    assert fingerprint({"x": x}) == whole


def test_a_stage_is_planned_for_one_rank_and_without_its_shards(request_: BenchmarkRequest) -> None:
    plan = request_.subject.plan()
    assert (plan.stage.resources.ranks, plan.stage.batch.micro_size, plan.stage.batch.micro_batches) == (1, 3, 2)
    assert (plan.stage.start_from, len(plan.classes)) == (None, 10)
    assert 0 < plan.learning_rate(1) < 1e-5  # as at the beginning of a warm-up
    one, other = (next(noise(plan, torch.device("cpu"))) for _ in range(2))
    assert one.images.shape == (3, 48, 48, 3)
    assert (one.images == other.images).all()
    assert one.labels.max() < 10


@pytest.mark.parametrize("largest", [0, 1, 3, 5, 16, 24, 31, 100])
@pytest.mark.parametrize("first", [1, 4, 64])
def test_a_search_for_the_largest_micro_batch_ends_near_it(largest: int, first: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= largest

    micro_batches.search(first, fits)
    assert len(tried) == len(set(tried)) <= 9
    best = max((size for size in tried if size <= largest), default=0)
    beyond = min(size for size in tried if size > largest)
    assert beyond - best <= max(1, best / 2)


def test_a_search_ends_when_it_cannot_go_on() -> None:
    answers: Iterator[bool | None] = iter([True, None])
    micro_batches.search(4, lambda size: next(answers))
    assert next(answers, "used up") == "used up"
    assert micro_batches.first_size(lambda size: 10 * size, 170) == 16
    assert micro_batches.first_size(lambda size: 10 * size, 5) == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ...")],
)
def test_a_micro_batch_that_fills_the_memory_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, request_: BenchmarkRequest, error: RuntimeError
) -> None:
    class Full:
        def __init__(self, *_: object) -> None:
            raise error

    monkeypatch.setattr(micro_batches, "Rank", Full)
    monkeypatch.setattr(micro_batches, "join", lambda plan: SimpleNamespace(device=CPU))
    attempt = micro_batches.try_micro_batch(request_.subject)
    assert (attempt.micro_size, attempt.fits) == (3, False)
    error.args = ("another one",)
    if not isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(RuntimeError, match="another one"):
            micro_batches.try_micro_batch(request_.subject)


def test_copies_are_timed_in_both_directions() -> None:
    copies = copy_speeds(CPU, 1 << 12, torch.clone).copies  # which stands for pinned memory
    assert [one.name for one in copies] == [
        "pageable memory to the GPU", "the GPU to pageable memory", "pinned memory to the GPU", "the GPU to pinned memory",
    ]  # fmt: skip
    assert all(one.gigabytes_per_second > 0 for one in copies)


def test_work_on_a_gpu_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.cuda faked, since there is no GPU."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    calls: list[int] = []
    assert timing.median_seconds(lambda: calls.append(1), torch.device("cuda"), most_seconds=1.0) == 0.25
    assert len(calls) == 2 + 4  # to warm up, and a second


def test_a_gpu_is_described_with_its_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.cuda faked, since there is no GPU."""
    properties = SimpleNamespace(name="NVIDIA H100 PCIe", total_memory=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(machine, "_driver", lambda: "580.1")
    device = machine.present_device(True)
    assert (device.name, device.kind, device.memory_bytes) == ("NVIDIA H100 PCIe", "H100 PCIe", 80)
    assert (device.peak, device.bandwidth, device.nccl, device.driver) == (756e12, 2.0e12, "2.27.5", "580.1")
    assert machine.present_device(False).name == "CPU"


def test_every_gpu_with_a_peak_has_a_bandwidth() -> None:
    assert all(memory_bandwidth(f"NVIDIA {name}") for name in PEAKS)
    assert memory_bandwidth("NVIDIA A100-SXM4-80GB") == 2.039e12
    assert memory_bandwidth("NVIDIA A100-SXM4-40GB") == 1.555e12
    assert memory_bandwidth("NVIDIA GH200 480GB") == 4.0e12
    assert memory_bandwidth("Tesla K80") is None
    for place, key in enumerate(names := list(BANDWIDTHS)):  # none hides behind a shorter one
        assert not any(other in key for other in names[:place])


def finished(tmp_path: Path, program: str, most: float, seconds: float = 600) -> Any:
    """The outcome of a measurement whose process runs `program` instead."""
    subject = MeasuredStage({}, "stage", 1, 1)
    return Processes(tmp_path, seconds).measure("it", Device, program, subject, most)


@pytest.fixture
def _any_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a measurement is the program that its process runs."""

    def command(module: str, request: str, result: str) -> list[str]:
        start = "import json, sys; exec(json.load(open(sys.argv[1]))['measurement'])"
        return [sys.executable, "-c", start, request, result]

    monkeypatch.setattr(processes, "python_module", command)


@pytest.mark.usefixtures("_any_program")
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print('error: it is wrong', file=sys.stderr); print('a warning'); sys.exit(3)", "it is wrong"),
        ("print('last words'); sys.exit(3)", "its process ended with 3: last words"),
        ("sys.exit(3)", "its process ended with 3, and printed nothing"),
        ("import os; os.kill(os.getpid(), 11)", "its process was killed by SIGSEGV, and printed nothing"),
    ],
)
def test_a_process_that_fails_leaves_its_reason(tmp_path: Path, program: str, reason: str) -> None:
    outcome = finished(tmp_path, program, most=60)
    assert isinstance(outcome, Unmeasured)
    assert (outcome.reason, outcome.failed) == (reason, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(seconds=2)
@pytest.mark.usefixtures("_any_program")
def test_a_process_that_hangs_fails_and_is_killed_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    program = (
        "import subprocess, time, signal; signal.signal(signal.SIGABRT, signal.SIG_IGN);"
        f"open('{child}', 'w').write(str(subprocess.Popen(['sleep', '600']).pid)); time.sleep(600)"
    )
    outcome = finished(tmp_path, program, most=2)
    assert (outcome.reason, outcome.failed) == ("did not end within 2 s, and was killed", True)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child.read_text()}/stat").exists():
        state = Path(f"/proc/{child.read_text()}/stat").read_text().split()[2]
        if state == "Z":
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow(seconds=1)
@pytest.mark.usefixtures("_any_program")
def test_what_the_time_for_all_ends_is_left_out_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = finished(tmp_path, "pass", most=60, seconds=3)
    assert (outcome.reason, outcome.failed) == ("no time was left", False)
    monkeypatch.setattr(processes, "_LEAST_SECONDS", 0.0)
    outcome = finished(tmp_path, "import time; time.sleep(600)", most=60, seconds=1)
    assert (outcome.reason, outcome.failed) == ("the time was over after 1 s of it", False)


WORK = Roofline(None, None).work(1e-3, 1, 1)


class FakeProcesses:
    """Answers for a GPU: steps take 100 ms, with `deterministic` 110 ms and other bits each time without it; those of a
    micro-batch above 96 do not fit."""

    device = Device("NVIDIA H200", True, "2.11", "H200", 40 * 10**9, 989e12, 4.8e12)
    broken: tuple[str, ...] = ()

    def __init__(self, *_: object) -> None:
        self.asked: list[str] = []
        instances.append(self)

    def measure(self, name: str, kind: type, measurement: str, subject: MeasuredStage, most: float) -> Any:
        self.asked.append(name)
        if name in self.broken:
            return Unmeasured(name, "broken", failed=True)
        deterministic = subject.changes.get("deterministic", True)
        bits = "same" if deterministic else str(len(self.asked))
        answers = {
            "device": self.device,
            "steps": StepsRun((1.0,), bits, 1.0, 110.0 if deterministic else 100.0, 5, 80.0, 10**9, WORK),
            "burn-in": BurnIn(()),
            "parts": Parts(()),
            "operations": Operations(()),
            "copies": Copies((CopySpeed("pinned memory to the GPU", 50.0),)),
            "saves": Saves(1, (1.0, 1.0), (1.0, 1.0), ""),
            "micro-batch": MicroBatchAttempt(subject.micro_size or 0, (subject.micro_size or 0) <= 96, 10**9, 0),
        }
        return answers[measurement]


instances: list[FakeProcesses] = []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeProcesses]:
    monkeypatch.setattr(measure, "Processes", FakeProcesses)
    return FakeProcesses


@pytest.mark.slow(seconds=2)
def test_on_a_gpu_everything_is_measured_the_most_valuable_first(
    gpu: type[FakeProcesses], request_: BenchmarkRequest
) -> None:
    found = measure.measure(request_)
    asked = instances[-1].asked
    assert asked[:12] == [
        "device", "step", "equal bits, deterministic: false", "equal bits, deterministic: true",
        "equal bits, deterministic: false", "burn-in", "parts", "operations", "copies", "variant compiled",
        "variant eager, fused depthwise", "variant compiled, fused depthwise",
    ]  # fmt: skip
    assert [(one.deterministic, one.equal) for one in found.equal_bits] == [(True, True), (False, False)]
    assert found.cost_of_determinism == pytest.approx(0.1)
    per_image = 6 * sum(cost.multiply_adds for cost in count_costs(VARIANTS["coatnet_debug"], 48, 10))
    assert found.utilization == 80.0 * per_image / 989e12
    sizes = {attempt.micro_size: attempt.fits for attempt in found.micro_batches}
    assert (sizes[96], sizes[128]) == (True, False)
    assert all(attempt.estimated_bytes > 0 for attempt in found.micro_batches)
    assert found.unmeasured == ()
    assert {choice.setting for choice in found.choices} == {
        "compile", "fused_depthwise", "deterministic", "batch.micro_size",
    }  # fmt: skip
    assert isinstance(found, GpuBenchmark)


def test_what_needs_a_step_is_left_out_without_one(
    gpu: type[FakeProcesses], request_: BenchmarkRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "broken", ("step",))
    found = measure.measure(request_)
    assert [(one.name, one.failed) for one in found.unmeasured] == [
        ("step", True), ("equal-bits", False), ("variants", False), ("saves", False),
    ]  # fmt: skip
    assert found.micro_batches


def test_only_what_is_asked_for_is_measured(gpu: type[FakeProcesses], request_: BenchmarkRequest) -> None:
    measure.measure(replace(request_, only=("copies",)))
    assert instances[-1].asked == ["device", "step", "copies"]
    assert set(OPTIONAL) > {"copies"}


def test_a_variant_that_contradicts_the_stage_is_no_failure(
    gpu: type[FakeProcesses], request_: BenchmarkRequest
) -> None:
    stages = request_.recipe.stages
    sharded = {"finetune": stages["finetune"].model_copy(update={"zero_stage": 3})}
    recipe = request_.recipe.model_copy(update={"stages": stages | sharded})
    found = measure.measure(replace(request_, recipe=recipe, only=("variants",)))
    assert instances[-1].asked == ["device", "step"]
    assert found.variants[1].not_run is not None
    assert "compile does not work with zero_stage 3" in found.variants[1].not_run
    assert found.failed == []


def test_without_a_device_nothing_is_measured(
    gpu: type[FakeProcesses], request_: BenchmarkRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "broken", ("device",))
    found = measure.measure(request_)
    assert instances[-1].asked == ["device"]
    assert [one.name for one in found.failed] == ["device"]
    assert {one.name for one in found.unmeasured} == {"device", "step", *OPTIONAL}

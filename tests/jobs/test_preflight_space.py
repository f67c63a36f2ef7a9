"""Findings about memory and disk space."""

import shutil
from pathlib import Path

import pytest

from models.complexity import count_parameters
from models.variants import VARIANTS
from pipeline.host import Host
from pipeline.memory_estimate import estimate_memory
from pipeline.planner.stage_memory import gpu_reserve
from pipeline.preflight.disk_space import most_kept
from pipeline.preflight.finding import Finding
from pipeline.preflight.machine import Machine
from pipeline.preflight.memory import assess_memory
from pipeline.ranks.gpus import Gpu
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from pipeline.runs.event_log import Event
from pipeline.runs.run_folder import RunFolder
from tests.jobs.findings import LARGE, STAGES, found, the_finding, wrong
from tests.support.recipes import write_recipe


def test_memory_beyond_the_gpus_is_an_error_and_near_it_a_warning(shards: Path, tmp_path: Path) -> None:
    large = ["model.name=coatnet_0", "batch={global_size: 256, micro_size: 64}"]
    recipe = load_recipe(write_recipe(tmp_path, shards), large)
    stage = recipe.stages["pretrain"]
    assert isinstance(stage, TrainStage)
    need = estimate_memory(stage, 1000, 2)  # the shards have too few samples for a plan, so 1000 classes are assumed
    reserve = gpu_reserve(need.activations)

    def memory(size: float, *more: str) -> Finding:
        machine = Machine(LARGE.host, (Gpu("H100", round(size)),) * 2)
        return the_finding(found(tmp_path, shards, *large, *more, machine=machine), "memory: ", "pretrain")

    likely, most = need.device + reserve.value, need.device + reserve.most
    fits, tight, full = memory(most + 1), memory(most - 1), memory(likely - 1)
    assert [finding.level for finding in (fits, tight, full)] == ["ok", "warning", "error"]
    assert full.what == (
        f"memory: a rank needs {likely / 1e9:.1f} of the {likely / 1e9:.3g} GB of a GPU here (H100), by estimate: "
        f"{need.kinds}, and {reserve.value / 1e9:.1f} GB for CUDA and fragmentation (assumed)"
    )
    assert (fits.fix, tight.fix) == ("", full.fix)
    assert full.fix.startswith("Change settings, most effective first: ")
    assert "batch.micro_size=32 (another run" in full.fix


def test_for_jobs_on_other_machines_the_size_of_a_gpu_is_that_of_the_recipe(shards: Path, tmp_path: Path) -> None:
    stage = load_recipe(write_recipe(tmp_path, shards)).stages["pretrain"]
    assert isinstance(stage, TrainStage)
    need = estimate_memory(stage, 3, 2)
    reserve = gpu_reserve(need.activations).value
    (finding,) = assess_memory("pretrain", stage, 3, begun=False)
    assert finding.what == (
        f"memory: a rank needs {(need.device + reserve) / 1e9:.1f} of the 80 GB of a GPU (resources.gpu_gigabytes), by "
        f"estimate: {need.kinds}, and {reserve / 1e9:.1f} GB for CUDA and fragmentation (assumed)"
    )
    without = stage.model_copy(update={"resources": stage.resources.model_copy(update={"gpus_per_rank": 0})})
    assert assess_memory("pretrain", without, 3, begun=False) == [
        Finding("ok", "pretrain", "memory: the stage uses no GPUs, so their size is not checked")
    ]


def test_without_gpus_all_ranks_are_held_against_the_memory_that_the_host_or_its_cgroup_allows(
    shards: Path, tmp_path: Path
) -> None:
    large = ["batch={global_size: 4096, micro_size: 1024}"]
    stage = load_recipe(write_recipe(tmp_path, shards), large).stages["pretrain"]
    assert isinstance(stage, TrainStage)
    need = 2 * estimate_memory(stage, 1000, 2, on_cpu=True).host

    def memory(share: float, *, limited: bool = False) -> Finding:
        machine = Machine(Host(64, round(need / share), limited), ())
        return the_finding(found(tmp_path, shards, *large, machine=machine), "memory of this machine: ", "pretrain")

    fits, tight, full = memory(0.89), memory(0.91), memory(1.01, limited=True)
    assert [finding.level for finding in (fits, tight, full)] == ["ok", "warning", "error"]
    assert full.what.startswith(
        f"memory of this machine: 2 ranks need {need / 1e9:.1f} of its {need / 1.01e9:.1f} GB, the limit of its "
        "cgroup, by estimate; each: process 0.5 GB, activations "
    )
    assert full.fix.startswith("Change settings, most effective first: ")
    assert "resources.ranks=1, " in full.fix


def test_more_ranks_than_gpus_or_cores_are_named_with_how_many_would_do(shards: Path, tmp_path: Path) -> None:
    one_gpu = Machine(LARGE.host, (Gpu("H100", 10**11),))
    assert wrong(found(tmp_path, shards, machine=one_gpu)) == [
        Finding(
            "error", "pretrain", "resources.ranks: 2 ranks on a machine with 1 GPU, and each rank needs one",
            "set resources.ranks=1, or resources.gpus_per_rank=0 to use CPUs",
        )
    ]  # fmt: skip
    # Ranks without GPUs do not count those that are there.
    assert wrong(found(tmp_path, shards, "resources.gpus_per_rank=0", machine=one_gpu)) == []
    three_cores = Machine(Host(3, 10**12, False), ())
    assert wrong(found(tmp_path, shards, "resources.ranks=4", machine=three_cores)) == [
        Finding(
            "warning", "pretrain",
            "4 ranks with 1 thread each share 3 cores, which is slower than one thread for each core",
            "set resources.ranks=2 resources.threads_per_rank=1",
        )
    ]  # fmt: skip
    (slow,) = wrong(found(tmp_path, shards, "precision=bf16"))
    assert slow.what == "precision: bf16 is several times slower than fp32 on most processors"


def test_the_micro_batch_of_a_run_that_has_saved_is_not_advised_to_change(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs/test/pretrain"
    folder.mkdir(parents=True)
    small = ["batch={global_size: 24000, micro_size: 6000}"]
    machine = Machine(Host(64, 10**9, False), ())
    assert "batch.micro_size=3000" in the_finding(found(tmp_path, shards, *small, machine=machine), "memory").fix
    RunFolder(folder).events.record(Event.SAVE, step=5)
    assert "batch.micro_size" not in the_finding(found(tmp_path, shards, *small, machine=machine), "memory").fix


@pytest.mark.parametrize("gpus", [0, 1])
def test_memory_of_a_node_is_compared_with_the_request(shards: Path, tmp_path: Path, gpus: int) -> None:
    """Of one with GPUs the copies from which checkpoints are written, of one without all but buckets, never filled."""
    large = ["model.name=coatnet_4", "batch={global_size: 40, micro_size: 20}", f"resources.gpus_per_rank={gpus}"]
    stage = load_recipe(write_recipe(tmp_path, shards), large).stages["pretrain"]
    assert isinstance(stage, TrainStage)
    memory = estimate_memory(stage, 3, 2, on_cpu=gpus == 0)
    need = 2 * (memory.staging + (0 if gpus else memory.device - memory.buckets))
    for gibibytes, level in ((need // 2**30, "error" if gpus else "warning"), (need // 2**30 + 1, "ok")):
        findings = found(tmp_path, shards, *large, f"resources.memory_gigabytes={gibibytes}")
        finding = the_finding(findings, "memory of a node: ")
        assert finding.what == (
            f"memory of a node: 2 ranks need at least {need / 2**30:.1f} of the {gibibytes} GiB of "
            "resources.memory_gigabytes"
        )
        assert finding.level == level


@pytest.mark.parametrize(
    ("settings", "steps", "most"),
    [
        ({}, 40_000, (4, 4)),  # the two last, that of a stop, and the one that is being written
        ({"keep_last": 5, "keep_best": 2}, 40_000, (9, 9)),
        ({"keep_every": 10_000}, 40_000, (8, 4)),
        ({"keep_every": 1_500}, 40_000, (17, 4)),  # only steps that are saved: 3,000, 6,000 ...
        ({"keep_last": 9}, 3_500, (5, 5)),  # 1,000, 2,000, 3,000, 3,500, and that of a stop
        ({"keep_every": 1_000}, None, (4, 4)),
    ],
)
def test_the_largest_number_of_checkpoints_at_a_time(
    settings: dict[str, int], steps: int | None, most: tuple[int, int]
) -> None:
    stage = TrainStage.model_construct(checkpoint=CheckpointSettings.model_validate(settings))
    assert most_kept(stage, steps) == most


def test_needed_disk_space_covers_all_stages_minus_what_is_already_saved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = 12 * count_parameters(VARIANTS["coatnet_debug"], 32, 3)
    of_finetune = 12 * count_parameters(VARIANTS["coatnet_debug"], 48, 3)
    held = tmp_path / "runs/test/pretrain/checkpoints/step-00000005"
    held.mkdir(parents=True)
    (held / "rank-00000.safetensors").write_bytes(b"?" * 1000)
    needed = 4 * each - 1000 + 2 * of_finetune  # 6 steps of fine-tuning are saved once, and at a stop
    usage = shutil.disk_usage(tmp_path)
    for free, level in ((needed, "ok"), (needed - 1, "error")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage._replace(free=free))
        finding = the_finding(found(tmp_path, shards, stages=STAGES), "checkpoints: ")
        assert finding.what == (
            f"checkpoints: at most pretrain 4 of {each / 1e6:.1f} MB, finetune 2 of {of_finetune / 1e6:.1f} MB; "
            f"{needed / 1e6:.1f} MB more, and {held.parent} has {free / 1e6:.1f} MB free"
        )
        assert finding.level == level
    assert finding.fix.startswith("keep fewer (checkpoint.keep_last, keep_every, keep_best), or set checkpoint.folder")


def test_a_disk_that_fills_up_late_is_a_warning_and_one_that_fills_up_soon_an_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = 12 * count_parameters(VARIANTS["coatnet_debug"], 32, 3)
    usage = shutil.disk_usage(tmp_path)
    # 8 saves and a stop, all of them kept; without that the last two, the stop, and the one that is being written.
    for checkpoints, level in ((9, "ok"), (8, "warning"), (4, "warning"), (3, "error")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=checkpoints * each: usage._replace(free=free))
        finding = the_finding(
            found(tmp_path, shards, "pretrain.checkpoint.keep_every=5"), "checkpoints: at most pretrain 9 of"
        )
        assert finding.level == level


def test_the_moving_average_is_counted_in_checkpoints(shards: Path, tmp_path: Path) -> None:
    parameters = count_parameters(VARIANTS["coatnet_debug"], 32, 3)
    finding = the_finding(found(tmp_path, shards, "pretrain.ema_decay=0.9"), "checkpoints: ")
    assert f"pretrain 4 of {16 * parameters / 1e6:.1f} MB" in finding.what

"""Findings from the facts of ranks; facts about GPUs, clocks and networks are invented, as there are none here."""

from dataclasses import replace

import pytest

from data.errors import StorageDown
from pipeline.burn_in.verdict import DeviceBits
from pipeline.errors import ConfigError
from pipeline.preflight.assessment import (
    AllReduceFacts,
    NodeFacts,
    RankSpeed,
    ReadFacts,
    StepLoad,
    WriteFacts,
    assess_all_reduce,
    assess_burn_in,
    assess_nodes,
    assess_reading,
    assess_writing,
)
from pipeline.preflight.finding import Finding, finding_of_error
from pipeline.recipe.data_sections import DataSettings
from pipeline.recipe.sections import Resources

VERSIONS = {"Python": "3.11.7", "torch": "2.13.0", "coatnet": "0123"}
H100 = NodeFacts("n1", "NVIDIA H100", 8, 85 * 10**9, 84 * 10**9, 12, 1000.0, VERSIONS, None)
RESOURCES = Resources(ranks=4, nodes=2)
DATA = DataSettings(validation="v", workers=8)


def machines(*facts: NodeFacts, needed: int | None = 60 * 10**9, resources: Resources = RESOURCES) -> list[Finding]:
    return assess_nodes("pretrain", facts, resources, DATA, needed)


def of_nodes(*names: str) -> list[NodeFacts]:
    return [replace(H100, node=name) for name in names]


def test_ranks_that_agree_are_ok() -> None:
    assert machines(*of_nodes("n1", "n1", "n2", "n2")) == [
        Finding("ok", "pretrain", "GPUs: 4 x NVIDIA H100, 85.0 GB"),
        Finding("ok", "pretrain", "nodes: 4 ranks on 2 agree in versions and clocks, and can start the stage"),
    ]


def test_a_stage_without_gpus_needs_none() -> None:
    none = replace(H100, gpu=None, gpus=0)
    (finding,) = machines(none, none, resources=Resources(ranks=2, gpus_per_rank=0))
    assert finding.what.startswith("nodes: 2 ranks on 1 agree")


@pytest.mark.parametrize(
    ("change", "level", "what", "fix"),
    [
        ({"gpu": None, "gpus": 1}, "error", "GPUs: 1 of 3 ranks have none, on n3 (GPUs there: 1)", "check nvidia-smi"),
        ({"gpu": "NVIDIA A100"}, "warning", "GPUs differ, and the slowest sets the pace: NVIDIA H100 on n1, n2, NVIDIA A100 on n3", "set resources.constraint"),
        ({"gpu_bytes": 42 * 10**9, "gpu_free": 42 * 10**9}, "error", "GPUs: 3 x NVIDIA H100, 42.0 GB, and a rank needs 60.0 GB", "set resources.gpu_gigabytes"),
        ({"gpu_bytes": 64 * 10**9, "gpu_free": 64 * 10**9}, "warning", "GPUs: 3 x NVIDIA H100, 64.0 GB, and resources.gpu_gigabytes is 80", "set resources.gpu_gigabytes=64"),
        ({"gpu_free": 60 * 10**9}, "warning", "GPUs: other processes hold up to 25.0 GB of their memory on n3", "end them, or request whole nodes"),
        ({"processors": 4}, "warning", "processors: a rank may use 4 on n3, and has 8 reader threads", "raise resources.cpus_per_rank"),
        ({"versions": VERSIONS | {"torch": "2.11"}}, "error", "versions of torch differ: 2.13.0 on n1, n2, 2.11 on n3", "use one installation on all nodes"),
        ({"time": 1006.0}, "warning", "clocks: those of n1 and n3 are 6 s apart", "synchronize them"),
        ({"problem": "data.lanes: no", "fix": "4 would"}, "error", "data.lanes: no (on n3)", "4 would"),
    ],
)  # fmt: skip
def test_a_difference_is_reported_with_the_name_of_the_node(
    change: dict[str, object], level: str, what: str, fix: str
) -> None:
    first, second, third = of_nodes("n1", "n2", "n3")
    found = machines(first, second, replace(third, **change))  # type: ignore[arg-type]
    (finding,) = [finding for finding in found if finding.level != "ok"]
    assert (finding.level, finding.what) == (level, what)
    assert finding.fix.startswith(fix)
    assert not any(finding.what.startswith("nodes:") for finding in found)


def test_without_an_estimate_of_the_needed_memory_gpus_are_not_too_small() -> None:
    small = replace(H100, gpu_bytes=10**9, gpu_free=10**9)
    assert [finding.level for finding in machines(small, needed=None)] == ["warning"]


def test_of_many_nodes_only_some_are_named() -> None:
    many = [replace(H100, node=f"n{number}", problem="no shards") for number in range(9)]
    (finding,) = [finding for finding in machines(*many) if finding.level == "error"]
    assert finding.what == "no shards (on n0, n1, n2, n3 and 5 more)"


LOAD = StepLoad(
    images=1000, gradient_bytes=10**9, checkpoint_bytes=4 * 10**9, every_steps=10, pace=RankSpeed(500, "as before")
)


def test_the_bus_bandwidth_is_compared_with_the_gradients_of_a_step() -> None:
    """nccl-tests: bytes / seconds x 2 (n - 1) / n, of the slowest."""
    fast = [AllReduceFacts("n1", 10**9, 0.5), AllReduceFacts("n2", 10**9, 1.0)]
    assert assess_all_reduce("pretrain", fast, LOAD) == [
        Finding(
            "ok", "pretrain", "all-reduce: 1.00 GB/s bus bandwidth between 2 ranks, 1 s for the gradients of a step"
        )
    ]
    four = [AllReduceFacts("n1", 10**9, 1.0)] * 4
    (finding,) = assess_all_reduce("pretrain", four, None)
    assert finding.what == "all-reduce: 1.50 GB/s bus bandwidth between 4 ranks"
    # A step computes 1,000 images in a second on two ranks.
    slow = [AllReduceFacts("n1", 10**9, 1.1)] * 2
    (finding,) = assess_all_reduce("pretrain", slow, LOAD)
    assert finding.level == "warning"
    assert finding.what.endswith("1.1 s for the gradients of a step, which computes for 1 s (as before)")
    assert assess_all_reduce("pretrain", slow, replace(LOAD, pace=None))[0].level == "ok"


def test_readers_are_compared_with_what_training_needs() -> None:
    def assessed(images: int, load: StepLoad = LOAD, skipped: int = 0) -> Finding:
        (finding,) = assess_reading("pretrain", [ReadFacts("n1", images, 10.0, skipped)] * 2, load)
        return finding

    assert assessed(5000).what == "reading: 1,000 images/s by 2 ranks, and training needs 1,000 (as before)"
    assert (assessed(5000).level, assessed(4990).level) == ("ok", "warning")
    assert assessed(4990).fix.startswith("raise data.workers and resources.cpus_per_rank")
    assert assessed(4990, replace(LOAD, pace=None)).what == "reading: 998 images/s by 2 ranks"
    assert assessed(5000, skipped=3).what.startswith("reading: 1,000 images/s by 2 ranks, 6 samples could not be used")


def test_a_save_is_compared_with_the_time_between_saves() -> None:
    def assessed(seconds: float, load: StepLoad = LOAD) -> Finding:
        facts = [WriteFacts("n1", 10**9, seconds), WriteFacts("n2", 10**9, seconds / 2)]
        (finding,) = assess_writing("pretrain", facts, load)
        return finding

    assert assessed(1.0) == Finding("ok", "pretrain", "checkpoints: 2.00 GB/s by 2 ranks, 2 s for one")
    # 10 steps of a second, and 4 GB at 2 GB in 6 s.
    assert (assessed(4.9).level, assessed(6.0).level) == ("ok", "warning")
    assert assessed(6.0).what == "checkpoints: 0.33 GB/s by 2 ranks, 12 s for one, with one every 10 s (as before)"
    assert assessed(6.0, replace(LOAD, pace=None)).level == "ok"


def burned(node: str, bits: dict[str, int], kind: str = "H200", problem: str | None = None) -> DeviceBits:
    return DeviceBits(f"rank 0 on {node}", node, kind, "", kind, bits, 5.02, problem)


def test_a_burn_in_says_what_was_compared() -> None:
    def said(*devices: DeviceBits) -> str:
        (finding,) = assess_burn_in("pretrain", devices)
        assert finding.level == "ok"
        return finding.what

    one, other, third = burned("n1", {"loss=1": 57}), burned("n2", {"loss=1": 60}), burned("n3", {"loss=2": 9}, "A100")
    both = "burn-in: 2 ranks computed one micro-batch 57 to 60 times with equal bits, in 5 s"
    assert said(one, other) == both
    alone = "burn-in: 1 rank computed one micro-batch 57 times with equal bits, in 5 s; there is no other one to compare with"
    assert said(one) == alone
    kinds = "within each kind of device, and kinds are not compared with each other: H200 on n1, n2; A100 on n3"
    assert (
        said(one, other, third)
        == f"burn-in: 3 ranks computed one micro-batch 9 to 60 times with equal bits, in 5 s {kinds}"
    )


def test_a_faulty_device_is_an_error_with_its_node_in_the_fix() -> None:
    devices = [burned("n1", {"loss=1": 9}), burned("n2", {"loss=1": 9}), burned("n3", {"loss=2": 9})]
    (finding,) = assess_burn_in("pretrain", devices)
    assert finding == Finding(
        "error", "pretrain", "burn-in: rank 0 on n3 (H200) always computes other bits than most of 2 others of its kind, in loss",
        "drain the node (scontrol update NodeName=n3 State=DRAIN Reason=bits), or leave it out (resources.flags: [--exclude=n3])",
    )  # fmt: skip


def test_ranks_that_all_differ_from_themselves_point_to_the_software() -> None:
    (finding,) = assess_burn_in("pretrain", [burned("n1", {"loss=1": 9, "loss=2": 1})] * 2)
    assert finding.what.startswith(
        "burn-in: all 2 ranks compute other bits than themselves, such as rank 0 on n1 (H200)"
    )
    assert finding.fix.startswith("look at the software first")


def test_a_rank_without_memory_for_the_burn_in_is_named_and_the_others_are_compared() -> None:
    full = burned("n2", {}, problem="the memory of the GPU is full (CUDA out of memory)")
    warning, fine = assess_burn_in("pretrain", [burned("n1", {"loss=1": 9}), full])
    assert (warning.level, warning.what) == (
        "warning",
        "burn-in: the memory of the GPU is full (CUDA out of memory) (on n2)",
    )
    assert fine.what.startswith("burn-in: 1 rank computed")
    assert [finding.level for finding in assess_burn_in("pretrain", [full])] == ["warning"]


def test_failures_on_some_ranks_are_reported_with_their_nodes() -> None:
    exchanges = [AllReduceFacts("n1", 1, 1.0), AllReduceFacts("n2", 1, 0.0, "NCCL error: no socket")]
    assert assess_all_reduce("pretrain", exchanges, LOAD)[0].what == "all-reduce: NCCL error: no socket (on n2)"
    readings = [ReadFacts("n1", 1, 1.0, 0, "shard x is gone"), ReadFacts("n2", 1, 1.0, 0)]
    assert assess_reading("pretrain", readings, LOAD)[0].what == "reading: shard x is gone (on n1)"
    writings = [WriteFacts("n1", 1, 0.0, "[Errno 28] No space"), WriteFacts("n2", 1, 0.0, "[Errno 28] No space")]
    (finding,) = assess_writing("pretrain", writings, LOAD)
    assert (finding.level, finding.what) == ("error", "checkpoints: [Errno 28] No space (on n1, n2)")


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (ConfigError("stage pretrain: lanes: 5; 4 would"), "lanes: 5", "4 would"),
        (ConfigError("a and b differ (3 and 3; 1 is x); build both; or map"), "a and b differ (3 and 3; 1 is x)", "build both; or map"),
        (ConfigError("no fix"), "no fix", ""),
        (ConfigError("holds:\n  seed: 0; 1\nRestore"), "holds:\n  seed: 0; 1", "Restore"),
        (StorageDown("s3: no answer; it is down"), "s3: no answer", "it is down; try again later"),
    ],
)  # fmt: skip
def test_errors_are_split_into_what_is_wrong_and_the_fix(error: Exception, what: str, fix: str) -> None:
    assert finding_of_error("pretrain", error) == Finding("error", "pretrain", what, fix)

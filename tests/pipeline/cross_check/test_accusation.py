"""What a start that found wrong values says and records: devices, what may be wrong as well, and how to go on."""

from pathlib import Path

import pytest
import torch

from pipeline.cross_check.accusation import CheckContext, accusation
from pipeline.cross_check.cross_check import ValuesDiffer
from pipeline.cross_check.devices import RankDevice, refuse_different_devices
from pipeline.cross_check.verdict import Verdict
from pipeline.errors import ConfigError, MachineFaulty
from pipeline.ranks.distributed import Ranks
from pipeline.runs.run_folder import RunFolder
from tests.support.recipes import events

ALONE = Ranks(0, 1, torch.device("cpu"))
NAMES = ("loss", "gradient of stem", *(f"gradient of blocks.{number}" for number in range(4)), "gradient of head")
GPUS = [RankDevice(f"node{rank // 2}", "NVIDIA H200", f"GPU-{rank}", "2.11") for rank in range(4)]


def accuse(
    run: RunFolder,
    found: Verdict,
    *,
    step: int = 20,
    last_passed: int | None = 10,
    newest: str | None = "step-00000015",
) -> MachineFaulty:
    now = CheckContext(step, last_passed, newest, excluded_nodes=2)
    error = accusation(ValuesDiffer(found, NAMES, GPUS), now, run, ALONE)
    assert isinstance(error, MachineFaulty)
    return error


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_a_message_names_the_gpus_and_the_event_log_has_all_of_it(run: RunFolder) -> None:
    error = accuse(run, Verdict({3: tuple(range(7)), 2: (6,)}, {0: (1,)}))
    assert error.nodes == ("node1",)
    assert str(error) == (
        "cross-check of step 20: wrong values, as the other ranks agree: rank 2 on node1 (NVIDIA H200, GPU-2): gradient "
        "of head; rank 3 on node1 (NVIDIA H200, GPU-3): loss, gradient of stem, gradient of blocks.0, gradient of "
        "blocks.1, 3 more. The step was not applied, and the run goes on from step-00000015, which may be wrong, too: "
        "steps 11 to 15 were computed with the same machines, after the check of step 10 was passed. Slurm jobs go on "
        "without node1 by themselves; elsewhere, repeat the command without that machine, or with fewer ranks and "
        "without GPU-2, GPU-3 in CUDA_VISIBLE_DEVICES. Test it before it is used again"
    )
    (entry,) = events(run.path)
    assert entry["kinds"] == ["gradient", "loss"]
    assert [(device["rank"], device["uuid"]) for device in entry["devices"]] == [
        (0, "GPU-0"),
        (2, "GPU-2"),
        (3, "GPU-3"),
    ]
    assert entry["devices"][2]["values"] == list(NAMES)


@pytest.mark.parametrize(
    ("last_passed", "newest", "said"),
    [
        (15, "step-00000015", "goes on from step-00000015, after which the check of step 15 was passed. "),
        (
            None,
            "step-00000015",
            "from step-00000015, which may be wrong, too: no earlier check of this start was passed. ",
        ),
        (10, None, "the run starts over, as there is no checkpoint yet. "),
    ],
)
def test_a_message_says_whether_the_checkpoint_may_be_wrong(
    run: RunFolder, last_passed: int | None, newest: str | None, said: str
) -> None:
    assert said in str(accuse(run, Verdict({3: (1,)}, {}), last_passed=last_passed, newest=newest))


def test_where_it_cannot_be_told_who_is_wrong_no_node_is_left_out(run: RunFolder) -> None:
    error = accuse(run, Verdict({}, {0: (1,), 3: (1,)}))
    assert error.nodes == ()
    assert "rank 0 on node0 (NVIDIA H200, GPU-0): gradient of stem; rank 3 on node1 " in str(error)
    assert str(error).endswith("No machine is left out: test these, or repeat the command")


def test_devices_whose_bits_may_differ_are_not_compared() -> None:
    refuse_different_devices([])
    refuse_different_devices(GPUS)
    with pytest.raises(
        ConfigError,
        match=r"rank 4 on node9 computes on NVIDIA A100 with torch 2.11, and rank 0 on node0 on NVIDIA H200 .* leave verify out",
    ):
        refuse_different_devices([*GPUS, RankDevice("node9", "NVIDIA A100", "GPU-9", "2.11")])
    with pytest.raises(
        ConfigError, match=r"on NVIDIA H200 with torch 2.13, and rank 0 on node0 on NVIDIA H200 with torch 2.11"
    ):
        refuse_different_devices([*GPUS, RankDevice("node9", "NVIDIA H200", "GPU-9", "2.13")])

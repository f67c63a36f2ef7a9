"""Checkpoints as files: ranges across the files of ranks, buffers, other models."""

from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.checkpoint import load_state, open_checkpoint
from pipeline.errors import ConfigError
from pipeline.zero.fragments import Fragment
from tests.pipeline.checkpoints.small import KINDS, SHAPES, holds, live, opened, save, whole


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_range_is_read_across_the_files_of_ranks(tmp_path: Path, count: int) -> None:
    save(tmp_path, 7, count=count)
    checkpoint = opened(tmp_path, 7)
    assert holds(checkpoint, 7)
    for kind in KINDS:
        flat = whole(kind, "a", 7).view(-1)
        for start in range(0, 1200, 97):
            for stop in range(start + 1, 1201, 101):
                assert torch.equal(checkpoint.read("a", kind, start, stop), flat[start:stop])


def test_loading_fills_the_live_state(tmp_path: Path) -> None:
    save(tmp_path, 7, count=2)
    mine = [Fragment("a", 555, 700, {kind: torch.zeros(145) for kind in KINDS}, True)]
    load_state(opened(tmp_path, 7), mine, SHAPES)
    for kind in KINDS:
        assert torch.equal(mine[0].tensors[kind], whole(kind, "a", 7).view(-1)[555:700])


def test_buffers_come_back(tmp_path: Path) -> None:
    save(tmp_path, 3, count=2)
    buffers = opened(tmp_path, 3).buffers()
    assert {name: tensor.tolist() for name, tensor in buffers.items()} == {"mean": [3.0, 3.0, 3.0], "batches": 3}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"another model: a is \(30, 40\) there and \(4, 4\) in this model \(1 param"):
        load_state(opened(tmp_path, 1), live(1).fragments, SHAPES | {"a": (4, 4)})


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a checkpoint"):
        open_checkpoint(tmp_path)

"""Checkpoints as files: ranges across ranks, publication, damage, retention."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import (
    checkpoints_newest_first,
    keep_last,
    load_state,
    newest_whole,
    open_checkpoint,
    save_checkpoint,
)
from pipeline.distributed import Ranks
from pipeline.errors import ConfigError
from pipeline.fragments import Fragment
from tests.recipes import sign_again

ALONE = Ranks(0, 1, torch.device("cpu"))
SHAPES = {"a": (3, 4), "b": (5,)}
KINDS = ("master", "exp_avg", "exp_avg_sq")


def whole(kind: str, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((KINDS.index(kind), name == "a")) % 1000)
    return torch.randn(SHAPES[name], generator=generator)


def cut(ranges: dict[str, tuple[int, int]]) -> list[Fragment]:
    return [
        Fragment(name, a, b, {kind: whole(kind, name).view(-1)[a:b].clone() for kind in KINDS}, True)
        for name, (a, b) in ranges.items()
    ]


def save(folder: Path, step: int) -> Path:
    # Two fragments of one parameter in one file would collide, as they never do on a rank.
    return save_checkpoint(
        folder, {"step": step}, cut({"a": (0, 12), "b": (0, 5)}), {"mean": torch.full((2,), step)}, SHAPES, ALONE
    )


def split_over_two_ranks(folder: Path) -> Path:
    """A checkpoint of two ranks, each with a range of `a`, put together from the files of one."""
    path = save(folder, 7)
    from safetensors.torch import save_file

    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= {"fragments": [], "files": {"buffers.safetensors": {}, "rank-00000.safetensors": {}}}
    for rank, ranges in enumerate(({"a": (0, 7)}, {"a": (7, 12), "b": (0, 5)})):
        file = f"rank-{rank:05d}.safetensors"
        save_file({f"{k}.{f.parameter}": t for f in cut(ranges) for k, t in f.tensors.items()}, path / file)
        manifest["fragments"] += [{"parameter": n, "start": a, "stop": b, "file": file} for n, (a, b) in ranges.items()]
        manifest["files"][file] = {}
    (path / "manifest.json").write_text(json.dumps(manifest))
    sign_again(path)
    return path


def test_any_range_is_read_across_the_files_of_ranks(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(split_over_two_ranks(tmp_path))
    for kind in KINDS:
        flat = whole(kind, "a").view(-1)
        for start in range(12):
            for stop in range(start + 1, 13):
                assert torch.equal(checkpoint.read("a", kind, start, stop), flat[start:stop])
    assert all(torch.equal(tensor, whole("master", name)) for name, tensor in checkpoint.parameters().items())


def test_loading_fills_the_live_state(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(split_over_two_ranks(tmp_path))
    live = [Fragment("a", 5, 9, {kind: torch.zeros(4) for kind in KINDS}, True)]
    load_state(checkpoint, live, SHAPES)
    for kind in KINDS:
        assert torch.equal(live[0].tensors[kind], whole(kind, "a").view(-1)[5:9])


def test_buffers_come_back(tmp_path: Path) -> None:
    assert torch.equal(open_checkpoint(save(tmp_path, 3)).buffers()["mean"], torch.full((2,), 3))


def test_a_published_checkpoint_holds_nothing_but_what_its_manifest_names(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    assert {p.name for p in path.iterdir()} == {*manifest["files"], "manifest.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "buffers.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_the_newest_whole_checkpoint_is_taken_and_the_reason_for_passing_others_given(
    tmp_path: Path, file: str, damage: str
) -> None:
    save(tmp_path, 1), save(tmp_path, 2)
    path = save(tmp_path, 3) / file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    checkpoint, skipped = newest_whole(tmp_path, ALONE)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert len(skipped) == 1
    assert "step-00000003: damaged: " in skipped[0]
    assert (tmp_path / "damaged-step-00000003").is_dir()


def test_an_unfinished_save_is_invisible_and_swept_away_by_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-00000009.writing"
    leftover.mkdir()
    assert newest_whole(tmp_path, ALONE) == (None, [])
    save(tmp_path, 1)
    assert not leftover.exists()


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    keep_last(tmp_path, 2)
    assert [p.name for p in checkpoints_newest_first(tmp_path)] == ["step-00000010", "step-00000009"]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    """They would push out the only whole ones as soon as a new one is saved between."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    for step in (20, 30):
        (tmp_path / f"step-000000{step}" / "buffers.safetensors").unlink()
    checkpoint, _ = newest_whole(tmp_path, ALONE)
    assert checkpoint is not None
    assert checkpoint.step == 10
    save(tmp_path, 15)
    keep_last(tmp_path, 2)
    assert [p.name for p in checkpoints_newest_first(tmp_path)] == ["step-00000015", "step-00000010"]


def test_checkpoints_none_of_which_is_whole_stop_the_run_and_stay_where_they_are(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "buffers.safetensors").unlink()
    with pytest.raises(ConfigError, match="none of its 2 checkpoints is whole .*step-00000002: damaged: buffers"):
        newest_whole(tmp_path, ALONE)
    assert len(checkpoints_newest_first(tmp_path)) == 2


def test_state_that_leaves_out_elements_is_never_published(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a: elements from 7 are missing"):
        save_checkpoint(tmp_path, {"step": 1}, cut({"a": (0, 7), "b": (0, 5)}), {}, SHAPES, ALONE)
    assert checkpoints_newest_first(tmp_path) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 1))
    with pytest.raises(ConfigError, match=r"another model: a is \(3, 4\) there and \(4, 4\) in this model \(1 param"):
        load_state(checkpoint, [], SHAPES | {"a": (4, 4)})


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a checkpoint"):
        open_checkpoint(tmp_path)

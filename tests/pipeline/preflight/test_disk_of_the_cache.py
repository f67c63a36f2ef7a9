"""The disk of the cache of remote shards: its room, and checkpoints on the same disk."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from data.remote.cache import Cache
from pipeline.errors import ConfigError
from pipeline.plan import _check_cache_fits
from pipeline.preflight.disk_space import assess_cache_space, assess_disk_space
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from tests.support.recipes import write_recipe

GB = 10**9


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every disk has 50 GB, 11 of them free, one of which is left to others."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(50 * GB, 39 * GB, 11 * GB))


def test_a_cache_whose_disk_has_no_room_for_what_a_node_reads_is_an_error(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100 * GB)
    assert assess_cache_space("pretrain", cache, 10 * GB).level == "ok"
    finding = assess_cache_space("pretrain", cache, 10 * GB + 1)
    assert (finding.level, finding.fix) == ("error", "use another disk, or reduce data.shuffle_window")
    assert "cache has room for 10.0 GB of shards beside what others read, and a node reads 10.0 GB" in finding.what
    assert not cache.folder.exists()


def test_a_run_does_not_start_without_room_for_what_a_node_reads(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100 * GB)
    _check_cache_fits(cache, 10 * GB, "")
    with pytest.raises(ConfigError, match=r"room for 10.0 GB of shards beside those that running jobs read, and needs"):
        _check_cache_fits(cache, 10 * GB + 1, "")


@pytest.mark.parametrize(("cap", "level"), [(10.9, "ok"), (20, "warning")])
def test_a_cache_that_may_fill_the_disk_of_the_checkpoints_is_a_warning(
    cap: float, level: str, shards: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards), [])
    stage = recipe.stages["pretrain"]
    assert isinstance(stage, TrainStage)
    cache = Cache(tmp_path / "cache", int(cap * GB))
    (finding,) = assess_disk_space(recipe, [("pretrain", stage, 3, 40)], [cache])
    assert finding.level == level
    if level == "warning":
        assert finding.what.endswith("11.0 GB free, which the cache of remote shards on the same disk may fill")
        assert finding.fix == "reduce data.cache.gigabytes by 9.1, or set data.cache.folder to another disk"

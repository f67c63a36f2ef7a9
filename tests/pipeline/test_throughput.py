"""The readers that are measured, as processes of their own."""

from pathlib import Path

import pytest

from pipeline.throughput import measure
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow


def test_readers_do_not_import_what_has_our_names_in_the_working_directory(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe", shards)
    for name in ("models.py", "pipeline.py", "data/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('imported')\n")
    monkeypatch.chdir(tmp_path)
    delivered = measure(recipe, [], "pretrain", ranks=2, world_size=2, seconds=0.2)
    assert delivered.images_per_second > 0

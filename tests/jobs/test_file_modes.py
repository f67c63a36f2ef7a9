"""What the commands write has the permissions that the user's umask leaves, no more and no fewer."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from tests.conftest import write_pictures
from tests.support.command import coatnet
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(params=[0o022, 0o027], ids=["022", "027"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check_modes(folder: Path, umask: int) -> None:
    found = {path: path.stat().st_mode & 0o7777 for path in folder.rglob("*")}
    locks = {path for path in found if path.name.endswith("lock")}  # filelock's are for others to read alone
    assert {path: oct(mode) for path, mode in found.items() if mode & umask} == {}
    wrong = {
        str(path): oct(mode)
        for path, mode in found.items()
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask and path not in locks
    }
    assert wrong == {}


def test_shards_and_their_contact_sheet(umask: int, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", per_class=1)
    out = tmp_path / "out"
    out.mkdir()
    for command in (
        ["build", tmp_path / "pictures", out / "shards", "--processes", "1"],
        ["index", out / "shards", "--output", out / "index"],
        ["show", out / "shards", "--output", out / "contact.png"],
    ):
        done = CliRunner().invoke(app, ["shards", *map(str, command)])
        assert done.exit_code == 0, done.output
    check_modes(out, umask)


@pytest.mark.parametrize("umask", [0o027], ids=["027"], indirect=True)
def test_a_run_and_the_weights_exported_from_it(umask: int, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, resources={"ranks": 1})
    trained = coatnet("train", recipe, "pretrain", "pretrain.steps=5", fresh=True)
    assert trained.returncode == 0, trained.stderr
    done = CliRunner().invoke(app, ["export", str(tmp_path / "runs/test/pretrain"), str(tmp_path / "x.safetensors")])
    assert done.exit_code == 0, done.output
    check_modes(tmp_path, umask)

"""Moved run folders stay what they were, copies become runs of their own."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.runs.run_identity import establish_identity, identity_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "test" / "pretrain"
    path.mkdir(parents=True)
    return path


def test_a_run_has_one_identity_from_its_first_start_on(folder: Path) -> None:
    assert identity_of(folder) is None
    first = establish_identity(folder)
    assert establish_identity(folder) == identity_of(folder) == first
    assert first.ids == {first.id}


def test_a_moved_run_stays_the_same_and_notes_where_it_is(folder: Path, tmp_path: Path) -> None:
    before = establish_identity(folder)
    moved = tmp_path / "moved"
    (tmp_path / "runs").rename(moved)
    after = establish_identity(moved / "test" / "pretrain")
    assert (after.id, after.folder) == (before.id, str(moved / "test" / "pretrain"))


def test_a_run_that_is_reached_through_a_link_is_the_same(folder: Path, tmp_path: Path) -> None:
    before = establish_identity(folder)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert establish_identity(tmp_path / "link" / "test" / "pretrain") == before


def test_a_copy_is_a_run_of_its_own_that_knows_where_it_comes_from(folder: Path, tmp_path: Path) -> None:
    original = establish_identity(folder)
    copy, again = tmp_path / "copy", tmp_path / "copy of the copy"
    shutil.copytree(folder, copy)
    unstarted = identity_of(copy)
    assert unstarted is not None
    assert unstarted.id != original.id
    first = establish_identity(copy)
    assert establish_identity(copy) == first
    assert first.ids == {first.id, original.id}
    shutil.copytree(copy, again)
    assert establish_identity(again).copied_from == (original.id, first.id)
    assert identity_of(folder) == original


def test_an_original_that_has_been_moved_is_not_taken_for_the_copy_in_its_old_place(
    folder: Path, tmp_path: Path
) -> None:
    original = establish_identity(folder)
    moved = tmp_path / "moved"
    folder.rename(moved)
    shutil.copytree(moved, folder)
    assert establish_identity(moved).id == original.id


def test_another_run_in_the_old_place_of_a_moved_one_is_no_original(folder: Path, tmp_path: Path) -> None:
    original = establish_identity(folder)
    elsewhere = tmp_path / "other file system"
    shutil.copytree(folder, elsewhere)
    shutil.rmtree(folder)
    folder.mkdir()
    establish_identity(folder)
    assert establish_identity(elsewhere).id == original.id


def test_a_copy_of_a_folder_that_only_its_owner_can_see_is_a_copy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = establish_identity(folder)
    shutil.copytree(folder, tmp_path / "copy")
    stat = os.stat

    def refused(path: Any, **options: Any) -> os.stat_result:  # root may see everything
        if str(path) == original.folder:
            raise PermissionError(13, "Permission denied", path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refused)
    assert establish_identity(tmp_path / "copy").copied_from == (original.id,)


def test_a_damaged_identity_is_named_with_the_fix(folder: Path) -> None:
    (folder / ".run.json").write_text('{"id": 3}')
    with pytest.raises(ConfigError, match=r"\.run\.json: damaged \(id: must be a string, not 3\); restore it"):
        establish_identity(folder)

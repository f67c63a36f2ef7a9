"""Accounts without a name or a usable home folder: what they are called, and what libraries find."""

import os
import tempfile
from pathlib import Path

import pytest

from data.errors import EXIT_CONFIG, DataError
from data.files.user_account import account_name, complete_account, temporary_folder, unused_temporary_folder
from pipeline.recipe.data_sections import CacheSettings
from tests.support.accounts import NAMELESS, as_nameless, open_to_all

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder for temporary files of a process whose environment says nothing about its account."""
    for name in (*NAMES, "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    open_to_all(tmp_path)
    return tmp_path


def completed() -> dict[str, str]:
    environment: dict[str, str] = {}
    complete_account(environment)
    return environment


def test_an_account_without_a_name_is_called_by_its_number(nameless: Path) -> None:
    assert as_nameless(account_name) == str(NAMELESS)


def test_libraries_find_a_name_and_a_place_for_what_they_compile(nameless: Path) -> None:
    own = f"{nameless}/coatnet-compiled-{NAMELESS}"
    assert as_nameless(completed) == {
        "USER": str(NAMELESS), "TRITON_HOME": own, "TRITON_CACHE_DIR": f"{own}/triton"
    }  # fmt: skip


@pytest.mark.parametrize("home", ["missing", "read_only"])
def test_a_home_that_cannot_be_written_is_not_used(home: str, nameless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nameless / "read_only").mkdir(mode=0o555)
    monkeypatch.setenv("HOME", str(nameless / home))
    assert as_nameless(completed)["TRITON_HOME"] == f"{nameless}/coatnet-compiled-{NAMELESS}"


def test_a_folder_of_somebody_else_is_not_used_for_compiled_code(nameless: Path) -> None:
    for name in ("torchinductor_54321", "coatnet-compiled-54321"):
        (nameless / name).mkdir(mode=0o777)
    found = as_nameless(completed)
    assert found["TORCHINDUCTOR_CACHE_DIR"].startswith(f"{nameless}/coatnet-compiled-54321-")
    assert found["TRITON_HOME"].startswith(f"{nameless}/coatnet-compiled-54321-")


def test_an_ordinary_account_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("USER", "somebody")
    assert completed() == {}


def test_no_folder_for_temporary_files_is_reported_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(DataError, match="set TMPDIR to a folder that can be written") as refused:
        temporary_folder()
    assert refused.value.exit_code == EXIT_CONFIG
    complete_account({})


@pytest.mark.parametrize(("exists", "why"), [(False, "not a folder that exists"), (True, "full, or not writable")])
def test_temporary_files_that_go_elsewhere_than_asked_are_told(
    exists: bool, why: str, nameless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = nameless / "wanted"
    if exists:
        wanted.mkdir(mode=0o555)
    monkeypatch.setenv("TMPDIR", str(wanted))
    monkeypatch.setattr(tempfile, "tempdir", None)
    remark = as_nameless(unused_temporary_folder)
    assert remark is not None
    assert remark.startswith(f"TMPDIR: {wanted} is {why}")
    assert "; temporary files go to /" in remark


def test_temporary_files_that_go_where_asked_need_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/")
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert unused_temporary_folder() is None


def test_the_cache_of_shards_is_called_after_the_account() -> None:
    assert CacheSettings().folder == os.path.join(temporary_folder(), f"coatnet-shards-{account_name()}")

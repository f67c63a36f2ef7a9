"""Atomic files: after an error, a kill, and in the order that survives a power failure."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.files.atomic_file import atomic_file, atomic_path, write_atomically
from tests.support.disk import small_file_system
from tests.support.paths import ROOT


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    write_atomically(path, b"new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_leaves_only_the_previous_file(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "index.json"
    write_atomically(path, "old")
    with contextlib.suppress(RuntimeError), atomic_file(path, shared=shared) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["index.json"]


def test_the_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", "16k") as folder:
        with pytest.raises(OSError, match=f"No space left on device: '{folder}/labels.npy'"):
            write_atomically(folder / "labels.npy", bytes(100_000))
        assert os.listdir(folder) == []


def test_a_kill_during_a_write_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    write_atomically(path, "old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom data.files.atomic_file import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'), file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == -9
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["index.json"]


def test_concurrent_writers_of_one_file_do_not_interfere(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with atomic_path(path, shared=True) as one, atomic_path(path, shared=True) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_content_is_flushed_before_the_rename_and_the_rename_before_returning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "manifest.json", list[str]()
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(f"flush {Path(target).name}")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        done.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomically(path, "content")
    assert done == ["flush .manifest.json.writing", "rename to manifest.json", f"flush {tmp_path.name}"]

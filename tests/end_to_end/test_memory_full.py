"""A rank that the kernel kills because the memory of its cgroup is full."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import environment
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A cgroup with room for the launcher, and for less than a rank."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root, limit = (first, "memory.limit_in_bytes") if first.is_dir() else (second, "memory.max")
    group = root / f"coatnet-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(600 * 10**6))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    yield group
    group.rmdir()


def test_the_message_names_the_limit_and_what_to_change(shards: Path, tmp_path: Path, small_group: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    done = subprocess.run(
        ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', small_group, sys.executable, "-m", "jobs", "train",
         recipe, "pretrain", "resources.ranks=1", "model.name=coatnet_1"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 137, done.stderr
    assert "rank 0 was killed by the kernel because the memory is full (" in done.stderr
    assert "0.6 GB of memory (the limit of its cgroup)); " in done.stderr
    assert "By estimate 1 rank of this machine" in done.stderr
    assert "Change settings, most effective first: " in done.stderr

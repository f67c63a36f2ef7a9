"""What `slurm/launch.sh` starts besides plain ranks: containers, arrays that build shards, and TensorBoard."""

import getpass
import os
import shlex
import shutil
import socket
import stat
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.servers.slurm import SlurmCluster
from tests.slurm.submitted import TEMPLATES, Submit, text_of

pytestmark = pytest.mark.slow

STAND_IN = """#!/usr/bin/env bash
# Stands in for a program that is not installed: records its arguments, then runs the command meant for the container.
printf '%s\\n' "$@" > "stand-in-$SLURM_PROCID"
while [ "$1" != bash ]; do shift; done
exec "$@"
"""


def test_tasks_run_in_a_container_by_apptainer(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apptainer").write_text(STAND_IN)
    (tmp_path / "bin" / "apptainer").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("COATNET_CONTAINER", "an image.sif")
    monkeypatch.setenv("COATNET_CONTAINER_RUNTIME", "apptainer")
    monkeypatch.setenv("COATNET_CONTAINER_MOUNTS", "/data\n/scratch:/tmp")
    task = 'echo "$RANK of $WORLD_SIZE" > "task $RANK"; echo "$COATNET_STORE_FOLDER" > store'
    job = submit(task, "recipe.yaml", options=("--nodes=1", "--ntasks-per-node=2"))
    slurm.wait_for(job, "COMPLETED")
    assert (tmp_path / "task 1").read_text() == "1 of 2\n"
    store = (tmp_path / "store").read_text().strip()
    assert store.startswith("/")
    said = (tmp_path / "stand-in-1").read_text().splitlines()
    assert said[: said.index("bash")] == [
        "exec", "--nv", "--pwd", str(tmp_path), "--bind", "/data", "--bind", "/scratch:/tmp", "--bind", str(tmp_path),
        "--bind", str(TEMPLATES), "--bind", store, "an image.sif",
    ]  # fmt: skip


def test_tasks_run_in_a_container_by_pyxis(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pyxis is an srun plugin that this Slurm does not have: the stand-in removes its options and records them.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(
        "#!/usr/bin/env bash\n"
        'for word in "$@"; do case $word in --container-*) echo "$word" >> options;; *) words+=("$word");; esac; done\n'
        f'exec {shlex.quote(str(shutil.which("srun")))} "${{words[@]}}"\n'
    )
    (tmp_path / "bin" / "srun").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("COATNET_CONTAINER", "registry#image")
    monkeypatch.setenv("COATNET_CONTAINER_MOUNTS", "/data\n/scratch:/tmp")
    job = submit('echo "$RANK of $WORLD_SIZE" > "task $RANK"', "recipe.yaml")
    slurm.wait_for(job, "COMPLETED")
    assert (tmp_path / "task 1").read_text() == "1 of 2\n"
    assert (tmp_path / "options").read_text().splitlines() == [
        "--container-image=registry#image",
        f"--container-mounts=/data:/data,/scratch:/tmp,{tmp_path}:{tmp_path},{TEMPLATES}:{TEMPLATES}",
        f"--container-workdir={tmp_path}",
    ]


def test_an_array_reads_shards_and_a_job_merges_them(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    task = 'printf "%s|" "$@" > "arguments $SLURM_ARRAY_TASK_ID"'
    options = ("--array=1-3", "--nodes=1", "--ntasks-per-node=1")
    parts = submit(task, "build", "a source", "shards", "--seed=1", template="shards", options=options)
    merge = submit(task, "merge", "shards", template="shards", options=("--nodes=1", f"--dependency=afterok:{parts}"))
    slurm.wait_for(merge, "COMPLETED")
    for number in (1, 2, 3):
        said = (tmp_path / f"arguments {number}").read_text()
        assert said == f"shards|build|a source|shards|--seed=1|--part={number}/3|"
    assert (tmp_path / "arguments ").read_text() == "shards|merge|shards|"


@pytest.mark.parametrize("options", [(), ("--host", "0.0.0.0")], ids=["on its node", "on all addresses"])  # noqa: S104
def test_tensorboard_logs_its_address_and_serves(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "tensorboard").symlink_to(Path(sys.executable).with_name("tensorboard"))
    submit("", str(tmp_path), *options, template="tensorboard", options=("--nodes=1",))
    slurm.wait_until(lambda: "http://localhost:" in text_of(tmp_path))
    port = text_of(tmp_path).partition("http://localhost:")[2].partition("/")[0]
    command = text_of(tmp_path).partition("ssh ")[2].partition("\n")[0]
    user, login = getpass.getuser(), f"{getpass.getuser()}@{socket.gethostname()}"
    if options:
        assert command == f"-N -L {port}:node1:{port} {login}"
    else:
        assert command == f"-N -L {port}:127.0.0.1:{port} -J {login} {user}@node1"

    def answers(address: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://{address}:{port}/data/environment", timeout=5) as page:
                return bool(page.status == 200)
        except OSError:
            return False

    slurm.wait_until(lambda: answers("127.0.0.1"))
    assert answers("127.0.0.2") == bool(options)

"""How `slurm/launch.sh` starts tasks and acts on how they end: real jobs whose tasks run a small script instead of a rank."""

import os
import shutil
import signal
import stat
from pathlib import Path

import pytest

from jobs.scheduler.job_log import job_outcome
from tests.servers.slurm import SlurmCluster
from tests.slurm.submitted import TEMPLATES, Submit, text_of
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow


def cause(text: str) -> str:
    """Lines of shell by which the first rank that fails says why, and no other, as `jobs/exit_codes.py` does."""
    return f'printf "{text}" > "cause $RANK"; ln "cause $RANK" "$COATNET_CAUSE_FILE" 2>/dev/null'


LOSSES = cause("70\\nlosses\\nare nan\\n")
BOTH_BEGUN = 'touch "begun $RANK"; until [ -e "begun 0" ] && [ -e "begun 1" ]; do sleep 0.1; done'
"""Each of two tasks waits for the other: Slurm does not end a task that it has not yet started."""


def log_of(folder: Path) -> list[str]:
    """The lines that launch.sh itself wrote."""
    lines = [line for line in text_of(folder).splitlines() if " job " in line and line[:2] == "20"]
    return [line.partition(": ")[2] for line in lines]


def notes(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".coatnet-job-*")]


def test_tasks_get_their_rank_and_their_arguments_unchanged(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ".")  # the working directory may be another checkout
    task = (
        'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $(hostname) $OMP_NUM_THREADS" > "task $RANK"\n'
        'printf "%s|" "$@" > "arguments $RANK"; echo "$MASTER_PORT" > "port $RANK"; echo "$PYTHONPATH" > path'
    )
    odd = ["a b", 'it\'s "quoted"', "line\nline", "100%j", "back\\slash", "$HOME *"]
    job = submit(task, "recipe.yaml", "", *odd, options=("--ntasks-per-node=2",))
    slurm.wait_for(job, "COMPLETED")
    for rank in range(4):
        assert (tmp_path / f"task {rank}").read_text() == f"{rank} {rank % 2} 4 2 node1 node{rank // 2 + 1} 1\n"
        assert (tmp_path / f"arguments {rank}").read_text() == "|".join(["train", "recipe.yaml", "pretrain", *odd, ""])
        assert (tmp_path / f"port {rank}").read_text() == (tmp_path / "port 0").read_text()
    assert (tmp_path / "path").read_text() == f"{ROOT}:.\n"  # of the launcher's own code
    assert log_of(tmp_path) == ["start 0 on node[1-2], 4 tasks", "done"]
    assert notes(tmp_path) == []


MEETS = """
echo "$MASTER_PORT $COATNET_STORE_SECRET $COATNET_STORE_FOLDER" > "meets $SLURM_JOB_ID $RANK"
[ -z "$COATNET_STORE_FOLDER" ] || stat -c '%a %u' "$COATNET_STORE_FOLDER" > "folder $SLURM_JOB_ID"
touch "$COATNET_BEGUN_FILE"
until [ -e end ]; do sleep 0.1; done
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_jobs_that_share_nodes_meet_at_different_places(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, nodes: int
) -> None:
    place = (f"--nodes={nodes}", "--ntasks-per-node=2", "--nodelist=node1" if nodes == 1 else "--nodelist=node[1-2]")
    jobs = [submit(MEETS, "recipe.yaml", options=place) for _ in range(2)]
    files = {job: [tmp_path / f"meets {job} {rank}" for rank in range(2 * nodes)] for job in jobs}
    slurm.wait_until(lambda: all(one.exists() and one.read_text() for found in files.values() for one in found))
    places = [{one.read_text() for one in found} for found in files.values()]
    assert [len(one) for one in places] == [1, 1]  # all ranks of a job have the same
    (_, secret, *folder), (_, other_secret, *other_folder) = (one.pop().split() for one in places)
    assert {len(secret), len(other_secret)} == {32}
    assert secret != other_secret
    assert secret not in slurm.run("scontrol", "--details", "show", "job", jobs[0])
    assert len({*folder, *other_folder}) == (2 if nodes == 1 else 0)
    if nodes == 1:
        assert (tmp_path / f"folder {jobs[0]}").read_text() == f"700 {os.getuid()}\n"
    (tmp_path / "end").touch()
    for job in jobs:
        slurm.wait_for(job, "COMPLETED")
    assert not any(Path(one).exists() for one in folder + other_folder)


def test_the_site_file_can_say_at_which_address_ranks_meet_and_the_submitting_shell_cannot(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "login")
    monkeypatch.setenv("COATNET_SITE", str(tmp_path / "site.sh"))
    (tmp_path / "site.sh").write_text("MASTER_ADDR=$(hostname)-ib\n")
    job = submit('echo "$MASTER_ADDR" > "address $RANK"', "recipe.yaml")
    slurm.wait_for(job, "COMPLETED")
    assert [(tmp_path / f"address {rank}").read_text() for rank in (0, 1)] == ["node1-ib\n"] * 2


@pytest.mark.parametrize(
    ("task", "code", "said"),
    [
        # The first cause counts, not the highest code among the tasks that fail because of it.
        (
            f'{BOTH_BEGUN}; if [ "$RANK" = 1 ]; then printf "78\\nthe recipe is wrong\\n" > "$COATNET_CAUSE_FILE"; exit 78; fi; exec sleep 600',
            "78",
            "failed with exit code 78, not requeued: the recipe is wrong",
        ),
        (
            f'if [ "$RANK" = 1 ]; then {LOSSES}; exit 70; fi; until [ -s "$COATNET_CAUSE_FILE" ]; do sleep 0.1; done; kill -9 $$',
            "70",
            "failed with exit code 70, not requeued: losses\nare nan",
        ),
        (
            cause("1\\nTypeError: no\\n") + "; exit 1",
            "1",
            "failed with exit code 1, not requeued: TypeError: no",
        ),
        ("exit 2", "2", "failed with exit code 2, not requeued: srun ended with 2"),
    ],
)
def test_a_failure_that_would_recur_is_not_requeued(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, task: str, code: str, said: str
) -> None:
    # A single task if none writes a cause: of two, srun may terminate one before it ends by itself, which is code 143.
    options = () if "COATNET_CAUSE_FILE" in task else ("--nodes=1",)
    job = slurm.wait_for(submit(task, "recipe.yaml", options=options), "FAILED")
    assert (job["ExitCode"], job["Restarts"]) == (f"{code}:0", "0"), text_of(tmp_path)
    assert not any(line.startswith("requeued:") for line in log_of(tmp_path))
    assert said in (tmp_path / "log").read_text()
    assert notes(tmp_path) == []


ONCE = '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0'
"""For a task that does the rest at its first start only."""
SAVED = cause("75\\nsaved\\n")


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (cause("75\\nthe storage is down\\n") + "; exit 75", "requeued: the storage is down"),
        (
            'if [ "$RANK" = 1 ]; then kill -9 $$; fi; exec sleep 600',
            "requeued: srun ended with 1",
        ),  # 137, or 143 of the other
        ("exit 1", "requeued: srun ended with 1"),  # as srun itself does where it loses a node
    ],
)
def test_a_temporary_failure_is_requeued(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, trouble: str, said: str
) -> None:
    job = submit(f'{ONCE}\ntouch "$COATNET_BEGUN_FILE"; {BOTH_BEGUN}\n{trouble}', "recipe.yaml")
    slurm.wait_for_restart(job)
    assert slurm.wait_for(job, "COMPLETED")["Restarts"] == "1"
    start, requeued, again, done = log_of(tmp_path)
    assert (start, again, done) == ("start 0 on node[1-2], 2 tasks", "start 1 on node[1-2], 2 tasks", "done")
    assert requeued.startswith(said)
    assert notes(tmp_path) == []


def test_a_controller_that_does_not_respond_as_the_job_ends_is_asked_again(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's own commands, which fail the first time: a real controller fails over when it wants to."""
    (tmp_path / "bin").mkdir()
    for name, words in (("squeue", ["--noheader"]), ("scontrol", ["show job", "requeue"])):
        program = tmp_path / "bin" / name
        first_fails = "".join(
            f'case "$SLURM_JOB_ID $*" in [0-9]*" {word} "*) mkdir "{tmp_path}/failed {name} {word}" && exit 1;; esac\n'
            for word in words
        )
        program.write_text(f'#!/bin/sh\n{first_fails}exec {shutil.which(name)} "$@"\n')
        program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    task = f'touch "$COATNET_BEGUN_FILE"; {ONCE}\n{SAVED}; exit 75'
    job = submit(task, "recipe.yaml")
    slurm.wait_for_restart(job)
    assert slurm.wait_for(job, "COMPLETED")["Restarts"] == "1"
    for command in ("squeue --noheader", "scontrol show job", "scontrol requeue"):
        assert (tmp_path / f"failed {command}").exists()
    assert [line for line in log_of(tmp_path) if not line.startswith("start")] == ["requeued: saved", "done"]


def test_a_job_whose_ranks_end_while_slurm_still_signals_its_nodes_is_requeued(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's own answer with the state that a job has for milliseconds, or longer on many nodes."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "squeue"
    program.write_text(f'#!/bin/sh\n{shutil.which("squeue")} "$@" | sed s/RUNNING/SIGNALING/\n')
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    task = f'touch "$COATNET_BEGUN_FILE"; {ONCE}\nprintf "75\\nsaved\\n" > "$COATNET_CAUSE_FILE"; exit 75'
    job = submit(task, "recipe.yaml", options=("--nodes=1",))
    slurm.wait_for_restart(job)
    slurm.wait_for(job, "COMPLETED")
    assert [line for line in log_of(tmp_path) if not line.startswith("start")] == ["requeued: saved", "done"]


def test_a_template_without_a_recipe_asks_for_one(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    slurm.wait_for(submit("exit 0"), "FAILED")
    assert "1: which RECIPE?" in (tmp_path / "log").read_text()


@pytest.mark.slow(seconds=18)
def test_a_job_stops_after_three_starts_that_never_began_the_run(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    job = submit("kill -9 $$", "recipe.yaml")
    for restart in (1, 2):
        slurm.wait_for_restart(job, restart)
    ended = slurm.wait_for(job, "FAILED")
    assert (ended["Restarts"], ended["ExitCode"]) == ("2", "70:0")
    assert log_of(tmp_path)[-1].startswith("failed: 3 starts in a row ended before the run began (srun ended with 1")
    assert notes(tmp_path) == []


@pytest.mark.slow(seconds=18)
def test_a_build_of_shards_goes_on_as_long_as_each_start_writes_something(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    progress = '[ "${SLURM_RESTART_COUNT:-0}" -ge 1 ] || touch "$COATNET_BEGUN_FILE"'
    job = submit(f"{progress}\nkill -9 $$", "build", template="shards", options=("--nodes=1", "--ntasks-per-node=1"))
    for restart in (1, 2, 3):
        slurm.wait_for_restart(job, restart)
    ended = slurm.wait_for(job, "FAILED")
    assert (ended["Restarts"], ended["ExitCode"]) == ("3", "70:0")
    assert "failed: 3 starts in a row ended before anything new was written (srun ended with" in log_of(tmp_path)[-1]


def test_notes_of_a_job_are_never_run_as_code(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    """The notes lie in a folder that others may write to."""
    hostile = "a[$(touch $PWD/ran)]"
    plant = f"printf '%s\\n' '{hostile}' | tee .coatnet-job-$SLURM_JOB_ID.starts > \"$COATNET_CAUSE_FILE\"; kill -9 $$"
    job = slurm.wait_for(submit(plant, "recipe.yaml", options=("--nodes=1",)), "FAILED")
    assert job["ExitCode"] == "1:0"  # what the cause file says is no exit code
    submit(plant.replace("| tee", ">").replace('> "$COATNET_CAUSE_FILE"', ""), "recipe.yaml", options=("--nodes=1",))
    slurm.wait_until(lambda: any(line.startswith("requeued") for line in log_of(tmp_path)))
    assert not (tmp_path / "ran").exists()


SAVES = f"""
trap '{SAVED}; exit 75' TERM USR2
touch "$COATNET_BEGUN_FILE" "running $RANK"
{ONCE}
while :; do sleep 0.1; done
"""


def running(folder: Path) -> bool:
    """Whether both ranks of SAVES have begun and handle signals."""
    return all((folder / f"running {rank}").exists() for rank in (0, 1))


def test_a_cancelled_job_saves_and_is_not_requeued(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    job = submit(SAVES.replace('"$COATNET_BEGUN_FILE" ', ""), "recipe.yaml")
    slurm.wait_until(lambda: running(tmp_path))
    slurm.run("scancel", job)
    slurm.wait_until(lambda: len(log_of(tmp_path)) == 2)
    assert log_of(tmp_path)[1] == "ended as COMPLETING None: saved"
    assert slurm.wait_for(job, "CANCELLED")["Restarts"] == "0"
    assert notes(tmp_path) == []  # the run had not begun, which counts only for a requeued job


@pytest.mark.slow(seconds=28)
def test_a_job_is_requeued_at_its_time_limit_with_and_without_a_warning_signal(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = {}
    for name, signal_option, seconds in (("warned", "USR2@120", 120), ("ended", "URG@1", 1)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        jobs[name] = submit(SAVES, "recipe.yaml", options=(f"--signal={signal_option}", "--time=10"))
        slurm.wait_until(lambda: running(tmp_path / name))  # noqa: B023
        slurm.end_soon(jobs[name], seconds)
    for name, job in jobs.items():
        slurm.wait_for_restart(job)
        assert slurm.wait_for(job, "COMPLETED")["Restarts"] == "1"
        assert log_of(tmp_path / name)[1] == "requeued: saved"


@pytest.mark.parametrize("partition", ["low", "lowgrace"])
def test_a_preempted_job_runs_again(slurm: SlurmCluster, submit: Submit, tmp_path: Path, partition: str) -> None:
    job = submit(SAVES, "recipe.yaml", options=(f"--partition={partition}", "--exclusive"))
    slurm.wait_until(lambda: running(tmp_path))
    high = ["--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"]
    slurm.run("sbatch", "--parsable", *high)
    slurm.wait_for_restart(job)
    assert slurm.wait_for(job, "COMPLETED")["Restarts"] == "1"


def test_the_templates_work_in_a_folder_with_an_awkward_name(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path
) -> None:
    odd = tmp_path / 'it\'s a "folder"\nof =templates'
    shutil.copytree(TEMPLATES, odd)
    (odd / "site.sh").write_text("export OMP_NUM_THREADS=3\n")
    job = submit('echo "$OMP_NUM_THREADS" > said', "recipe.yaml", folder=odd)
    slurm.wait_for(job, "COMPLETED")
    assert (tmp_path / "said").read_text() == "3\n"


def test_the_name_of_a_job_does_not_choose_what_runs(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "launch.sh").write_text("touch ran")
    name = f"--job-name=x Command={tmp_path}/pretrain.sbatch"
    slurm.wait_for(submit("touch task", "recipe.yaml", options=(name, "--nodes=1")), "COMPLETED")
    assert (tmp_path / "task").exists()
    assert not (tmp_path / "ran").exists()


def test_the_site_file_can_be_named_by_a_variable(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "our site" / "settings.sh"
    site.parent.mkdir()
    site.write_text("export OMP_NUM_THREADS=5\n")
    templates = tmp_path / "templates"
    shutil.copytree(TEMPLATES, templates)
    (templates / "site.sh").write_text("export OMP_NUM_THREADS=3\n")
    for named, threads in ((str(site), "5"), ("our site/settings.sh", "5"), ("", "3")):
        monkeypatch.setenv("COATNET_SITE", named)
        (tmp_path / "log").unlink(missing_ok=True)
        job = submit('echo "$OMP_NUM_THREADS" > threads', "recipe.yaml", folder=templates)
        slurm.wait_for(job, "COMPLETED")
        assert (tmp_path / "threads").read_text() == f"{threads}\n"


def test_a_site_file_that_cannot_be_read_fails_the_job_with_78(
    slurm: SlurmCluster, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATNET_SITE", str(tmp_path / "absent.sh"))
    number = submit("touch started", "recipe.yaml")
    job = slurm.wait_for(number, "FAILED")
    assert (job["Restarts"], job["ExitCode"]) == ("0", "78:0")
    said = f"COATNET_SITE is {tmp_path}/absent.sh, which is not a readable file on node1; correct or unset it"
    assert log_of(tmp_path) == [f"failed with exit code 78, not requeued: {said}"]
    outcome = job_outcome([tmp_path / "log"], number)
    assert outcome is not None
    assert (outcome.kind, outcome.why) == ("failed", said)
    assert not (tmp_path / "started").exists()
    assert notes(tmp_path) == []


def test_signals_reach_the_ranks(slurm: SlurmCluster, submit: Submit, tmp_path: Path) -> None:
    task = 'trap \'touch "heard $RANK"; exit 0\' USR1\ntouch "running $RANK"\nwhile :; do sleep 0.1; done'
    job = submit(task, "recipe.yaml")
    slurm.wait_until(lambda: all((tmp_path / f"running {rank}").exists() for rank in (0, 1)))
    slurm.run("scancel", f"--signal={signal.SIGUSR1.name.removeprefix('SIG')}", job)
    slurm.wait_for(job, "COMPLETED")
    assert (tmp_path / "heard 0").exists()
    assert (tmp_path / "heard 1").exists()

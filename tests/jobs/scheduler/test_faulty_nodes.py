"""Which nodes a run goes on without: from its event logs, into the commands of new jobs and into `coatnet status`."""

from pathlib import Path

import pytest

from jobs.scheduler import slurm
from jobs.scheduler.chain_jobs import chain_jobs, submit_chain
from jobs.scheduler.faulty_nodes import faulty_nodes
from jobs.scheduler.slurm import SchedulerDown, SlurmJob
from jobs.scheduler.submissions import submission_folder
from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.runs.event_log import Event, RunEvent
from tests.jobs.runs import MadeRun, row, slurm_reports, status
from tests.support.recipes import write_recipe


def fault(*nodes: object, hour: int = 1, **facts: object) -> RunEvent:
    return RunEvent(f"2026-11-30T{hour:02}:00:00+0000", Event.MACHINE_FAULTY, {"nodes": list(nodes), **facts})


def test_each_node_is_named_once_with_the_last_time_that_it_was_wrong() -> None:
    log = [fault("n2", step=3, kinds=["loss"]), fault("n2", "n1", hour=2, step=9, kinds=["gradient"]), fault()]
    first, second = faulty_nodes({"pretrain": log, "finetune": [RunEvent(log[0].time, Event.SAVE, {"nodes": ["n7"]})]})
    assert (first.name, first.step, first.kinds, first.stage) == ("n2", 9, ("gradient",), "pretrain")
    assert (second.name, second.since) == ("n1", log[1].seconds)
    assert first.text.startswith("it computed wrong values in step 9 of pretrain (gradient, 2026-11-")


@pytest.mark.parametrize("name", ["", "-x", "a b", "n1,n2", "n[1-4]", "/etc/passwd", "n1\n", "$(id)", 7, None])
def test_what_cannot_be_the_name_of_a_node_never_reaches_a_command(name: object) -> None:
    assert faulty_nodes({"pretrain": [fault(name)]}) == ()
    assert faulty_nodes({"pretrain": [RunEvent(fault().time, Event.MACHINE_FAULTY, {"nodes": name})]}) == ()


def exclusions(path: Path, *overrides: str, without: tuple[str, ...] = ("n2", "n5")) -> dict[str, list[str]]:
    recipe = load_recipe(path, list(overrides))
    folder = submission_folder(recipe)
    chain = chain_jobs(recipe, folder, (recipe, folder), without=without)
    return {job.name: [word for word in job.options if word.startswith(("--exclude", "-x"))] for job in chain}


def test_new_jobs_exclude_them_in_addition_to_the_nodes_of_the_recipe(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tmp_path / "shards")
    own = ["pretrain.resources.flags=[-xn1]", "evaluate.resources.flags=[--exclude=./bad]"]
    build = f"shards={{source: {tmp_path}, folder: built}}"
    assert exclusions(path, own[0], build) == {
        "shards": [], "pretrain": ["-xn1", "--exclude=n1,n2,n5"], "finetune": ["--exclude=n2,n5"],
        "evaluate": ["--exclude=n2,n5"],
    }  # fmt: skip
    assert exclusions(path, *own, without=())["evaluate"] == ["--exclude=./bad"]
    with pytest.raises(
        ConfigError, match="stage evaluate: resources.flags excludes the nodes in the file ./bad, to which"
    ):
        exclusions(path, *own)


@pytest.mark.parametrize(("flags", "remark"), [("[]", ""), ("[--exclude=n1]", "waits with other settings (resources")])
def test_a_waiting_job_has_other_settings_only_if_a_person_excludes_other_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, remark: str
) -> None:
    path = write_recipe(tmp_path, tmp_path / "shards")
    before = load_recipe(path)
    submissions = submission_folder(before)
    submissions.path.mkdir(parents=True)
    monkeypatch.setattr(slurm, "submit", lambda command, variables: "7")
    monkeypatch.setattr(slurm, "jobs", lambda numbers: {one: SlurmJob(one, "PENDING") for one in numbers})

    def submitted(recipe: Recipe, *without: str) -> str:
        pretrain, *_ = chain_jobs(recipe, submissions, (recipe, submissions), without=without)
        (result,) = submit_chain([pretrain], recipe, submissions, submissions)
        return result.remark

    assert submitted(before) == ""
    assert submitted(load_recipe(path, [f"pretrain.resources.flags={flags}"]), "n2").partition(".")[0] == remark


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    monkeypatch.chdir(tmp_path)
    made = MadeRun(tmp_path)
    made.freeze()
    made.submit("pretrain", "7")
    made.submit("finetune", "8")
    made.note("finetune", "begin", ago=700)
    made.note("pretrain", "begin", ago=90)
    made.note("pretrain", "machine_faulty", ago=60, step=1234, kinds=["gradient"], nodes=["node2"])
    return made


def test_status_takes_from_slurm_which_nodes_a_job_is_without(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "node_names", lambda nodes: {"node[2,9]": ["node2", "node9"], "": []}[nodes])
    slurm_reports(monkeypatch, SlurmJob("7", "RUNNING", excluded="node[2,9]"), SlurmJob("8", "PENDING"))
    shown = status("runs/small").output
    assert "pretrain: without node2: it computed wrong values in step 1,234 of pretrain (gradient, 20" in shown
    assert "finetune: may run on node2: it computed wrong values in step 1,234 of pretrain (gradient, 20" in shown
    assert [node["name"] for node in row("runs/small/finetune")["faulty_nodes"]] == ["node2"]  # of another stage
    slurm_reports(monkeypatch, SlurmJob("7", "COMPLETED"), SlurmJob("8", "CANCELLED"))
    assert "node2" not in status("runs/small").output


def test_a_stage_that_a_faulty_machine_has_ended_says_so_without_its_log_too(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "ranks computed different values of one micro-batch in step 1,234: a machine is faulty"
    slurm_reports(monkeypatch, SlurmJob("7", "FAILED", "NonZeroExitCode"))
    found = row("runs/small")
    assert (found["state"], found["reason"]) == ("failed", said)
    (run.submissions.path / "submissions.jsonl").unlink()  # as after a run on this machine
    found = row("runs/small")
    assert (found["state"], found["reason"]) == ("failed", said)
    run.exit("pretrain", 71, "rank 1 on node2 computes wrong values")
    found = row("runs/small")
    assert (found["state"], found["reason"]) == ("failed", "rank 1 on node2 computes wrong values")


def test_nodes_in_a_form_that_slurm_does_not_expand_are_taken_as_they_are(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(nodes: str) -> list[str]:
        raise SchedulerDown("scontrol: no answer in 60 s")

    monkeypatch.setattr(slurm, "node_names", down)
    slurm_reports(monkeypatch, SlurmJob("7", "RUNNING", excluded="node9,node2"))
    assert [node["name"] for node in row("runs/small")["excluded_nodes"]] == ["node2"]

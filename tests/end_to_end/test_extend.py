"""Stages that go on longer, or otherwise, from their last checkpoint: `--extend`."""

import json
import shutil
from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.files.yaml_text import load_plain_yaml
from data.index import read_index
from jobs.commands.submit import submit
from jobs.scheduler import slurm
from jobs.scheduler.slurm import SlurmJob
from jobs.scheduler.submissions import submission_folder
from pipeline.errors import ConfigError
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.runs.extension import Extension, extension
from pipeline.runs.run_folder import RunFolder, run_folder
from pipeline.runs.settings_history import KEY, NO_CHANGES
from pipeline.runs.stage_settings import stage_settings
from tests.support.command import coatnet
from tests.support.recipes import checkpoint_bytes, events, scalars, write_recipe

pytestmark = pytest.mark.slow(seconds=20)
OLD = ["pretrain.steps=10", "pretrain.log.samples=true", "pretrain.checkpoint={every_steps: 3, keep_every: 3}"]
NEW = [
    *OLD[1:], "pretrain.steps=16", "pretrain.batch.global_size=24", "pretrain.optimizer.peak_learning_rate=1e-3",
    "pretrain.optimizer.weight_decay=0.1", "pretrain.optimizer.gradient_clip=0.5", "pretrain.mixup_alpha=0.8",
    "pretrain.data.random_augment={layers: 2, magnitude: 15}", "pretrain.model.drop_path_rate=0.1",
    "pretrain.loss.label_smoothing=0.1", "pretrain.precision=bf16_autocast", "pretrain.ema_decay=0.8",
]  # fmt: skip
LONGER = ["pretrain.steps=20", "pretrain.optimizer.warmup_steps=2"]
FINAL = "checkpoints/step-00000016"
RUN = "runs/test/pretrain"


def recipe_in(folder: Path, shards: Path) -> Path:
    """A recipe for two ranks, with a moving average."""
    return write_recipe(folder, shards, resources={"ranks": 2, "gpus_per_rank": 0}, ema_decay=0.9)


def trained(folder: Path, *settings: str) -> Path:
    """The run folder of the pretraining in `folder`, after `coatnet train` with these arguments."""
    done = coatnet("train", folder / "recipe.yaml", "pretrain", *settings)
    assert done.returncode == 0, done.stderr
    (folder / "output").write_text(done.stdout)
    return folder / RUN


def copied(run: Path, folder: Path) -> Path:
    """A copy of the folder of a recipe and its runs, as the same run."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    identity = folder / RUN / ".run.json"
    moved = json.loads(identity.read_text()) | {"folder": str(folder / RUN), "inode": (folder / RUN).stat().st_ino}
    identity.write_text(json.dumps(moved))
    return folder


def stopped_at(step: int, run: Path) -> None:
    """Make a finished run one that has not got beyond `step`."""
    (run / "result.json").unlink()
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def planned(folder: Path, shards: Path, step: int) -> Path:
    """The run folder of a run that was to change its settings from OLD to NEW after `step` steps from the beginning."""
    path = recipe_in(folder, shards)
    old, new = load_recipe(path, OLD), load_recipe(path, NEW)
    before = old.stages["pretrain"].model_dump(mode="json")
    change = {"step": step, "time": "2026-01-01T00:00:00+0000", "changed": [], "settings": before}
    content = stage_settings(plan_stage(new, "pretrain", history=NO_CHANGES), None)
    run = run_folder(new, "pretrain")
    run.create()
    run.recipe.write_text(yaml.safe_dump(content | {KEY: {"version": 1, "entries": [change]}}))
    return trained(folder, *NEW)


def assert_equal(run: Path, other: Path) -> None:
    """Both ended with the same bits, over curves without a gap."""
    assert checkpoint_bytes(run / FINAL) == checkpoint_bytes(other / FINAL)
    for curve in ("train/loss", "train/learning_rate", "train/samples", "train/gradient_norm"):
        assert scalars(run, curve) == scalars(other, curve)
        assert list(scalars(run, curve)) == list(range(1, 17))


def texts(run: Path, tag: str) -> dict[int, str]:
    """Step -> text, as TensorBoard shows them."""
    found = EventAccumulator(str(run))
    found.Reload()
    points = found.Tensors(tag)
    return {point.step: point.tensor_proto.string_val[0].decode() for point in points}


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and the finished run of it, with the settings OLD."""
    folder = tmp_path_factory.mktemp("finished")
    recipe_in(folder, shards)
    trained(folder, *OLD)
    return folder


@pytest.fixture(scope="module")
def extended(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, gone on with the settings NEW."""
    folder = copied(finished, tmp_path_factory.mktemp("extended"))
    trained(folder, *NEW, "--extend")
    return folder


def extension_of(folder: Path, *settings: str) -> Extension | None:
    """What `--extend` would do to the pretraining in `folder`."""
    return extension(load_recipe(folder / "recipe.yaml", [*OLD, *settings]), "pretrain")


def test_a_finished_run_that_goes_on_equals_the_one_that_was_planned_so(
    extended: Path, shards: Path, tmp_path: Path
) -> None:
    assert_equal(extended / RUN, planned(tmp_path, shards, 10))
    result = json.loads((extended / RUN / "result.json").read_text())
    assert (result["steps"], result["samples"]) == (16, 10 * 12 + 6 * 24)


def test_a_stopped_run_that_goes_on_equals_itself_from_before_the_change(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    stopped_at(6, folder / RUN)
    first = shutil.copytree(trained(folder, *NEW, "--extend"), tmp_path / "first")
    # The newest checkpoints are lost: the steps before the change are taken with the settings of then.
    stopped_at(3, folder / RUN)
    assert_equal(trained(folder, *NEW), first)
    run = folder / RUN
    assert [entry["step"] for entry in events(run) if entry["event"] == "resume"] == [6, 3, 6]
    rates = scalars(run, "train/learning_rate")
    assert rates[6] == scalars(finished / RUN, "train/learning_rate")[6]
    assert rates[7] == pytest.approx(1e-3)


def test_every_lane_goes_on_with_the_next_sample_though_the_batch_is_another(extended: Path, shards: Path) -> None:
    logged: dict[tuple[int, int], int] = {}
    for file in sorted((extended / RUN / "samples").iterdir()):
        for line in map(json.loads, file.read_text().splitlines()):
            logged |= {(line["step"], line["start"] + number): sample for number, sample in enumerate(line["ids"])}
    seen = defaultdict(list)
    for (step, position), sample in sorted(logged.items()):
        seen[position // ((12 if step < 10 else 24) // 4)].append(sample)
    plain = plan_stage(load_recipe(extended / "recipe.yaml", ["pretrain.batch.global_size=12"]), "finetune")
    assert isinstance(plain, TrainPlan)
    in_order = [plain.order.at(step, 0, 12).id.reshape(4, 3) for step in range((10 * 12 + 6 * 24) // 12)]
    assert [seen[lane] for lane in range(4)] == [[int(s) for ids in in_order for s in ids[lane]] for lane in range(4)]


def test_a_run_of_a_constant_rate_that_goes_on_past_its_end_equals_a_longer_one(shards: Path, tmp_path: Path) -> None:
    constant = ["pretrain.optimizer.schedule=constant", "resources.ranks=1", "pretrain.checkpoint.every_steps=3"]
    for name in ("longer", "extended"):
        recipe_in(tmp_path / name, shards)
    longer = trained(tmp_path / "longer", *constant, "pretrain.steps=9")
    trained(tmp_path / "extended", *constant, "pretrain.steps=6")
    extended = trained(tmp_path / "extended", *constant, "pretrain.steps=9", "--extend")
    final = "checkpoints/step-00000009"
    assert checkpoint_bytes(extended / final) == checkpoint_bytes(longer / final)
    assert scalars(extended, "train/loss") == scalars(longer, "train/loss")


def test_the_change_is_shown_and_kept_where_it_was_made(extended: Path) -> None:
    run = extended / RUN
    output = (extended / "output").read_text()
    assert "pretrain  goes on from step 10 to step 16 with other settings: batch.global_size: 12 -> 24; " in output
    assert "pretrain  the learning rate of the next step is 0.001 instead of 0, and becomes 0 by step 16\n" in output
    assert "pretrain  settings changed after step 10: batch.global_size: 12 -> 24; data.random_augment" in output
    (entry,) = (entry for entry in events(run) if entry["event"] == "extend")
    assert (entry["step"], entry["samples"], entry["steps"]) == (10, 120, 16)
    assert "steps: 10 -> 16" in entry["changed"]
    shown = texts(run, "changes")
    assert list(shown) == [11]
    assert "    optimizer.peak_learning_rate: 0.003 -> 0.001\n" in shown[11]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (change,) = recipe["changes"]["entries"]
    assert (recipe["steps"], change["settings"]["steps"], change["step"]) == (16, 10, 10)
    assert json.loads((run / "result-step-00000010.json").read_text())["steps"] == 10


def test_after_the_change_the_same_settings_go_on_without_the_word_and_others_are_refused(extended: Path) -> None:
    recipe = extended / "recipe.yaml"
    again = coatnet("train", recipe, "pretrain", *NEW)
    assert "pretrain  done before\n" in again.stdout, again.stderr
    repeated = coatnet("train", recipe, "pretrain", *NEW, "--extend")
    assert "--extend: no stage that has begun has other settings, so nothing is changed\n" in repeated.stdout
    old = coatnet("train", recipe, "pretrain", *OLD)
    assert old.returncode == 78
    assert "  steps: 16 -> 10\n" in old.stderr
    assert "to go on from its last checkpoint with them, repeat the command with --extend\n" in old.stderr
    verified = coatnet("checkpoints", "verify", extended / "runs/test")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    named = coatnet("order", recipe, "pretrain", *NEW, "--step", "9", "--json")
    assert len(json.loads(named.stdout)) == 12
    assert len(json.loads(coatnet("order", recipe, "pretrain", *NEW, "--step", "10", "--json").stdout)) == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["seed=1", "pretrain.steps=20"], "seed: 0 -> 1\nseed: with another one the order of the samples could not"),
        (["pretrain.model.head_size=8"], "model: its weights would not fit another architecture; add a stage with"),
        (["batch.micro_size=6"], "batch.micro_size: BatchNorm and MixUp are defined on micro-batches of one size;"),
        (["data.lanes=2"], "data.lanes: with others the order of the samples could not go on from where it is"),
        (["ema_decay=null"], "ema_decay: a moving average cannot begin or end under way; add a stage with start_from"),
        (["batch.global_size=18", "pretrain.steps=20"], "4 lanes, which go on and do not divide 18; set a multiple of 12"),
        (["batch.global_size=24"], "the stage stands at step 10 and would end at 10; set more"),
        (["pretrain.steps=20"], "the learning rate has decayed to 0 at step 10, with which nothing is learned; set opt"),
        (
            ["pretrain.steps=12", "pretrain.optimizer.warmup_steps=2"],
            "the warm-up of 2 steps after step 10 fills the stage's 12; shorten it",
        ),
    ],
)  # fmt: skip
def test_what_cannot_change_is_refused_with_the_reason(finished: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        extension_of(finished, *settings)
    assert message in str(refused.value)


def test_other_shards_are_refused(finished: Path, shards: Path, tmp_path: Path) -> None:
    other = shutil.copytree(shards, tmp_path / "other")
    index = read_index(other / "train")
    replace(index, shards=(replace(index.shards[0], sha256="0" * 64), *index.shards[1:])).write()
    with pytest.raises(ConfigError, match="index_digests.train: with other training shards the order of the samples"):
        extension_of(finished, *LONGER, f"data.train={other / 'train'}")


def test_nothing_is_changed_while_the_stage_runs_or_has_gone_on_or_has_nothing_to_go_on_from(
    finished: Path, tmp_path: Path
) -> None:
    folder = copied(finished, tmp_path)
    run, recipe = folder / RUN, (folder / RUN / "recipe.yaml").read_text()
    change = extension_of(folder, *LONGER)
    assert change
    with (
        closing(RunFolder(run).lock()),
        pytest.raises(ConfigError, match="the stage is running; stop it first"),
    ):
        extension_of(folder, *LONGER)
    stopped_at(6, run)
    with pytest.raises(ConfigError, match="the stage has gone on meanwhile; repeat the command"):
        change.record("node")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(
        ConfigError, match="the stage has no checkpoint to go on from; remove .* to start it with these"
    ):
        extension_of(folder, *LONGER)
    assert (run / "recipe.yaml").read_text() == recipe
    assert not list(run.glob("result*"))


def test_a_change_back_at_the_same_step_leaves_no_trace_in_the_settings(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    before = load_plain_yaml((folder / RUN / "recipe.yaml").read_bytes(), "")
    for settings in (LONGER, []):
        change = extension_of(folder, *settings)
        assert change
        change.record("node")
    assert load_plain_yaml((folder / RUN / "recipe.yaml").read_bytes(), "") == before


def test_stages_that_began_from_the_result_are_named_before_anything_changes(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    recipe = folder / "recipe.yaml"
    assert coatnet("train", recipe, "finetune", *OLD, "finetune.steps=1").returncode == 0
    before = (folder / RUN / "recipe.yaml").read_text()
    refused = coatnet("run", recipe, *OLD, *LONGER, "finetune.steps=1", "--extend")
    assert refused.returncode == 78
    assert f"{folder / 'runs/test/finetune'} began from the result of pretrain at step 10, and would be stale" in (
        refused.stderr
    )
    assert (folder / RUN / "recipe.yaml").read_text() == before


def test_ranks_started_by_hand_are_told_who_takes_the_word(finished: Path) -> None:
    refused = coatnet("train", finished / "recipe.yaml", "pretrain", *OLD, "--extend", RANK="0", WORLD_SIZE="2")
    assert refused.returncode == 78
    assert "--extend is for the command that starts the ranks, and RANK is set" in refused.stderr


def test_doctor_and_a_dry_run_say_what_would_change_and_change_nothing(finished: Path) -> None:
    recipe, before = finished / "recipe.yaml", (finished / RUN / "recipe.yaml").read_text()
    checked = coatnet("doctor", recipe, *OLD, *LONGER, "--extend", "--stage", "pretrain", "--json")
    said = [finding["what"] for finding in json.loads(checked.stdout) if finding["level"] != "warning"]
    goes_on = "goes on from step 10 to step 20 with other settings: optimizer.warmup_steps: 4 -> 2; steps: 10 -> 20"
    assert f"{finished / RUN}: {goes_on}" in said
    plain = coatnet("doctor", recipe, *OLD, *LONGER, "--stage", "pretrain", "--json")
    assert plain.returncode == 78
    dry = coatnet("submit", recipe, *OLD, *LONGER, "--extend", "--dry-run", "--no-doctor")
    assert f"# pretrain {goes_on}\n" in dry.stdout, dry.stderr
    assert "# pretrain: done\n" not in dry.stdout
    assert (finished / RUN / "recipe.yaml").read_text() == before


def test_submit_records_the_change_unless_a_job_of_the_stage_waits_or_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(finished, tmp_path)
    recipe = folder / "recipe.yaml"
    loaded = load_recipe(recipe, [*OLD, *LONGER])
    jobs, state = submission_folder(loaded), "RUNNING"
    jobs.path.mkdir()
    jobs.add("pretrain", "7", ["sbatch"])
    monkeypatch.setattr(slurm, "jobs", lambda numbers: {number: SlurmJob(number, state) for number in numbers})
    monkeypatch.setattr(slurm, "submit", lambda command, variables: "8")
    with pytest.raises(SystemExit):
        submit(recipe, [*OLD, *LONGER], extend=True, doctor=False)
    assert (folder / RUN / "result.json").exists()
    state = "COMPLETED"
    submit(recipe, [*OLD, *LONGER], extend=True, doctor=False)
    assert jobs.newest()["pretrain"].job == "8"
    assert not (folder / RUN / "result.json").exists()
    assert load_plain_yaml((folder / RUN / "recipe.yaml").read_bytes(), "")["steps"] == 20

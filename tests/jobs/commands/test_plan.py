"""`coatnet plan`: what it says, what it refuses, and the files that it writes beside the recipe."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.files.json_records import to_json
from pipeline.gpu_benchmark.record import VERSION, Device, GpuBenchmark, StepsRun, Work
from tests.support.command import coatnet
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow(seconds=30)

SIZE = ("--samples", "4500", "--classes", "3")


def value(found: Any) -> float:
    """Of a figure with or without a range."""
    return float(found["value"] if isinstance(found, dict) else found)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of shards that do not exist."""
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder, folder / "shards", precision="bf16")


@pytest.fixture(scope="module")
def facts(recipe: Path) -> dict[str, Any]:
    done = coatnet("plan", recipe, *SIZE, "--gpus", "4", "--gpus-per-node", "2", "--price", "2.5", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_figures_of_a_plan_follow_from_each_other(facts: dict[str, Any]) -> None:
    step, cost, checkpoints = facts["step"], facts["cost"], facts["checkpoints"]
    assert (facts["format"], facts["recipe"], facts["stage"]) == ("coatnet-plan", "test", "pretrain")
    assert facts["measured"] is step["measured"] is False
    assert (facts["cluster"]["gpu"], facts["cluster"]["gpus"], facts["cluster"]["nodes"]) == ("H100", 4, 2)
    assert (facts["dataset"]["samples"], facts["dataset"]["classes"], facts["dataset"]["source"]) == (
        4500,
        3,
        "as given",
    )
    seconds = value(step["seconds"])
    assert step["seconds"]["least"] < seconds < step["seconds"]["most"]
    assert value(step["images_per_second"]) == pytest.approx(12 / seconds)
    assert seconds == pytest.approx(value(step["computing"]) + value(step["communication"]["exposed"]))
    assert value(step["utilization"]) == pytest.approx(step["model_flops"] / seconds / step["peak"])
    assert facts["steps"] == 40
    assert value(cost["hours"]) == pytest.approx(40 * seconds / 3600)
    assert value(cost["gpu_hours"]) == pytest.approx(4 * value(cost["hours"]))
    assert value(cost["price"]) == pytest.approx(2.5 * value(cost["gpu_hours"]))
    assert (checkpoints["every_steps"], checkpoints["saves"]) == (5, 8)
    assert checkpoints["kept_bytes"] == checkpoints["kept"] * checkpoints["bytes"]
    assert value(facts["loader"]["images_per_second"]) == pytest.approx(value(step["images_per_second"]) / 2)


def test_memory_is_the_sum_of_its_kinds(facts: dict[str, Any]) -> None:
    for memory in (facts["memory"], *(one["memory"] for one in facts["alternatives"])):
        assert memory["needed"] == sum(memory["kinds"].values())
        assert memory["fits"] == (memory["needed"] <= memory["size"])
        assert memory["size"] == facts["cluster"]["gpu_bytes"]


def test_the_recipes_own_alternative_is_the_plan(facts: dict[str, Any]) -> None:
    (own,) = [one for one in facts["alternatives"] if one["of_the_recipe"]]
    assert own["memory"] == facts["memory"]
    assert own["seconds"] == facts["step"]["seconds"]
    assert len(facts["alternatives"]) == 9


def test_recommended_settings_have_reasons_and_say_what_they_change(facts: dict[str, Any]) -> None:
    recommended = facts["recommended"]
    assert recommended["fits"]
    assert set(recommended["settings"]) == set(recommended["reasons"])
    assert recommended["changes"].items() <= recommended["settings"].items()
    assert recommended["changes"].items() >= {("resources.ranks", 4), ("resources.nodes", 2)}


@pytest.fixture(scope="module")
def shown(recipe: Path) -> str:
    """The tables of another stage, with changed settings."""
    overrides = ("model.drop_path_rate=0", "activation_checkpointing=2")
    done = coatnet("plan", recipe, "finetune", *overrides, *SIZE, "--cores", "1", "--gpu", "a100-80", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stage_is_planned_by_its_name_and_with_changed_settings(shown: str) -> None:
    assert shown.startswith("finetune of test: coatnet_debug at 48 pixels, bf16, ZeRO 1, every 2 blocks recomputed\n")
    assert "on 2 GPUs A100 of 80 GB in 1 node\n" in shown
    assert "4,500 images of 3 classes in 2 shards: as given\n" in shown
    assert "steps                        6 of 12 images" in shown


def test_what_is_not_counted_is_said(shown: str) -> None:
    assert "no step was measured on such a GPU" in shown
    assert "a node has 1 core and its readers keep" in shown
    assert "the host issues kernels more slowly than the GPU runs them" in shown
    assert "evaluations" in shown
    assert "the reserve is an assumption" in shown


def test_a_recipe_of_the_program_is_planned_by_its_name(tmp_path: Path) -> None:
    done = coatnet("plan", "demo", *SIZE, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["recipe"], facts["stage"], facts["cluster"]["gpus"]) == ("demo", "pretrain", 2)
    assert facts["steps"] == 704  # 20 epochs of 35.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "stage evaluate evaluates; name a stage that trains"),
        (["pretrian"], "recipe test has no stage pretrian; its stages are pretrain, finetune, evaluate"),
        (["--gpu", "v100", *SIZE], "GPU v100: not known; use one of GB200, B200, "),
        (["--gpus", "12", *SIZE], "12 GPUs in nodes of 8: the last node would have fewer"),
        (["--gpus", "3", *SIZE], "stage pretrain: 3 ranks do not divide the 4 micro-batches of a step (global_size 12 / micro_size 3); change resources.ranks or batch"),
        (["--samples", "10"], "the number of samples and classes of"),
        (["--samples", "10", "--classes", "3"], "a step takes 12 samples and"),
        (["resolution=33", *SIZE], "33 is no multiple of"),
        (["--failures", "--write", "--price", "2"], "--write, --price: of no effect with --failures; leave out one of them"),
        (["--between-saves"], "--during-save or --between-saves: of no effect without --failures; add that"),
        (["--days", "3", "--node", "1"], "--node, --days: of no effect without --failures; add that"),
        (["--failures", "--rehearse"], "--failures, --rehearse: each shows something else; leave out one of them"),
        (["--rehearse", "--gpu", "h100", "--write"], "--write, --gpu: of no effect with --rehearse; leave out one of them"),
        (["--world", "4"], "--world: of no effect without --rehearse; add that"),
        (["--failures", "--at-step", "41", *SIZE], "--at-step 41: stage pretrain has 40 steps; give one of them"),
        (["--failures", "--node", "1", *SIZE], "node 1: the run has 1, numbered from 0 to 0"),
        (["--tensorboard", *SIZE], "does not exist yet, since stage pretrain has not begun; use --pictures FOLDER"),
    ],
)  # fmt: skip
def test_mistakes_show_before_a_step_is_traced(recipe: Path, arguments: list[str], message: str) -> None:
    done = coatnet("plan", recipe, *arguments)
    assert (done.returncode, done.stdout) == (78, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coatnet-5-in21", "and none of the recipes that come with the program; did you mean coatnet-5-in21k or "),
        ("xyz", "no such file, and none of the recipes that come with the program; `coatnet recipes` lists those"),
        ("none.yaml", "No such file"),
    ],
)
def test_an_unknown_recipe_is_refused(tmp_path: Path, name: str, message: str) -> None:
    done = coatnet("plan", name, folder=tmp_path)
    assert done.returncode == 78
    assert message in done.stderr


def test_a_plan_that_does_not_fit_is_shown_and_exits_with_78(recipe: Path) -> None:
    done = coatnet("plan", recipe, *SIZE, "--gpus", "4", "--gpu", "h100-1")
    assert done.returncode == 78
    assert "error: stage pretrain does not fit: a GPU needs " in done.stderr
    assert "the recipe's, does not fit" in done.stdout
    assert "nothing fits on these GPUs, not even one image" in done.stdout


def test_pictures_are_written_into_a_folder_and_into_tensorboard(recipe: Path, tmp_path: Path) -> None:
    run = recipe.parent / "runs" / "test" / "pretrain"
    run.mkdir(parents=True)
    done = coatnet("plan", recipe, *SIZE, "--pictures", tmp_path / "new", "--tensorboard", "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)  # and nothing else
    names = ["memory.png", "scaling.png", "timeline.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    for name in names:
        with Image.open(tmp_path / "new" / name) as picture:
            assert picture.format == "PNG"
        assert f"wrote {tmp_path / 'new' / name}" in done.stderr
    assert list((run / "plan").glob("events.out.tfevents.*"))
    assert f"TensorBoard shows them as plan/memory, plan/timeline and plan/scaling of {run}" in done.stderr
    run.joinpath("plan").rename(tmp_path / "plan")
    run.rmdir()


STEP = StepsRun(
    losses=(1.0,), fingerprint="", first_step_seconds=1.0, step_milliseconds=50.0, timed_steps=3, images_per_second=120.0,
    peak_bytes=1, optimizer=Work(1.0, 1, 1, 1.0, 1.0),
)  # fmt: skip
BENCH = GpuBenchmark(
    version=VERSION, date="2026-01-02", recipe="test", stage="pretrain", model="coatnet_debug", resolution=32, precision="bf16",
    classes=3, micro_size=3, rounds=2, rounds_of_stage=2,
    device=Device("NVIDIA H200", True, "2.11", "H200"), step=STEP,
    settings={"compile": False, "fused_depthwise": False, "activation_checkpointing": "none", "zero_stage": 1},
)  # fmt: skip


def measured(folder: Path, bench: GpuBenchmark) -> Path:
    path = folder / "bench.json"
    path.write_text(json.dumps(to_json(bench)))
    return path


def test_a_measured_step_replaces_the_estimate_and_names_the_gpu(recipe: Path, tmp_path: Path) -> None:
    """The same two micro-batches on one GPU take as long as they were measured."""
    arguments = (*SIZE, "--gpus", "1", "batch.global_size=6", "batch.micro_size=3", "data.lanes=1", "--json")
    done = coatnet("plan", recipe, *arguments, "--measured", measured(tmp_path, BENCH))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["cluster"]["gpu"], facts["measured"]) == ("H200", True)
    assert facts["step"]["seconds"] == pytest.approx(0.05)
    assert "the time of a step is as measured" in facts["remarks"][0]


def test_a_step_measured_with_other_settings_is_compared_with_the_estimate_for_them(
    recipe: Path, tmp_path: Path
) -> None:
    assert BENCH.settings is not None
    recomputed = replace(BENCH, settings={**BENCH.settings, "activation_checkpointing": "every_block"})
    arguments = (*SIZE, "--gpus", "1", "batch.global_size=6", "batch.micro_size=3", "data.lanes=1", "--json")
    done = coatnet("plan", recipe, *arguments, "--measured", measured(tmp_path, recomputed))
    facts = json.loads(done.stdout)
    assert "the time of a step follows from one with other settings" in facts["remarks"][0]
    seconds = facts["step"]["seconds"]
    assert seconds["value"] < 0.05  # as nothing is recomputed here
    assert seconds["least"] < seconds["value"] < seconds["most"]


def test_measurements_of_another_model_are_none_of_the_step(recipe: Path, tmp_path: Path) -> None:
    done = coatnet("plan", recipe, *SIZE, "--json", "--measured", measured(tmp_path, replace(BENCH, model="coatnet_0")))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["cluster"]["gpu"], facts["measured"]) == ("H200", False)
    assert "has a step of coatnet_0 at 32 pixels in bf16, so the time of this one is an estimate" in facts["remarks"][0]


@pytest.mark.parametrize(
    ("bench", "arguments", "message"),
    [
        (replace(BENCH, device=Device("CPU", False, "2.13")), [], "is of CPU, which is no GPU with a known data sheet"),
        (replace(BENCH, device=Device("NVIDIA T4", True, "2.13")), [], "is of NVIDIA T4, which is no GPU with a known data sheet"),
        (BENCH, ["--gpu", "a100"], "is of NVIDIA H200, and --gpu is A100; leave one out"),
    ],
)  # fmt: skip
def test_measurements_of_other_devices_are_refused(
    recipe: Path, tmp_path: Path, bench: GpuBenchmark, arguments: list[str], message: str
) -> None:
    path = measured(tmp_path, bench)
    done = coatnet("plan", recipe, *SIZE, "--measured", path, *arguments)
    assert (done.returncode, done.stdout) == (78, "")
    assert f"--measured {path}: {message}" in done.stderr


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', "\0"])
def test_damaged_measurements_are_refused(recipe: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    done = coatnet("plan", recipe, *SIZE, "--measured", path)
    assert (done.returncode, done.stdout) == (78, "")
    assert f"error: --measured {path}: " in done.stderr
    assert "it must be a file that `coatnet bench gpu --out` has written" in done.stderr

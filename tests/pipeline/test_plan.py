"""The plan of a stage: steps, warm-up, learning rate, and the checks against its data."""

from pathlib import Path
from shutil import copytree

import pytest

from data.building.build import build_shards
from pipeline.errors import ConfigError
from pipeline.fused_kernels import check_kernel_device
from pipeline.plan import TrainPlan, plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from tests.support.recipes import write_recipe


def plan(folder: Path, shards: Path, *overrides: str, world_size: int | None = None) -> TrainPlan:
    recipe = load_recipe(write_recipe(folder, shards), list(overrides))
    planned = plan_stage(recipe, "pretrain", world_size)
    assert isinstance(planned, TrainPlan)
    return planned


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (2, 8), (0.27, 2), (10, 38)])
def test_epochs_become_steps_rounded_up(shards: Path, tmp_path: Path, epochs: float, steps: int) -> None:
    # 45 samples in batches of 12: 3.75 steps an epoch.
    assert (
        plan(
            tmp_path, shards, "pretrain.steps=null", f"pretrain.epochs={epochs}", "pretrain.optimizer.warmup_steps=0"
        ).steps
        == steps
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pretrain.steps=null", "pretrain.epochs=0.1"],
            "stage pretrain: epochs: 0.1 epochs of 45 samples are 4 samples, less than one step of 12 "
            "(batch.global_size), so 0 complete steps; set epochs to 0.27 or more, or lower batch.global_size",
        ),
        (
            ["batch.global_size=48", "data.lanes=null"],
            "stage pretrain: batch.global_size: a step takes 48 samples and {shards}/train has 45, so a step would "
            "take some of them several times; set it to 45 or less",
        ),
    ],
)
def test_an_epoch_or_a_stage_without_a_complete_step_is_refused(
    shards: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(tmp_path, shards, *overrides)
    assert str(refused.value) == message.format(shards=shards)


def test_softmax_over_one_class_is_refused(pictures: Path, shards: Path, tmp_path: Path) -> None:
    """Its loss is 0 from the first step on."""
    (tmp_path / "map.yaml").write_text("rename: {bright: any, dark: any, striped: any}\n")
    maps = ["data.label_map=map.yaml", "data.validation_label_map=map.yaml"]
    with pytest.raises(ConfigError) as refused:
        plan(tmp_path, shards, *maps)
    assert str(refused.value) == (
        f"stage pretrain: loss.kind: {shards}/train has one class, any, and the softmax over one class is always 1, so "
        "the loss is 0 and nothing is learned; add samples of other classes, or use sigmoid"
    )
    assert plan(tmp_path, shards, *maps, "loss.kind=sigmoid").classes == ("any",)


def test_warm_up_epochs_become_steps_and_the_rate_follows(shards: Path, tmp_path: Path) -> None:
    planned = plan(
        tmp_path, shards, "pretrain.optimizer.warmup_steps=null", "pretrain.optimizer.warmup_epochs=2",
        "pretrain.optimizer.peak_learning_rate=0.8", "pretrain.optimizer.schedule=constant",
    )  # fmt: skip
    assert planned.warmup_steps == 8
    assert [planned.learning_rate(step) for step in (0, 3, 7, 39)] == pytest.approx([0.1, 0.4, 0.8, 0.8])


@pytest.mark.parametrize(
    ("overrides", "saves", "evaluations"),
    [
        ([], 1000, 4),  # a tenth of 40 steps
        (["pretrain.steps=7"], 1000, 1),
        (["pretrain.steps=470", "checkpoint.every_steps=20"], 20, 40),  # right after a save
        (["pretrain.steps=470", "checkpoint.every_steps=90"], 90, 90),
        (["evaluation.every_steps=7", "checkpoint.every_steps=3"], 3, 7),
        (["evaluation.every_epochs=2", "checkpoint.every_epochs=0.5"], 2, 8),  # 3.75 steps an epoch
        (["evaluation.every_epochs=0.01", "checkpoint.every_epochs=4"], 15, 1),
    ],
)
def test_saves_and_evaluations_are_so_many_steps_apart(
    shards: Path, tmp_path: Path, overrides: list[str], saves: int, evaluations: int
) -> None:
    unset = ["pretrain.checkpoint.every_steps=null", "evaluation.every_steps=null"]
    stage = plan(tmp_path, shards, *unset, *overrides).stage
    assert (stage.checkpoint.every_steps, stage.checkpoint.interval) == (saves, saves)
    assert stage.evaluation.every_steps == evaluations
    assert (stage.checkpoint.every_epochs, stage.evaluation.every_epochs) == (None, None)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_that_divide_the_micro_batches_are_accepted(shards: Path, tmp_path: Path, world_size: int) -> None:
    assert plan(tmp_path, shards, world_size=world_size).stage.batch.micro_batches == 4


def test_ranks_that_do_not_divide_the_micro_batches_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 ranks do not divide the 4 micro-batches"):
        plan(tmp_path, shards, world_size=8)


def test_compilation_needs_a_compiler_and_the_headers_of_python(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler and there is none on PATH; install one"):
        plan(tmp_path, shards, "compile=true")
    (tmp_path / "clang").touch(mode=0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: f"{tmp_path}/include")
    with pytest.raises(ConfigError, match=r"needs Python's headers and there is no .*/include/Python\.h; install them"):
        plan(tmp_path, shards, "compile=true")
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    assert plan(tmp_path, shards, "compile=true").stage.compile


FUSED = ["pretrain.fused_depthwise=true", "resources.gpus_per_rank=1"]


def test_the_fused_convolution_needs_gpus_triton_a_compiler_and_such_a_model(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"stage pretrain: fused_depthwise: its kernels run on GPUs.*gpus_per_rank: 0.*leave"
    ):
        plan(tmp_path, shards, FUSED[0], "resources.gpus_per_rank=0")
    with pytest.raises(
        ConfigError, match="fused_depthwise: it is for MBConv blocks with BatchNorm, and coatnet_debug as"
    ):
        plan(tmp_path, shards, *FUSED, "model.convolution_norm=layer")
    monkeypatch.setattr("pipeline.fused_kernels.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match="compiled by Triton, which is not installed here; install a build of torch for GPUs"
    ):
        plan(tmp_path, shards, *FUSED)
    monkeypatch.setattr("pipeline.fused_kernels.find_spec", lambda name: name)
    assert plan(tmp_path, shards, *FUSED).stage.fused_depthwise
    for name, value in (("PATH", str(tmp_path)), ("CC", ""), ("CXX", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=r"fused_depthwise: Triton needs a C\+\+ compiler .* or leave fused_depthwise out"
    ):
        plan(tmp_path, shards, *FUSED)


def test_a_rank_that_finds_no_gpu_refuses_the_fused_convolution(shards: Path, tmp_path: Path) -> None:
    stage = load_recipe(write_recipe(tmp_path, shards), FUSED).stages["pretrain"]
    assert isinstance(stage, TrainStage)
    with pytest.raises(ConfigError, match="stage pretrain: fused_depthwise: .* torch finds none on this machine"):
        check_kernel_device(stage, on_gpu=False, where="stage pretrain: ")
    check_kernel_device(stage, on_gpu=True, where="stage pretrain: ")
    check_kernel_device(stage.model_copy(update={"fused_depthwise": False}), on_gpu=False, where="")


def test_an_unknown_stage_is_refused_by_name(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stage pretran; its stages are pretrain, finetune, evaluate"):
        plan_stage(load_recipe(write_recipe(tmp_path, shards)), "pretran")


def test_training_and_validation_classes_must_agree(pictures: Path, shards: Path, tmp_path: Path) -> None:
    copytree(pictures, tmp_path / "source")
    (tmp_path / "source" / "dark").rename(tmp_path / "source" / "dim")
    build_shards(tmp_path / "source", tmp_path / "other")
    with pytest.raises(
        ConfigError,
        match=r"the classes of .*train and .*other differ \(3 and 3; class 1 is dark in one and dim in the other\)",
    ):
        plan(tmp_path, shards, f"data.validation={tmp_path / 'other'}")


def test_label_maps_unify_the_classes_of_training_and_validation(pictures: Path, shards: Path, tmp_path: Path) -> None:
    """As from ImageNet-21K to 1K: two of three classes stay, under other names."""
    copytree(pictures, tmp_path / "source")
    for old, new in (("bright", "light"), ("striped", "pattern")):
        (tmp_path / "source" / old).rename(tmp_path / "source" / new)
    (tmp_path / "source" / "dark").rename(tmp_path / "elsewhere")
    build_shards(tmp_path / "source", tmp_path / "two")
    (tmp_path / "map.yaml").write_text("rename: {bright: light, striped: pattern}\nothers: drop\n")
    planned = plan(tmp_path, shards, "data.label_map=map.yaml", f"data.validation={tmp_path / 'two'}")
    assert planned.classes == ("light", "pattern")
    assert (planned.train.samples, planned.order.samples, planned.train.index.samples) == (30, 30, 45)


def test_softmax_is_refused_for_samples_with_several_labels(pictures: Path, shards: Path, tmp_path: Path) -> None:
    files = sorted(pictures.rglob("*.jpg"))
    lines = [f"{file}\t{file.parent.name}{' striped' if number % 7 == 0 else ''}" for number, file in enumerate(files)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    build_shards(tmp_path / "list.txt", tmp_path / "several")
    several = [f"data.train={tmp_path / 'several'}", f"data.validation={tmp_path / 'several'}"]
    with pytest.raises(
        ConfigError, match=r"loss.kind: samples of .*several have up to 2 classes, and softmax takes one"
    ):
        plan(tmp_path, shards, *several)
    assert plan(tmp_path, shards, *several, "loss.kind=sigmoid").train.labels_per_sample == 2
    # Where a label map leaves each sample one class, softmax is right again.
    (tmp_path / "map.yaml").write_text("rename: {bright: light, dark: dim}\nothers: drop\n")
    maps = ["data.label_map=map.yaml", "data.validation_label_map=map.yaml"]
    assert plan(tmp_path, shards, *several, *maps).train.labels_per_sample == 1

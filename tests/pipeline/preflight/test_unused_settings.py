"""Settings that were written and have no effect: every row of the table, and every setting of a stage in one of two lists."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from jobs.bundled_recipes import bundled_recipes
from jobs.frozen_recipe import recipe_text
from pipeline.plan import TrainPlan, plan_stage
from pipeline.preflight.finding import Finding
from pipeline.preflight.stage_facts import Facts
from pipeline.preflight.unused_settings import ALWAYS_USED, TABLE, unused_settings, unused_shard_settings
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import EvaluateStage, Recipe, TrainStage
from tests.support.recipes import settings_of, write_recipe

REMOTE = ("data.train=https://example.org/train",)
S3 = ("data.train=s3://bucket/train",)
ATTENTION_ONLY = ("model.name=coatnet_2_vit_rel",)
CONVOLUTION_ONLY = ("model.name=coatnet_2_cccc",)
NO_GPU = ("resources.gpus_per_rank=0",)


class Example(NamedTuple):
    """`written` has no effect with `unused` and `sentence` says so, and has one with `used`."""

    written: str
    unused: Sequence[str]
    sentence: str
    used: Sequence[str] | None = ()
    """None for no way to use it."""
    stage: str = "pretrain"


EVALUATES = "has no effect, since the stage only evaluates"
LOCAL = "has no effect, since the shards and checkpoints of the stage are local"
NO_S3 = "has no effect, since none of the stage's shards and checkpoints are on S3"
UNCACHED = "has no effect, since the shards are local and not cached"
NO_ATTENTION = "has no effect, since the model has no attention"
NO_SLURM = "has no effect without Slurm, as in `coatnet run`"
AT_THE_END = "is longer than the stage's 40 steps, so it saves only at its end"
HALF_A_STEP = "is less than half a step, so it happens after every step"
NO_EPOCHS = ("pretrain.checkpoint.every_steps=null", "evaluation.every_steps=null")
NO_CONTAINER = "has no effect without a container"

EXAMPLES = [
    Example("pretrain.start_weights=raw", (), "has no effect without start_from", None),
    *(
        Example(f"evaluate.{setting}", (), EVALUATES, None, "evaluate")
        for setting in (
            "data.train=other", "data.label_map=map.yaml", "data.lanes=2", "data.shuffle_window=64", "data.crop=whole",
            "data.crop_area=[0.1, 1.0]", "data.flip=false", "data.random_augment={layers: 1, magnitude: 2}",
            "data.color_jitter={hue: 0.1}", "data.random_erasing={probability: 0.2}", "data.excluded_samples=[a.tar/b]",
            "model.drop_path_rate=0.1", "loss.label_smoothing=0.1", "log.every_steps=3", "log.samples=true",
            "log.histograms_every_steps=3",
        )
    ),
    Example("data.crop_area=[0.1, 1.0]", ("data.crop=whole",), "has no effect with data.crop: whole"),
    Example("data.storage.give_up_after=5", (), LOCAL, REMOTE),
    Example("data.storage.endpoint=http://here", REMOTE, NO_S3, S3),
    Example("data.storage.profile=me", REMOTE, NO_S3, S3),
    Example("data.storage.profile=me", (*S3, "data.storage.anonymous=true"), "has no effect with data.storage.anonymous", S3),
    Example("data.storage.anonymous=true", REMOTE, NO_S3, S3),
    Example("data.storage.requester_pays=true", (), NO_S3, ("checkpoint.folder=s3://bucket/checkpoints",)),
    Example("data.storage.shards_elsewhere=true", (), "has no effect, since the indexes of the stage are local", REMOTE),
    Example("data.cache.folder=here", (), UNCACHED, REMOTE),
    Example("data.cache.gigabytes=1", ("checkpoint.folder=s3://bucket/checkpoints",), UNCACHED, S3),
    Example("data.cache.downloads=1", (), UNCACHED, REMOTE),
    Example(
        "data.verify_shards=false", (*REMOTE, "data.validation=s3://bucket/validation"),
        "has no effect, since remote shards are verified as they are downloaded", REMOTE,
    ),
    Example("model.head_size=64", CONVOLUTION_ONLY, NO_ATTENTION, ATTENTION_ONLY),
    Example("model.relative_attention=none", CONVOLUTION_ONLY, NO_ATTENTION),
    Example("model.stride_in=depthwise", ATTENTION_ONLY, "has no effect, since the model has no MBConv"),
    Example(
        "model.convolution_norm=layer", ATTENTION_ONLY,
        "has no effect, since the model has neither MBConv nor a stem of convolutions",
    ),
    Example(
        "model.batch_norm_epsilon=1e-5", ("model.convolution_norm=layer",),
        "has no effect, since the model has no BatchNorm",
    ),
    Example("model.pool=average", ATTENTION_ONLY, "has no effect, since no stage of the model strides"),
    Example(
        "optimizer.minimum_learning_rate=1e-5", ("optimizer.schedule=constant",),
        "has no effect with optimizer.schedule: constant",
    ),
    Example(
        "pretrain.optimizer.warmup_epochs=0.1", ("pretrain.optimizer.warmup_steps=null",),
        "is less than half a step, so there is no warm-up", None,
    ),
    Example(
        "mixup_alpha=0.2", ("batch.micro_size=1",),
        "has no effect with batch.micro_size: 1, since MixUp mixes the images of a micro-batch",
    ),
    Example(
        "cutmix_alpha=0.2", ("batch.micro_size=1",),
        "has no effect with batch.micro_size: 1, since CutMix mixes the images of a micro-batch",
    ),
    Example(
        "pretrain.mixup_alpha=0.2", ("pretrain.cutmix_alpha=1", "pretrain.mixup_switch_probability=1"),
        "has no effect with mixup_switch_probability: 1, since every micro-batch is mixed by CutMix",
    ),
    Example(
        "pretrain.cutmix_alpha=0.2", ("pretrain.mixup_alpha=1", "pretrain.mixup_switch_probability=0"),
        "has no effect with mixup_switch_probability: 0, since every micro-batch is mixed by MixUp",
        ("pretrain.mixup_switch_probability=0",),
    ),
    Example(
        "pretrain.mixup_probability=0.5", (), "has no effect without mixup_alpha or cutmix_alpha",
        ("pretrain.cutmix_alpha=1",),
    ),
    Example(
        "pretrain.mixup_switch_probability=0.3", ("pretrain.cutmix_alpha=1",),
        "has no effect unless both mixup_alpha and cutmix_alpha are set",
        ("pretrain.cutmix_alpha=1", "pretrain.mixup_alpha=1"),
    ),
    Example("pretrain.data.random_erasing.probability=0", (), "erases nothing", None),
    *(
        Example(
            f"pretrain.data.random_erasing.{setting}", ("pretrain.data.random_erasing.probability=0",),
            "has no effect with data.random_erasing.probability: 0", ("pretrain.data.random_erasing.probability=0.1",),
        )
        for setting in ("mode=const", "max_count=2")
    ),
    Example(
        "pretrain.data.color_jitter={brightness: 0}", (), "changes nothing, since all of its amounts are 0", None,
    ),
    *(
        Example(
            f"communication.{setting}", ("precision=bf16", "zero_stage=1"),
            "has no effect with this precision and zero_stage, whose gradients are summed after the backward", used,
        )
        for setting in ("overlap=true", "bucket_size=1000000")
        for used in (("precision=bf16", "zero_stage=2"), ("precision=fp32", "zero_stage=1"))
    ),
    *(
        Example(
            f"communication.{setting}", ("resources.ranks=1", "precision=bf16", "zero_stage=2"),
            "has no effect on one rank", ("precision=bf16", "zero_stage=2"),
        )
        for setting in ("gradients=bf16", "overlap=true", "bucket_size=1000000")
    ),
    Example("zero_stage=2", ("resources.ranks=1",), "shards nothing, since there is one rank"),
    Example("pretrain.checkpoint.every_steps=41", (), AT_THE_END, ("pretrain.steps=41",)),
    Example("pretrain.checkpoint.every_epochs=11", NO_EPOCHS, AT_THE_END, (*NO_EPOCHS, "pretrain.steps=42")),
    Example("pretrain.checkpoint.every_epochs=0.1", NO_EPOCHS, HALF_A_STEP, (*NO_EPOCHS, "batch.global_size=4", "batch.micro_size=2")),
    Example(
        "pretrain.checkpoint.keep_every=8", (),
        "has no effect, since no save before the last is at a multiple of it", ("pretrain.steps=41",),
    ),
    Example(
        "pretrain.checkpoint.keep_best=1", ("evaluation.every_steps=8",),
        "has no effect, since no save before the last is at an evaluation", ("evaluation.every_steps=7",),
    ),
    Example("evaluation.every_steps=41", (), AT_THE_END.replace("saves", "evaluates"), ("pretrain.steps=41",)),
    Example("evaluation.every_epochs=11", NO_EPOCHS, AT_THE_END.replace("saves", "evaluates"), (*NO_EPOCHS, "pretrain.steps=42")),
    Example("evaluation.every_epochs=0.1", NO_EPOCHS, HALF_A_STEP, (*NO_EPOCHS, "batch.global_size=4", "batch.micro_size=2")),
    Example(
        "pretrain.verify.every_steps=5", ("resources.ranks=1",),
        "finds only faults that come and go, since there is one rank, which computes a micro-batch twice",
    ),
    Example(
        "pretrain.verify.every_steps=41", (),
        "is longer than the stage's 40 steps, so only the first step of each start is checked", ("pretrain.steps=41",),
    ),
    Example(
        "pretrain.verify.excluded_nodes=3", (), "has no effect without verify.every_steps",
        ("pretrain.verify.every_steps=5",),
    ),
    Example(
        "log.every_steps=41", (), "is longer than the stage's 40 steps, so it logs only the first and the last one",
        ("pretrain.steps=41",),
    ),
    Example(
        "log.histograms_every_steps=41", (), "is longer than the stage's 40 steps, so there are no histograms",
        ("pretrain.steps=41",),
    ),
    Example(
        "deterministic=false", NO_GPU,
        "has no effect with resources.gpus_per_rank: 0, since all algorithms for CPUs are deterministic",
    ),
    Example("resources.gpu_gigabytes=80", NO_GPU, "has no effect with resources.gpus_per_rank: 0"),
    Example(
        "resources.threads_per_rank=2", (),
        "is for ranks without GPUs, and these have one each (resources.gpus_per_rank)", NO_GPU,
    ),
    Example("resources.container_runtime=apptainer", (), NO_CONTAINER, ("resources.container=image",)),
    Example("resources.container_mounts=[/data]", (), NO_CONTAINER, ("resources.container=image",)),
]  # fmt: skip
SLURM_ONLY = [
    "cpus_per_rank=2", "memory_gigabytes=3", "partition=gpu", "account=me", "qos=high", "constraint=a100",
    "flags=[--exclusive]", "container=image", "container_runtime=apptainer", "container_mounts=[/data]",
]  # fmt: skip


def facts(recipe: Recipe, stage: str, slurm: bool | None = None) -> Facts:
    """With a plan, unless the shards or the model are only names."""
    known = Facts(recipe, stage, None, slurm)
    real = recipe.stages[stage].model.name == "coatnet_debug" and not any("://" in place for place in known.locations)
    plan = plan_stage(recipe, stage, look_at_shards=False) if real and stage != "evaluate" else None
    return replace(known, plan=plan if isinstance(plan, TrainPlan) else None)


def about(findings: list[Finding], setting: str) -> list[str]:
    return [finding.what for finding in findings if finding.what.startswith(f"{setting}: ")]


def name_of(written: str) -> str:
    return written.partition("=")[0].removeprefix("pretrain.").removeprefix("evaluate.")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.written}-{'-'.join(example.unused)}"[:60])
def test_a_setting_without_effect_is_named_and_one_with_an_effect_is_not(
    shards: Path, tmp_path: Path, example: Example
) -> None:
    path = write_recipe(tmp_path, shards)
    recipe = load_recipe(path, [*example.unused, example.written])
    setting = name_of(example.written)
    (what,) = about(unused_settings(facts(recipe, example.stage)), setting)
    assert what.endswith(f" {example.sentence}")
    if example.used is not None:
        recipe = load_recipe(path, [*example.used, example.written])
        assert not about(unused_settings(facts(recipe, example.stage, slurm=True)), setting)


@pytest.mark.parametrize("written", SLURM_ONLY)
def test_settings_of_jobs_are_named_where_there_is_no_slurm(shards: Path, tmp_path: Path, written: str) -> None:
    container = [] if written.startswith("container=") else ["resources.container=image"]
    recipe = load_recipe(write_recipe(tmp_path, shards), [*container, f"resources.{written}"])
    setting = f"resources.{name_of(written)}"
    (what,) = about(unused_settings(facts(recipe, "pretrain", slurm=False)), setting)
    assert what.endswith(NO_SLURM)
    for slurm in (True, None):
        assert not about(unused_settings(facts(recipe, "pretrain", slurm=slurm)), setting)


def test_every_row_of_the_table_has_an_example() -> None:
    tested = {(name_of(example.written), example.sentence.replace("40 steps", "{steps}")) for example in EXAMPLES}
    tested |= {(f"resources.{name_of(written)}", NO_SLURM) for written in SLURM_ONLY}
    assert tested == {(row.setting, row.sentence) for row in TABLE}


def test_every_setting_is_in_the_table_or_always_has_an_effect() -> None:
    rows = {row.setting for row in TABLE}
    every = settings_of(TrainStage) | settings_of(EvaluateStage)
    unclassified = {
        setting
        for setting in every
        if setting not in ALWAYS_USED and not any(setting == row or setting.startswith(f"{row}.") for row in rows)
    }
    assert not unclassified, "give each a row in TABLE, or add it to ALWAYS_USED"
    assert not ALWAYS_USED & rows
    assert every >= ALWAYS_USED


def test_a_setting_that_another_stage_uses_is_none_of_one_that_shares_it(shards: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, shards)
    recipe = load_recipe(
        path, ["pretrain.optimizer.minimum_learning_rate=1e-5", "data.random_augment={layers: 1, magnitude: 2}"]
    )
    assert unused_settings(Facts(recipe, "evaluate")) == []
    everywhere = load_recipe(path, ["optimizer.minimum_learning_rate=1e-5"])
    assert unused_settings(Facts(everywhere, "finetune")) == []
    own = load_recipe(path, ["finetune.optimizer.minimum_learning_rate=1e-5"])
    assert [finding.what for finding in unused_settings(Facts(own, "finetune"))] == [
        "optimizer.minimum_learning_rate: 1e-05 has no effect with optimizer.schedule: constant"
    ]


def test_the_length_of_a_stage_concerns_it_alone(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards), ["checkpoint.every_steps=10"])
    assert not about(unused_settings(facts(recipe, "pretrain")), "checkpoint.every_steps")
    assert about(unused_settings(facts(recipe, "finetune")), "checkpoint.every_steps") == [
        "checkpoint.every_steps: 10 is longer than the stage's 6 steps, so it saves only at its end"
    ]


def test_a_frozen_recipe_names_what_was_written_and_no_defaults(shards: Path, tmp_path: Path) -> None:
    overrides = ["data.crop=whole", "resources.gpus_per_rank=0"]
    recipe = load_recipe(write_recipe(tmp_path, shards), overrides)
    (tmp_path / "frozen.yaml").write_text(recipe_text(recipe))
    frozen = load_recipe(tmp_path / "frozen.yaml")
    assert yaml.safe_load(recipe_text(frozen))["stages"]["pretrain"]["resources"]["gpu_gigabytes"] == 80
    for stage in ("pretrain", "finetune"):
        assert [finding.what for finding in unused_settings(Facts(frozen, stage))] == [
            "data.crop_area: [0.5, 1.0] has no effect with data.crop: whole"
        ]


def test_the_bundled_recipes_have_no_settings_without_effect() -> None:
    for recipe in map(load_recipe, bundled_recipes().values()):
        for stage in recipe.stages:
            assert unused_settings(Facts(recipe, stage, slurm=True)) == []
        assert unused_shard_settings(recipe, slurm=True) == []


def test_shards_that_no_stage_reads_and_settings_of_their_jobs_are_named(shards: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, shards)
    section = [f"shards={{source: images, folder: {shards}, parts: 2, resources: {{partition: cpu}}}}"]
    assert unused_shard_settings(load_recipe(path, section), slurm=True) == []
    assert [finding.what for finding in unused_shard_settings(load_recipe(path, section), slurm=False)] == [
        f"shards.parts: 2 {NO_SLURM}", f"shards.resources.partition: cpu {NO_SLURM}",
    ]  # fmt: skip
    (unread,) = unused_shard_settings(load_recipe(path, ["shards={source: images, folder: other}"]), slurm=True)
    assert (unread.level, unread.what) == ("warning", f"shards: no stage reads from {tmp_path}/other")
    assert unused_shard_settings(load_recipe(path), slurm=True) == []

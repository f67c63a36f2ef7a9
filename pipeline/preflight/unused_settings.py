"""Settings that are written in a recipe and have no effect there, or another one than they seem to have: one table.

Only what a person wrote counts. A setting that several stages have in common, as from `defaults`, counts as used if one
of them uses it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from data.remote.storage import is_remote
from data.text.counted import counted
from pipeline.preflight.finding import Finding, Level
from pipeline.preflight.stage_facts import (
    Facts,
    any_remote,
    below_a_step,
    exceeds_stage,
    has_both_mixings,
    is_constant,
    is_mixed,
    keeps_no_best,
    keeps_none,
    lacks_blocks,
    only_evaluates,
    shards_on_one_rank,
    switch_probability,
)
from pipeline.recipe.schema import Recipe, sums_after_backward
from pipeline.recipe.section import Section


class Row(NamedTuple):
    """A setting of a stage, when it has no effect, and a sentence that goes on after its name and value.

    `level` is `ok` where that may well be intended.
    """

    setting: str
    unused: Callable[[Facts], bool]
    sentence: str
    level: Level = "warning"


_ONLY_EVALUATES = "has no effect, since the stage only evaluates"
_NOT_ON_S3 = "has no effect, since none of the stage's shards and checkpoints are on S3"
_NO_CACHE = "has no effect, since the shards are local and not cached"
_NO_ATTENTION = "has no effect, since the model has no attention"
_WITHOUT_SLURM = "has no effect without Slurm, as in `coatnet run`"
_LONGER = "is longer than the stage's {steps}"
_EVERY_STEP = "is less than half a step, so it happens after every step"

TABLE: tuple[Row, ...] = (
    Row("start_weights", lambda f: f.stage.start_from is None, "has no effect without start_from"),
    *(
        Row(setting, only_evaluates, _ONLY_EVALUATES)
        for setting in (
            "data.train", "data.label_map", "data.lanes", "data.shuffle_window", "data.crop", "data.crop_area",
            "data.flip", "data.random_augment", "data.color_jitter", "data.random_erasing", "data.excluded_samples",
            "model.drop_path_rate", "loss.label_smoothing", "log.every_steps", "log.samples",
            "log.histograms_every_steps",
        )
    ),
    Row("data.crop_area", lambda f: f.stage.data.crop == "whole", "has no effect with data.crop: whole"),
    Row(
        "data.storage.give_up_after", lambda f: not any_remote(f.locations),
        "has no effect, since the shards and checkpoints of the stage are local",
    ),
    *(
        Row(f"data.storage.{setting}", lambda f: not any_remote(f.locations, "s3"), _NOT_ON_S3)
        for setting in ("endpoint", "profile", "anonymous", "requester_pays")
    ),
    Row(
        "data.storage.shards_elsewhere", lambda f: not any_remote(f.shards),
        "has no effect, since the indexes of the stage are local",
    ),
    Row(
        "data.storage.profile", lambda f: f.stage.data.storage.anonymous, "has no effect with data.storage.anonymous",
    ),
    *(
        Row(f"data.cache.{setting}", lambda f: not any_remote(f.shards), _NO_CACHE)
        for setting in ("folder", "gigabytes", "downloads")
    ),
    Row(
        "data.verify_shards", lambda f: all(is_remote(folder) for folder in f.shards),
        "has no effect, since remote shards are verified as they are downloaded",
    ),
    Row("model.head_size", lacks_blocks("transformer"), _NO_ATTENTION),
    Row("model.relative_attention", lacks_blocks("transformer"), _NO_ATTENTION),
    Row(
        "model.batch_norm_epsilon",
        lambda f: f.variant is not None
        and (f.variant.convolution_norm == "layer" or (lacks_blocks("mbconv")(f) and f.variant.stem == "patches")),
        "has no effect, since the model has no BatchNorm",
    ),
    Row("model.stride_in", lacks_blocks("mbconv"), "has no effect, since the model has no MBConv"),
    Row(
        "model.convolution_norm",
        lambda f: lacks_blocks("mbconv")(f) and f.variant is not None and f.variant.stem == "patches",
        "has no effect, since the model has neither MBConv nor a stem of convolutions",
    ),
    Row(
        "model.pool", lambda f: f.variant is not None and all(stage.stride == 1 for stage in f.variant.stages),
        "has no effect, since no stage of the model strides",
    ),
    *(
        Row(
            f"communication.{setting}",
            lambda f: f.training is not None
            and sums_after_backward(f.training.precision, f.training.zero_stage),
            "has no effect with this precision and zero_stage, whose gradients are summed after the backward",
        )
        for setting in ("overlap", "bucket_size")
    ),
    *(
        Row(
            f"communication.{setting}", lambda f: f.stage.resources.ranks == 1, "has no effect on one rank", "ok",
        )
        for setting in ("gradients", "overlap", "bucket_size")
    ),
    Row(
        "optimizer.minimum_learning_rate",
        lambda f: f.training is not None and is_constant(f.training.optimizer),
        "has no effect with optimizer.schedule: constant",
    ),
    Row(
        "optimizer.warmup_epochs",
        lambda f: f.plan is not None and bool(f.plan.stage.optimizer.warmup_epochs) and not f.plan.warmup_steps,
        "is less than half a step, so there is no warm-up",
    ),
    Row(
        "mixup_alpha", lambda f: getattr(f.stage, "mixup_alpha", 0) > 0 and f.stage.batch.micro_size == 1,
        "has no effect with batch.micro_size: 1, since MixUp mixes the images of a micro-batch",
    ),
    Row(
        "cutmix_alpha", lambda f: getattr(f.stage, "cutmix_alpha", 0) > 0 and f.stage.batch.micro_size == 1,
        "has no effect with batch.micro_size: 1, since CutMix mixes the images of a micro-batch",
    ),
    Row(
        "mixup_alpha", lambda f: has_both_mixings(f) and switch_probability(f) == 1,
        "has no effect with mixup_switch_probability: 1, since every micro-batch is mixed by CutMix",
    ),
    Row(
        "cutmix_alpha", lambda f: has_both_mixings(f) and switch_probability(f) == 0,
        "has no effect with mixup_switch_probability: 0, since every micro-batch is mixed by MixUp",
    ),
    Row(
        "mixup_probability", lambda f: f.training is not None and not is_mixed(f.training),
        "has no effect without mixup_alpha or cutmix_alpha",
    ),
    Row(
        "mixup_switch_probability", lambda f: f.training is not None and not has_both_mixings(f),
        "has no effect unless both mixup_alpha and cutmix_alpha are set",
    ),
    *(
        Row(
            f"data.random_erasing.{setting}",
            lambda f: f.stage.data.random_erasing is not None and f.stage.data.random_erasing.probability == 0,
            sentence,
        )
        for setting, sentence in (
            ("probability", "erases nothing"),
            ("mode", "has no effect with data.random_erasing.probability: 0"),
            ("max_count", "has no effect with data.random_erasing.probability: 0"),
        )
    ),
    Row(
        "data.color_jitter",
        lambda f: f.stage.data.color_jitter is not None and not any(f.stage.data.color_jitter.model_dump().values()),
        "changes nothing, since all of its amounts are 0",
    ),
    Row("zero_stage", shards_on_one_rank, "shards nothing, since there is one rank"),
    *(
        Row(f"checkpoint.{setting}", exceeds_stage("checkpoint"), f"{_LONGER}, so it saves only at its end")
        for setting in ("every_steps", "every_epochs")
    ),
    Row("checkpoint.every_epochs", below_a_step("checkpoint"), _EVERY_STEP),
    Row("checkpoint.keep_every", keeps_none, "has no effect, since no save before the last is at a multiple of it"),
    Row("checkpoint.keep_best", keeps_no_best, "has no effect, since no save before the last is at an evaluation"),
    *(
        Row(f"evaluation.{setting}", exceeds_stage("evaluation"), f"{_LONGER}, so it evaluates only at its end", "ok")
        for setting in ("every_steps", "every_epochs")
    ),
    Row("evaluation.every_epochs", below_a_step("evaluation"), _EVERY_STEP),
    Row(
        "verify.every_steps", lambda f: f.stage.resources.ranks == 1,
        "finds only faults that come and go, since there is one rank, which computes a micro-batch twice", "ok",
    ),
    Row(
        "verify.every_steps", exceeds_stage("verify"), f"{_LONGER}, so only the first step of each start is checked",
        "ok",
    ),
    Row(
        "verify.excluded_nodes", lambda f: f.training is not None and f.training.verify.every_steps is None,
        "has no effect without verify.every_steps",
    ),
    Row("log.every_steps", exceeds_stage("log"), f"{_LONGER}, so it logs only the first and the last one"),
    Row(
        "log.histograms_every_steps", exceeds_stage("log", "histograms_every_steps"),
        f"{_LONGER}, so there are no histograms",
    ),
    Row(
        "deterministic", lambda f: f.stage.resources.gpus_per_rank == 0,
        "has no effect with resources.gpus_per_rank: 0, since all algorithms for CPUs are deterministic",
    ),
    Row(
        "resources.gpu_gigabytes", lambda f: f.stage.resources.gpus_per_rank == 0,
        "has no effect with resources.gpus_per_rank: 0",
    ),
    Row(
        "resources.threads_per_rank", lambda f: f.stage.resources.gpus_per_rank > 0,
        "is for ranks without GPUs, and these have one each (resources.gpus_per_rank)",
    ),
    *(
        Row(f"resources.{setting}", lambda f: f.stage.resources.container is None, "has no effect without a container")
        for setting in ("container_runtime", "container_mounts")
    ),
    *(
        Row(f"resources.{setting}", lambda f: f.slurm is False, _WITHOUT_SLURM, "ok")
        for setting in (
            "cpus_per_rank", "memory_gigabytes", "partition", "account", "qos", "constraint", "flags", "container",
            "container_runtime", "container_mounts",
        )
    ),
)  # fmt: skip
"""By the setting's key in a stage; of several rows of a setting the first that applies counts."""

ALWAYS_USED = frozenset({
    "task", "start_from", "resolution", "epochs", "steps", "precision", "ema_decay", "activation_checkpointing",
    "compile", "fused_depthwise", "data.validation", "data.validation_label_map", "data.evaluation_crop",
    "data.skipped_share", "data.skipped_run", "data.workers", "model.name",
    "model.head_hidden_layer", "model.gelu", "model.layer_norm_epsilon", "model.depths", "model.widths",
    "batch.global_size", "batch.micro_size",
    "optimizer.peak_learning_rate", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.weight_decay",
    "optimizer.betas", "optimizer.eps", "optimizer.gradient_clip", "optimizer.layer_decay", "loss.kind",
    "checkpoint.keep_last", "checkpoint.folder", "checkpoint.grace_seconds", "evaluation.weights",
    "non_finite.in_a_row", "non_finite.roll_backs", "watchdog.setup_seconds", "watchdog.least_seconds",
    "watchdog.factor", "resources.nodes", "resources.ranks",
    "resources.gpus_per_rank", "resources.time_limit",
})  # fmt: skip
"""Settings of a stage that need no row; those that contradict others are refused elsewhere."""


def unused_settings(facts: Facts) -> list[Finding]:
    """A finding for each setting of the stage that was written and has no effect."""
    found: dict[str, Finding] = {}
    for row in TABLE:
        value = _written(facts.stage, row.setting)
        if value is None or row.setting in found or not row.unused(facts):
            continue
        # What follows from the length of a stage concerns each by itself.
        if row.unused(replace(facts, plan=None)) and _is_used_elsewhere(row.setting, value, facts):
            continue
        steps = counted(facts.plan.steps, "step") if facts.plan else ""
        what = f"{row.setting}: {_shown(value)} {row.sentence.format(steps=steps)}"
        found[row.setting] = Finding(
            row.level, facts.name, what, "" if row.level == "ok" else "change it, or leave it out"
        )
    return list(found.values())


def unused_shard_settings(recipe: Recipe, *, slurm: bool) -> list[Finding]:
    """The same for the section `shards` of a recipe."""
    shards = recipe.shards
    if shards is None:
        return []
    found = []
    folders = [folder for stage in recipe.stages.values() for folder in (stage.data.train, stage.data.validation)]
    if not any(folder is not None and _is_below(folder, shards.folder) for folder in folders):
        what = f"shards: no stage reads from {shards.folder}"
        found.append(Finding("warning", "shards", what, "correct data.train and data.validation, or leave shards out"))
    for setting in ("parts", *(f"resources.{name}" for name in type(shards.resources).model_fields)):
        value = _written(shards, setting)
        if value is not None and not slurm:
            found.append(Finding("ok", "shards", f"shards.{setting}: {_shown(value)} {_WITHOUT_SLURM}"))
    return found


def _is_below(folder: str, parent: str) -> bool:
    return folder == parent or folder.startswith(f"{parent.rstrip('/')}/")


def _is_used_elsewhere(setting: str, value: Any, facts: Facts) -> bool:
    others = [Facts(facts.recipe, name, None, facts.slurm) for name in facts.recipe.stages if name != facts.name]
    rows = [row for row in TABLE if row.setting == setting]
    return any(
        _written(other.stage, setting) == value and not any(row.unused(other) for row in rows) for other in others
    )


def _written(section: Section, setting: str) -> Any:
    """The value of a setting that somebody wrote; None if nobody did, or wrote null.

    In a section with every setting, as in a frozen recipe, those at their defaults count as not written.
    """
    name, _, rest = setting.partition(".")
    if name not in section.model_fields_set:
        return None
    value = getattr(section, name)
    if rest:
        return _written(value, rest) if isinstance(value, Section) else None
    fields = type(section).model_fields
    # Without those that a frozen recipe leaves out at their defaults.
    everything = section.model_fields_set >= {name for name, field in fields.items() if field.exclude_if is None}
    return None if everything and value == fields[name].get_default(call_default_factory=True) else value


def _shown(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)

"""What TensorBoard shows of a stage besides its curves: their layout, the recipe as text, settings beside results."""

import math

import yaml
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    STATUS_SUCCESS,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.util.tensor_util import make_tensor_proto

from data.remote.web_address import without_secrets
from pipeline.plan import Plan, TrainPlan
from pipeline.runs.announcements import ChangedSettings

# Regular expressions of tags, by chart, by category; the first category is the one that is expanded.
_LAYOUT: dict[str, dict[str, list[str]]] = {
    "what matters": {
        "loss": ["train/loss$", "validation/loss$"],
        "accuracy": ["validation/(top1|top5|precision_at_1)$"],
        "norm of the gradient": ["train/gradient_norm$"],
        "last update / weights, by stage of the model": ["update_ratio/(?!all)"],
        "learning rate": ["train/learning_rate$"],
        "images per second": ["train/images_per_second$"],
    },
    "speed": {
        "share of the GPUs' peak (MFU)": ["train/mfu$"],
        "share of time waiting for data": ["wall_time/data_wait_share$"],
        "seconds of a step: 50, 90, 99 %": ["wall_time/step_"],
        "seconds of a step waiting for data: largest and median rank": ["wall_time_of_ranks/data_wait_.*_seconds$"],
        "seconds of a step in the forward: largest and median rank": ["wall_time_of_ranks/forward_.*_seconds$"],
        "slowest rank": ["wall_time_of_ranks/.*_slowest_rank$"],
    },
    "checkpoints, memory, trouble": {
        "seconds of a save: training paused, writing": ["wall_time/checkpoint_"],
        "GB on the device": ["usage/device_"],
        "GB on the host, this rank": ["usage/host_"],
        "samples skipped": ["train/skipped_samples$"],
        "steps not applied": ["train/steps_not_applied$"],
        "cross-checks: seconds, share of the step": ["verify/(seconds|share_of_step)$"],
        "cross-checks passed in this start": ["verify/passed$"],
        "samples seen": ["train/samples$"],
    },
    "weights": {
        "norm of the weights, by stage of the model": ["weight_norm/(?!all)"],
        "norm of all weights": ["weight_norm/all$"],
        "last update / weights, all": ["update_ratio/all$"],
    },
}

# Columns of the HPARAMS tab, the same for every stage: TensorBoard takes them from any one of the runs that it shows.
_NUMBERS = (
    "resolution", "steps", "global_size", "micro_size", "peak_learning_rate", "warmup_steps", "weight_decay",
    "layer_decay", "drop_path_rate", "label_smoothing", "mixup_alpha", "cutmix_alpha", "ema_decay", "seed",
)  # fmt: skip
_SHOWN_AT_FIRST = (
    "model",
    "resolution",
    "steps",
    "global_size",
    "peak_learning_rate",
)  # the columns that are shown at first
_TEXTS = ("stage", "model", "precision", "schedule", "loss", "random_augment", "color_jitter", "random_erasing")
_RESULTS = {
    "validation/top1": "top-1",
    "validation/precision_at_1": "precision@1",
    "validation/top5": "top-5",
    "validation/loss": "validation loss",
}


def layout() -> Summary:
    """The charts of the CUSTOM SCALARS tab."""
    categories = [
        Category(
            title=category,
            closed=number > 0,
            chart=[Chart(title=title, multiline=MultilineChartContent(tag=tags)) for title, tags in charts.items()],
        )
        for number, (category, charts) in enumerate(_LAYOUT.items())
    ]
    return Summary(
        value=[
            Summary.Value(
                tag=layout_metadata.CONFIG_SUMMARY_TAG,
                tensor=make_tensor_proto(Layout(category=categories).SerializeToString()),
                metadata=layout_metadata.create_summary_metadata(),
            )
        ]
    )


def recipe_text(plan: Plan) -> Summary:
    """The complete settings of the stage, as YAML."""
    settings = {"stage": plan.name, "seed": plan.seed, **plan.stage.model_dump(mode="json")}
    # A code block by indentation instead of a fence: nothing in a value can end it.
    # Long values are not folded, in which a signature would not be found.
    text = without_secrets(yaml.safe_dump(settings, sort_keys=False, width=math.inf))
    lines = text.splitlines()
    return text_pb("recipe", "\n".join(f"    {line}" for line in lines))


def change_text(change: ChangedSettings) -> Summary:
    """Marks the place where the settings of a stage were changed while it was under way, in the TEXT tab."""
    lines = [f"    {without_secrets(line)}" for line in change.changed]
    return text_pb("changes", "\n".join([f"Settings from step {change.step + 1:,} on:", "", *lines]))


def settings_of_stage(plan: Plan) -> Summary:
    """The most important settings, for the HPARAMS tab; its result columns are the last points of `validation/...`."""
    start = SessionStartInfo()
    for name, value in _settings(plan).items():
        if isinstance(value, str):
            start.hparams[name].string_value = value
        elif value is not None:
            start.hparams[name].number_value = value
    types = dict.fromkeys(_TEXTS, DATA_TYPE_STRING) | dict.fromkeys(_NUMBERS, DATA_TYPE_FLOAT64)
    infos = [HParamInfo(name=name, type=kind, differs=name in _SHOWN_AT_FIRST) for name, kind in types.items()]
    metrics = [
        MetricInfo(name=MetricName(group="validation", tag=tag), display_name=shown) for tag, shown in _RESULTS.items()
    ]  # the group is the folder of their event files
    experiment = HParamsPluginData(experiment=Experiment(hparam_infos=infos, metric_infos=metrics))
    return Summary(
        value=[
            _hparams(hparams_metadata.EXPERIMENT_TAG, experiment),
            _hparams(hparams_metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start)),
        ]
    )


def end_of_stage() -> Summary:
    """Marks the stage as done in the HPARAMS tab."""
    end = HParamsPluginData(session_end_info=SessionEndInfo(status=STATUS_SUCCESS))
    return Summary(value=[_hparams(hparams_metadata.SESSION_END_INFO_TAG, end)])


def scalars(values: dict[str, float]) -> Summary:
    """One point of each curve, by tag."""
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def _settings(plan: Plan) -> dict[str, float | str | None]:
    """The columns that this stage has a value for."""
    stage = plan.stage
    values: dict[str, float | str | None] = {
        "stage": plan.name,
        "model": stage.model.name,
        "precision": stage.precision,
        "resolution": stage.resolution,
        "loss": stage.loss.kind,
        "seed": plan.seed,
        "micro_size": stage.batch.micro_size,
    }
    if isinstance(plan, TrainPlan):
        data = plan.stage.data
        augment, jitter, erasing = data.random_augment, data.color_jitter, data.random_erasing
        optimizer = plan.stage.optimizer
        values |= {
            "peak_learning_rate": optimizer.peak_learning_rate,
            "schedule": optimizer.schedule,
            "weight_decay": optimizer.weight_decay,
            "layer_decay": optimizer.layer_decay,
            "steps": plan.steps,
            "warmup_steps": plan.warmup_steps,
            "global_size": plan.stage.batch.global_size,
            "drop_path_rate": plan.stage.model.drop_path_rate,
            "label_smoothing": plan.stage.loss.label_smoothing,
            "mixup_alpha": plan.stage.mixup_alpha,
            "cutmix_alpha": plan.stage.cutmix_alpha,
            "ema_decay": plan.stage.ema_decay,
            "random_augment": f"{augment.layers} x {augment.magnitude:g}, {augment.operations}" if augment else None,
            "color_jitter": " ".join(f"{name} {amount:g}" for name, amount in jitter if amount) if jitter else None,
            "random_erasing": f"{erasing.probability:g}, {erasing.mode}" if erasing else None,
        }
    return values


def _hparams(tag: str, content: HParamsPluginData) -> Summary.Value:
    return Summary.Value(
        tag=tag, tensor=hparams_metadata.NULL_TENSOR, metadata=hparams_metadata.create_summary_metadata(content)
    )

"""Which settings of a training stage `--extend` may change while it is under way, and why the others are fixed."""

_ORDER = "the order of the samples could not go on from where it is"
_BEGUN = "the stage has begun from its weights"
_NEW_STAGE = "add a stage with start_from"

EXTENDABLE = frozenset({
    "epochs", "steps", "batch.global_size", "optimizer", "mixup_alpha", "ema_decay", "precision",
    "loss.label_smoothing", "model.drop_path_rate", "data.crop", "data.crop_area", "data.flip", "data.random_augment",
    "data.random_erasing", "data.color_jitter", "data.excluded_samples", "cutmix_alpha", "mixup_probability",
    "mixup_switch_probability",
})  # fmt: skip
"""Settings, and sections, that may be other ones from a step on."""

FIXED = {
    "seed": f"with another one {_ORDER}",
    "task": "training and evaluating are different stages",
    "start_from": _BEGUN,
    "start_weights": _BEGUN,
    "start_digest": "the stage that it starts from has another result now",
    "resolution": f"the tables of relative positions have its size; {_NEW_STAGE}",
    "model": f"its weights would not fit another architecture; {_NEW_STAGE}",
    "batch.micro_size": "BatchNorm and MixUp are defined on micro-batches of one size; change batch.global_size",
    "loss.kind": f"the classifier is trained for it; {_NEW_STAGE}",
    "data.lanes": f"with others {_ORDER}",
    "data.shuffle_window": f"with another one {_ORDER}",
    "data.evaluation_crop": "accuracies before and after could not be compared; add a stage with task: evaluate",
    "index_digests.train": f"with other training shards {_ORDER}; {_NEW_STAGE}",
    "index_digests.validation": "accuracies before and after could not be compared; add a stage with task: evaluate",
}
"""Settings, sections and facts that may not, and why."""


def why_fixed(key: str) -> str | None:
    """Why a setting, by its dotted key, may not change while the stage is under way; None if it may."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):  # the longest name counts
        name = ".".join(parts[:count])
        if name in EXTENDABLE:
            return None
        if name in FIXED:
            return f"{name}: {FIXED[name]}"
    return f"{key}: it is not known to be one that a stage under way can do without"

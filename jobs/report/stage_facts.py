"""The most important settings of a stage, where it ran and for how long, as names and values."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from data.text.counted import counted
from jobs.report.content import StageContent
from jobs.scheduler.stage_status import duration
from pipeline.runs.event_log import Event, RunEvent

Facts = list[tuple[str, str]]


def clock_time(entry: RunEvent) -> str:
    """When an event was, in the zone of the machine that recorded it."""
    return datetime.fromisoformat(entry.time).strftime("%Y-%m-%d %H:%M:%S")


def recipe_facts(stage: StageContent) -> Facts:
    """What was trained or evaluated, and how; settings that are not known are left out."""
    setting = stage.setting
    optimizer = setting("optimizer") if isinstance(setting("optimizer"), dict) else {}
    batch, micro = setting("batch", "global_size"), setting("batch", "micro_size")
    rows: list[tuple[str, Any]] = [
        ("model", setting("model", "name")),
        ("image size", _with_unit(setting("resolution"), "pixels")),
        ("starts from", setting("start_from")),
        ("precision", setting("precision")),
        ("loss", setting("loss", "kind")),
        ("training shards", setting("data", "train") if stage.trains else None),
        ("validation shards", setting("data", "validation")),
    ]
    if stage.trains:
        rows += [
            ("length", _length(stage)),
            ("batch", f"{batch}, in micro-batches of {micro}" if batch else None),
            ("learning rate", _learning_rate(optimizer)),
            ("weight decay", optimizer.get("weight_decay")),
            ("augmentation", _augmentation(stage)),
            ("stochastic depth", setting("model", "drop_path_rate")),
            ("label smoothing", setting("loss", "label_smoothing")),
            ("moving average of weights", setting("ema_decay")),
            ("seed", stage.seed),
        ]
    return _known(rows)


def machine_facts(stage: StageContent) -> Facts:
    """Where and on what it ran, and how long it took."""
    begins = [entry for entry in stage.entries if entry.event is Event.BEGIN]
    if not begins:
        return []
    nodes = list(dict.fromkeys(str(entry.facts.get("node")) for entry in begins if entry.facts.get("node")))
    shown = ", ".join(nodes[:6]) + (f" and {len(nodes) - 6:,} more" if len(nodes) > 6 else "")
    ranks = list(dict.fromkeys(str(entry.facts.get("ranks")) for entry in begins))
    last = stage.entries[-1]
    rows: list[tuple[str, Any]] = [
        ("ranks", " then ".join(ranks[:8]) + (" ..." if len(ranks) > 8 else "")),
        ("node of the leader", shown),
        ("GPUs per rank", stage.setting("resources", "gpus_per_rank")),
        *stage.computed_with.items(),
        ("first start", clock_time(begins[0])),
        ("last event", clock_time(last)),
        ("from the first to the last", duration(last.seconds - begins[0].seconds)),
        ("starts", f"{len(begins):,}"),
    ]
    return _known(rows)


def _known(rows: Iterable[tuple[str, Any]]) -> Facts:
    return [(name, str(value)) for name, value in rows if value is not None and value != ""]


def _with_unit(value: Any, unit: str) -> str | None:
    return None if value is None else f"{value} {unit}"


def _length(stage: StageContent) -> str | None:
    steps, epochs = stage.status.steps or stage.setting("steps"), stage.setting("epochs")
    parts = [counted(steps, "step")] if isinstance(steps, int) else []
    return ", ".join([*parts, *([f"{epochs} epochs"] if epochs is not None else [])]) or None


def _learning_rate(optimizer: dict[str, Any]) -> str | None:
    if "peak_learning_rate" not in optimizer:
        return None
    warmup = [
        f"warm-up of {optimizer[f'warmup_{unit}']} {unit}"
        for unit in ("steps", "epochs")
        if optimizer.get(f"warmup_{unit}")
    ]
    return ", ".join([f"{optimizer['peak_learning_rate']}", str(optimizer.get("schedule")), *warmup])


def _augmentation(stage: StageContent) -> str:
    parts = [f"crop {stage.setting('data', 'crop')}"]
    if stage.setting("data", "flip"):
        parts.append("flip")
    for name in ("random_augment", "color_jitter", "random_erasing"):
        found = stage.setting("data", name)
        if isinstance(found, dict):
            parts.append(f"{name.replace('_', ' ')} ({', '.join(f'{key} {value}' for key, value in found.items())})")
    for name, shown in (("mixup_alpha", "MixUp"), ("cutmix_alpha", "CutMix")):
        if stage.setting(name):
            parts.append(f"{shown} {stage.setting(name)}")
    return ", ".join(parts)

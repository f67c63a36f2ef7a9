"""Which checkpoints are kept, and why. Needs no torch."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipeline.checkpoints.manifest import missing_or_cut, read_manifest
from pipeline.checkpoints.store import CheckpointStore
from pipeline.errors import ConfigError
from pipeline.recipe.sections import CheckpointSettings


def reasons_to_keep(
    steps: Iterable[int], settings: CheckpointSettings, top1: Mapping[int, float]
) -> dict[int, list[str]]:
    """Why each of the whole checkpoints of `steps` is kept, newest first; no reasons where it is not.

    `top1` is the accuracy after a step, of those that were evaluated. Of equal ones the later is better.
    """
    newest_first = sorted(steps, reverse=True)
    evaluated = [step for step in newest_first if step in top1]
    best = sorted(evaluated, key=lambda step: (top1[step], step), reverse=True)[: settings.keep_best]
    reasons: dict[int, list[str]] = {}
    for place, step in enumerate(newest_first):
        reasons[step] = []
        if place < settings.keep_last:
            reasons[step].append("newest" if place == 0 else f"last {settings.keep_last}")
        if settings.keep_every and step % settings.keep_every == 0:
            reasons[step].append(f"every {settings.keep_every:,}")
        if step in best:
            reasons[step].append("best" if settings.keep_best == 1 else f"best {settings.keep_best}")
    return reasons


def accuracies(events: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Step -> top-1 of the evaluations in an event log; the last one counts."""
    return {entry["step"]: entry["top1"] for entry in events if entry.get("event") == "evaluation" and "top1" in entry}


def prune(
    place: CheckpointStore, settings: CheckpointSettings, top1: Mapping[int, float], moved: Callable[[], None]
) -> list[int]:
    """Remove the checkpoints that nothing keeps; returns their steps.

    Damaged ones, as far as manifests and sizes tell, count nowhere and are left for a person to look at.

    Raises:
        OSError, StorageDown, StorageRefused: the place fails.
    """
    published = place.contents().published
    if len(published) <= settings.keep_last:
        return []
    whole = []
    for step, sizes in published.items():
        try:
            if missing_or_cut(read_manifest(place.at(step), place.storage), sizes) is None:
                whole.append(step)
        except ConfigError:
            continue
        moved()
    removed = [step for step, reasons in reasons_to_keep(whole, settings, top1).items() if not reasons]
    for step in removed:
        place.remove(step, moved)
    return removed

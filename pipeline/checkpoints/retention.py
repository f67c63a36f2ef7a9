"""Which checkpoints are kept, and why. Needs no torch."""

from collections.abc import Callable, Iterable, Mapping

from pipeline.checkpoints.manifest import read_manifest
from pipeline.checkpoints.store import CheckpointStore
from pipeline.errors import ConfigError
from pipeline.event_log import Event, RunEvent
from pipeline.recipe.intervals import CheckpointSettings


def reasons_to_keep(
    steps: Iterable[int], settings: CheckpointSettings, top1: Mapping[int, float]
) -> dict[int, list[str]]:
    """Why each of the intact checkpoints of `steps` is kept, newest first; an empty list where nothing keeps it.

    `top1` maps steps that were evaluated to their accuracy. Of equal ones the later is better.
    """
    newest_first = sorted(steps, reverse=True)
    evaluated = [step for step in newest_first if step in top1]
    best = sorted(evaluated, key=lambda step: (top1[step], step), reverse=True)[: settings.keep_best]
    reasons: dict[int, list[str]] = {}
    for position, step in enumerate(newest_first):
        reasons[step] = []
        if position < settings.keep_last:
            reasons[step].append("newest" if position == 0 else f"last {settings.keep_last}")
        if settings.keep_every and step % settings.keep_every == 0:
            reasons[step].append(f"every {settings.keep_every:,}")
        if step in best:
            reasons[step].append("best" if settings.keep_best == 1 else f"best {settings.keep_best}")
    return reasons


def accuracies(events: Iterable[RunEvent]) -> dict[int, float]:
    """Step -> top-1 of the evaluations in an event log; the last one counts."""
    evaluations = [event for event in events if event.event is Event.EVALUATION]
    return {event.step: event.top1 for event in evaluations if event.top1 is not None}


def prune(
    store: CheckpointStore, settings: CheckpointSettings, top1: Mapping[int, float], on_progress: Callable[[], None]
) -> list[int]:
    """Remove the checkpoints that nothing keeps; returns their steps.

    Damaged ones, as far as manifests and sizes show, count nowhere and are left for a person to examine.

    Raises:
        OSError, StorageDown, StorageRefused: the store fails.
    """
    published = store.contents().published
    if len(published) <= settings.keep_last:
        return []
    intact = []
    for step, sizes in published.items():
        try:
            if read_manifest(store.at(step), store.storage).missing_or_cut(sizes) is None:
                intact.append(step)
        except ConfigError:
            continue
        on_progress()
    removed = [step for step, reasons in reasons_to_keep(intact, settings, top1).items() if not reasons]
    for step in removed:
        store.remove(step, on_progress)
    return removed

"""Which checkpoints are kept, and why. Needs no torch."""

from collections.abc import Callable, Container, Iterable, Mapping

from pipeline.checkpoints.manifest import CheckpointFacts, read_manifest
from pipeline.checkpoints.store import CheckpointStore
from pipeline.errors import ConfigError
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.runs.event_log import Event, RunEvent


def reasons_to_keep(
    steps: Iterable[int], settings: CheckpointSettings, top1: Mapping[int, float], not_counted: Container[int] = ()
) -> dict[int, list[str]]:
    """Why each of the intact checkpoints of `steps` is kept, newest first; an empty list where nothing keeps it.

    `top1` maps steps that were evaluated to their accuracy. Of equal ones the later is better. Checkpoints in
    `not_counted` are not among the last.
    """
    newest_first = sorted(steps, reverse=True)
    evaluated = [step for step in newest_first if step in top1]
    best = sorted(evaluated, key=lambda step: (top1[step], step), reverse=True)[: settings.keep_best]
    last = [step for step in newest_first if step not in not_counted][: settings.keep_last]
    reasons: dict[int, list[str]] = {}
    for step in newest_first:
        reasons[step] = []
        if step == newest_first[0]:
            reasons[step].append("newest")
        elif step in last:
            reasons[step].append(f"last {settings.keep_last}")
        if settings.keep_every and step % settings.keep_every == 0:
            reasons[step].append(f"every {settings.keep_every:,}")
        if step in best:
            reasons[step].append("best" if settings.keep_best == 1 else f"best {settings.keep_best}")
    return reasons


def accuracies(events: Iterable[RunEvent]) -> dict[int, float]:
    """Step -> top-1 of the evaluations in an event log; the last one counts."""
    evaluations = [event for event in events if event.event is Event.EVALUATION]
    return {event.step: event.top1 for event in evaluations if event.top1 is not None}


def not_returned_to(saved: Iterable[CheckpointFacts]) -> set[int]:
    """The steps of the checkpoints that no roll-back returns to: those of stops, and those that one has discarded.

    Counted among the last, they would displace those that an undisturbed run can be rolled back to.
    """
    facts = sorted(saved, key=lambda one: one.step)
    roll_backs = facts[-1].non_finite.roll_backs if facts else ()
    return {one.step for one in facts if one.for_stop or any(past.discarded(one.step) for past in roll_backs)}


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
            manifest = read_manifest(store.at(step), store.storage)
            if manifest.missing_or_cut(sizes) is None:
                intact.append(manifest.facts)
        except ConfigError:
            continue
        on_progress()
    steps = [facts.step for facts in intact]
    kept = reasons_to_keep(steps, settings, top1, not_returned_to(intact))
    removed = [step for step, reasons in kept.items() if not reasons]
    for step in removed:
        store.remove(step, on_progress)
    return removed

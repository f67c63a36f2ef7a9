"""The event log in words: marks for the charts, and a table of what happened."""

from collections.abc import Sequence
from itertools import groupby

from data.text.counted import counted
from jobs.report.charts import Mark
from jobs.report.markup import Markup, element, joined, table
from jobs.report.stage_facts import clock_time
from pipeline.runs.event_log import Event, RunEvent

_MOST_ROWS = 80
_MOST_SAVES = 60
_MOST_MARKS = 150
_MOST_SAMPLES = 20
_NOT_SHOWN = ("step", "samples_of_micro_batches", "computed_with")
_REPEATED = (Event.SAVE, Event.EVALUATION, Event.NOT_FINITE)
_TITLES = {
    Event.BEGIN: "ranks joined",
    Event.START: "start",
    Event.RESUME: "resume",
    Event.CHANGE: "change",
    Event.EXTEND: "settings changed",
    Event.BRANCH: "branch of another run",
    Event.WEIGHTS: "starting weights",
    Event.SAVE: "save",
    Event.SAVE_FAILED: "save failed",
    Event.REMOVAL_FAILED: "removal failed",
    Event.CHECKPOINT_DAMAGED: "damaged checkpoint",
    Event.EVALUATION: "evaluation",
    Event.NOT_FINITE: "not finite",
    Event.ROLL_BACK: "roll-back",
    Event.MACHINE_FAULTY: "faulty machine",
    Event.STOP: "stop",
    Event.GAVE_UP: "gave up",
    Event.FINISH: "done",
}


def marks(entries: Sequence[RunEvent]) -> list[Mark]:
    """What is marked in the charts; of many events of a kind, some at equal distances."""
    resumes = [
        Mark("resume", e.step, f"resume from step {e.step:,}, {clock_time(e)}")
        for e in entries
        if e.event is Event.RESUME and e.step >= 0
    ]
    extensions = [
        Mark("settings changed", e.step, f"settings changed after step {e.step:,}: {_changed(e)}")
        for e in entries
        if e.event is Event.EXTEND and e.step >= 0
    ]
    roll_backs = [
        Mark("roll-back", e.step, f"roll-back at step {e.step:,} to the weights of step {e.facts.get('to')}")
        for e in entries
        if e.event is Event.ROLL_BACK and e.step >= 0
    ]
    refused = [
        Mark("not applied", step, f"step {step:,} was not finite and not applied")
        for step in sorted({e.step for e in entries if e.event is Event.NOT_FINITE and e.step >= 0})
    ]
    saves = [Mark("save", step, f"save of step {step:,}") for step in _steps(entries, Event.SAVE)]
    kinds = (
        (saves, _MOST_SAVES),
        (refused, _MOST_MARKS),
        (resumes, _MOST_MARKS),
        (extensions, _MOST_MARKS),
        (roll_backs, _MOST_MARKS),
    )
    return [mark for kind, most in kinds for mark in _some(kind, most)]


def marks_legend(entries: Sequence[RunEvent]) -> Markup:
    """What the marks in the charts mean, and how many there are of each; empty without any."""
    resumes, roll_backs, extensions = (
        sum(e.event is kind for e in entries) for kind in (Event.RESUME, Event.ROLL_BACK, Event.EXTEND)
    )
    refused, saves = (len(_steps(entries, kind)) for kind in (Event.NOT_FINITE, Event.SAVE))
    counts = (
        ("mark resume", counted(resumes, "resume"), resumes, _MOST_MARKS),
        (
            "mark settings-changed",
            counted(extensions, "change of settings", "changes of settings"),
            extensions,
            _MOST_MARKS,
        ),
        ("mark roll-back", counted(roll_backs, "roll-back"), roll_backs, _MOST_MARKS),
        ("mark not-applied", f"{counted(refused, 'step')} not finite", refused, _MOST_MARKS),
        ("triangle", counted(saves, "save"), saves, _MOST_SAVES),
    )
    shown = [
        element("span", element("i", class_=f"swatch {kind}"), text, f" ({most} of them are marked)" * (count > most))
        for kind, text, count, most in counts
        if count
    ]
    return element("p", *shown, class_="legend marks") if shown else Markup("")


def history_table(entries: Sequence[RunEvent]) -> Markup:
    """What happened, repeated events in one row; skipped samples have a table of their own."""
    rows = []
    told = [entry for entry in entries if entry.event is not Event.SAMPLE_SKIPPED]
    for kind, same in groupby(told, key=lambda entry: entry.event):
        group = list(same)
        if kind in _REPEATED and len(group) > 1:
            first, last = group[0], group[-1]
            what = f"{counted(len(group), _TITLES[kind])}, steps {first.step:,} to {last.step:,}"
            rows.append((f"{clock_time(first)} to {clock_time(last)}", what, _details(last)))
        else:
            rows += [(clock_time(entry), _title(entry), _details(entry)) for entry in group]
    if not rows:
        return element("p", "Nothing is recorded.", class_="soft")
    left_out = len(rows) - _MOST_ROWS
    if left_out > 0:
        half = _MOST_ROWS // 2
        rows = [*rows[:half], ("...", f"{left_out:,} rows are left out", "all are in events.jsonl"), *rows[-half:]]
    return table(("time", "event", "details"), rows)


def skipped_samples(entries: Sequence[RunEvent]) -> Markup:
    """The samples that could not be used."""
    skipped = [entry.facts for entry in entries if entry.event is Event.SAMPLE_SKIPPED]
    if not skipped:
        return element("p", "No sample had to be skipped in training.", class_="soft")
    samples: dict[tuple[str, str], list[str]] = {}
    for fact in skipped:
        samples.setdefault((str(fact.get("shard")), str(fact.get("key"))), []).append(str(fact.get("reason")))
    shards = len({shard for shard, _ in samples})
    rows = [(shard, key, f"{len(why):,}", why[-1]) for (shard, key), why in list(samples.items())[:_MOST_SAMPLES]]
    total = (
        f"{counted(len(skipped), 'time')} a sample could not be used and was replaced by another one of its shard: "
        f"{counted(len(samples), 'sample')} of {counted(shards, 'shard')}."
    )
    more = f" The first {_MOST_SAMPLES} are shown; all are in events.jsonl." if len(samples) > _MOST_SAMPLES else ""
    return joined([element("p", total, more), table(("shard", "key", "times", "reason"), rows, right=("times",))])


def _steps(entries: Sequence[RunEvent], kind: Event) -> list[int]:
    return sorted({entry.step for entry in entries if entry.event is kind and entry.step >= 0})


def _some(found: list[Mark], most: int) -> list[Mark]:
    if len(found) <= most:
        return found
    return [found[number * (len(found) - 1) // (most - 1)] for number in range(most)]


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _title(entry: RunEvent) -> str:
    return _TITLES.get(entry.event, entry.event.value) + (f", step {entry.step:,}" if entry.step >= 0 else "")


def _changed(entry: RunEvent) -> str:
    changed = entry.facts.get("changed")
    return "; ".join(map(str, changed)) if isinstance(changed, list) else str(changed)


def _listed(fact: object) -> str:
    return ", ".join(map(str, fact)) if isinstance(fact, list | tuple) else str(fact or "")


def _details(entry: RunEvent) -> str:
    facts = entry.facts
    match entry.event:
        case Event.BEGIN:
            return f"ranks: {facts.get('ranks')}, node: {facts.get('node') or 'not recorded'}"
        case Event.EVALUATION if entry.top1 is not None:
            return (
                f"top-1 {entry.top1:.2%} on {_number(facts.get('samples'))} images, loss {_number(facts.get('loss'))}"
            )
        case Event.SAVE:
            size = facts.get("bytes")
            amount = f"{size / 1e6:,.4g} MB" if isinstance(size, int) and size < 2**63 else _number(size)
            return f"{facts.get('checkpoint')}, {amount} in {_number(facts.get('seconds'))} s"
        case Event.CHANGE:
            return f"{facts.get('what')}: {facts.get('before')} before, {facts.get('now')} now"
        case Event.EXTEND:
            return f"{_changed(entry)}; until step {_number(facts.get('steps'))}"
        case Event.ROLL_BACK:
            return f"to the weights of step {facts.get('to')}"
        case Event.MACHINE_FAULTY:
            return f"{_listed(facts.get('kinds'))} differ; without: {_listed(facts.get('nodes')) or 'undecided'}"
    return ", ".join(f"{name}: {_number(value)}" for name, value in facts.items() if name not in _NOT_SHOWN)

"""How a start ends whose ranks computed different values: what is recorded, and the error that all ranks raise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.text.counted import counted
from pipeline.checkpoints.manifest import step_of
from pipeline.cross_check.checksums import kind_of
from pipeline.cross_check.cross_check import ValuesDiffer
from pipeline.cross_check.devices import RankDevice
from pipeline.cross_check.verdict import Verdict
from pipeline.errors import MachineFaulty, RunFailed
from pipeline.ranks.distributed import Ranks
from pipeline.runs.event_log import Event, EventLog
from pipeline.runs.run_folder import RunFolder

_MOST_NAMED = 4  # values of a rank, or ranks, in a message; the event log has all of them


@dataclass(frozen=True, slots=True)
class CheckContext:
    """What the message says besides who is wrong."""

    step: int
    """That was checked, from 1."""
    last_passed: int | None
    """The last step of this start whose check was passed."""
    newest: str | None
    """Name of the newest checkpoint."""
    excluded_nodes: int
    """`verify.excluded_nodes`."""


def accusation(differ: ValuesDiffer, now: CheckContext, folder: RunFolder, ranks: Ranks) -> MachineFaulty | RunFailed:
    """Record who is wrong, and return the error of this start; all ranks call this, and get the same.

    Returns:
        `MachineFaulty`, or `RunFailed` once this and the earlier starts have left out more nodes than they may.
    """
    found, names, devices = differ.found, differ.names, differ.devices
    named = {rank: [names[place] for place in places] for rank, places in {**found.suspects, **found.accused}.items()}
    nodes = tuple(sorted({devices[rank].node for rank in found.accused}))
    excluded = ranks.broadcast(len({*nodes, *_excluded_before(folder.events)}) if ranks.is_leader else 0)
    if ranks.is_leader:
        folder.events.record(
            Event.MACHINE_FAULTY,
            step=now.step,
            kinds=sorted({kind_of(value) for values in named.values() for value in values}),
            nodes=nodes,
            devices=[_facts(rank, devices[rank], values) for rank, values in sorted(named.items())],
            last_passed=now.last_passed,
        )
    who = [f"rank {rank} on {devices[rank]}: {_some(named[rank])}" for rank in sorted(found.accused or found.suspects)]
    message = f"cross-check of step {now.step:,}: {_what(found, len(devices))}: {_some(who, '; ')}. {_since(now)}. "
    if not nodes:
        return MachineFaulty(message + _how_to_tell(found, len(devices)))
    if excluded > now.excluded_nodes:
        return RunFailed(
            f"{message}With {_some(nodes)}, this run would leave out {counted(excluded, 'node')}, and "
            f"verify.excluded_nodes allows {now.excluded_nodes}; look at the machines, which events.jsonl names with "
            "their devices, or raise it"
        )
    return MachineFaulty(message + _how_to_go_on(nodes, [devices[rank] for rank in sorted(found.accused)]), nodes)


def _excluded_before(events: EventLog) -> set[str]:
    nodes = [event.facts.get("nodes") for event in events.of(Event.MACHINE_FAULTY)]
    return {str(node) for found in nodes if isinstance(found, list) for node in found}


def _facts(rank: int, device: RankDevice, values: list[str]) -> dict[str, Any]:
    return {"rank": rank, "node": device.node, "device": device.name, "uuid": device.uuid, "values": values}


def _what(found: Verdict, world_size: int) -> str:
    if world_size == 1:
        return "the same micro-batch, computed twice, had different values"
    if found.too_many:
        return (
            "more than half of the ranks have other values than the rest, or than themselves a second time, so that it "
            "is no fault of machines"
        )
    if found.accused:
        return f"wrong values, as {'the other ranks agree' if world_size > 2 else 'they were right the second time'}"
    why = "each had its own a second time" if world_size == 2 else "no majority of the ranks has either"
    return f"different values of the same micro-batch, and it cannot be told which are wrong, since {why}"


def _since(now: CheckContext) -> str:
    """From where the run goes on, and what of that may be wrong."""
    if now.newest is None:
        return "The step was not applied, and the run starts over, as there is no checkpoint yet"
    goes_on, saved = f"The step was not applied, and the run goes on from {now.newest}", step_of(now.newest) or 0
    if now.last_passed is None:
        return f"{goes_on}, which may be wrong, too: no earlier check of this start was passed"
    if saved <= now.last_passed:
        return f"{goes_on}, after which the check of step {now.last_passed:,} was passed"
    return (
        f"{goes_on}, which may be wrong, too: steps {now.last_passed + 1:,} to {saved:,} were computed with the same "
        f"machines, after the check of step {now.last_passed:,} was passed"
    )


def _how_to_go_on(nodes: Sequence[str], devices: Sequence[RankDevice]) -> str:
    gpus = [device.uuid for device in devices if device.uuid]
    by_hand = f", or with fewer ranks and without {_some(gpus)} in CUDA_VISIBLE_DEVICES" if gpus else ""
    return (
        f"Slurm jobs go on without {_some(nodes)} by themselves; elsewhere, repeat the command without that machine"
        f"{by_hand}. Test it before it is used again"
    )


def _how_to_tell(found: Verdict, world_size: int) -> str:
    if found.too_many:
        return (
            "Compare the software of the machines and what they compute with (the first lines of their logs); if they "
            "are the same, leave verify.every_steps out and report this"
        )
    if world_size == 2:
        return "No machine is left out: go on with three ranks or more, of which two can agree, or test both machines"
    return "No machine is left out: test these, or repeat the command"


def _some(texts: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}{len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
    return f"{separator.join(texts[:_MOST_NAMED])}{more}"

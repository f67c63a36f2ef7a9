"""Findings from the facts that the ranks of a stage have measured on their nodes; nothing is measured here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from data.text.counted import counted
from pipeline.burn_in.verdict import DeviceBits, Suspect, suspects
from pipeline.preflight.disk_space import gigabytes
from pipeline.preflight.finding import Finding, Findings
from pipeline.recipe.data_sections import DataSettings
from pipeline.recipe.sections import Resources

_CLOCKS_APART = 5.0  # seconds
_HELD_SHARE = 0.05  # of a GPU's memory; a CUDA context takes a hundredth
_MOST_NAMED = 4  # nodes in a message


class Fact(Protocol):
    """What one rank measured."""

    @property
    def node(self) -> str:
        """The node of the rank."""


F = TypeVar("F", bound=Fact)


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a rank sees of its node."""

    node: str
    gpu: str | None
    """Name of the rank's own GPU; None if it has none."""
    gpus: int
    """Number of GPUs that the rank sees."""
    gpu_bytes: int
    """Memory of the rank's own GPU."""
    gpu_free: int
    """Bytes of it that no process holds."""
    processors: int
    """Number of cores that this process may run on."""
    time: float
    """The node's clock, read at the same moment on all ranks; seconds since the epoch."""
    versions: dict[str, str]
    problem: str | None
    """Why the stage cannot start here; None if it can."""
    fix: str = ""
    has_interface: bool = True
    """Whether there is a network interface that NCCL may use."""


@dataclass(frozen=True, slots=True)
class AllReduceFacts:
    """An all-reduce of `bytes` per rank."""

    node: str
    bytes: int
    seconds: float
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ReadFacts:
    """What the readers of a rank delivered in `seconds`."""

    node: str
    images: int
    seconds: float
    skipped: int
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class WriteFacts:
    """A file that a rank wrote to where checkpoints are stored."""

    node: str
    bytes: int
    seconds: float
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class RankSpeed:
    """Images per second that a rank trains on, and how that is known."""

    images_per_second: float
    source: str


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What training needs from the nodes."""

    images: int
    """Of a step, over all ranks."""
    gradient_bytes: int
    checkpoint_bytes: int
    every_steps: int
    """Steps between saves."""
    pace: RankSpeed | None
    """None if it is not known."""

    def step_seconds(self, ranks: int) -> float | None:
        """How long a step computes; None if the pace is not known."""
        return self.images / (ranks * self.pace.images_per_second) if self.pace else None


def assess_nodes(
    where: str, facts: Sequence[NodeFacts], resources: Resources, data: DataSettings, needed_bytes: int | None
) -> list[Finding]:
    """GPUs, processors, clocks, versions, and whether the stage can start on every rank.

    `needed_bytes` of GPU memory for a rank; None if not known.
    """
    found = Findings(where)
    for problem, fix in dict.fromkeys((fact.problem, fact.fix) for fact in facts if fact.problem):
        found.error(f"{problem} (on {_nodes(fact for fact in facts if fact.problem == problem)})", fix)
    if resources.gpus_per_rank:
        _assess_gpus(found, facts, resources, needed_bytes)
    least = min(fact.processors for fact in facts)
    if least < data.workers:
        few = _nodes(fact for fact in facts if fact.processors < data.workers)
        found.warning(
            f"processors: a rank may use {least} on {few}, and has {data.workers} reader threads",
            "raise resources.cpus_per_rank, or lower data.workers",
        )
    for name in facts[0].versions:
        by_version = _grouped(facts, lambda fact, name=name: fact.versions.get(name, "none"))  # type: ignore[misc]
        if len(by_version) > 1:
            which = ", ".join(f"{version} on {_nodes(those)}" for version, those in by_version.items())
            found.error(f"versions of {name} differ: {which}", "use one installation on all nodes")
    apart = max(fact.time for fact in facts) - min(fact.time for fact in facts)
    if apart > _CLOCKS_APART:
        early, late = min(facts, key=lambda fact: fact.time), max(facts, key=lambda fact: fact.time)
        found.warning(
            f"clocks: those of {early.node} and {late.node} are {apart:.0f} s apart",
            "synchronize them (chrony, ntpd): time limits and curves depend on them",
        )
    if all(finding.level == "ok" for finding in found):
        nodes = len({fact.node for fact in facts})
        found.ok(f"nodes: {len(facts)} ranks on {nodes} agree in versions and clocks, and can start the stage")
    return found


def _assess_gpus(found: Findings, facts: Sequence[NodeFacts], resources: Resources, needed_bytes: int | None) -> None:
    without = [fact for fact in facts if fact.gpu is None]
    if without:
        where = f"on {_nodes(without)} (GPUs there: {without[0].gpus})"
        found.error(
            f"GPUs: {len(without)} of {len(facts)} ranks have none, {where}",
            "check nvidia-smi and `python -c 'import torch; print(torch.version.cuda)'` there; to train without GPUs, "
            "set resources.gpus_per_rank=0",
        )
        return
    by_name = _grouped(facts, lambda fact: fact.gpu or "")
    if len(by_name) > 1:
        which = ", ".join(f"{name} on {_nodes(those)}" for name, those in by_name.items())
        found.warning(f"GPUs differ, and the slowest sets the pace: {which}", "set resources.constraint")
    least = min(fact.gpu_bytes for fact in facts)
    what = f"GPUs: {len(facts)} x {facts[0].gpu}, {gigabytes(least)}"
    if needed_bytes is not None and needed_bytes > least:
        found.error(
            f"{what}, and a rank needs {gigabytes(needed_bytes)}",
            "set resources.gpu_gigabytes to the actual size, and check again",
        )
    elif least < resources.gpu_gigabytes * 1e9:
        fix = f"set resources.gpu_gigabytes={int(least / 1e9)}"
        found.warning(f"{what}, and resources.gpu_gigabytes is {resources.gpu_gigabytes:g}", fix)
    else:
        found.ok(what)
    held = [fact for fact in facts if fact.gpu_bytes - fact.gpu_free > _HELD_SHARE * fact.gpu_bytes]
    if held:
        most = max(fact.gpu_bytes - fact.gpu_free for fact in held)
        found.warning(
            f"GPUs: other processes hold up to {gigabytes(most)} of their memory on {_nodes(held)}",
            "end them, or request whole nodes (resources.flags: [--exclusive])",
        )


def assess_all_reduce(where: str, facts: Sequence[AllReduceFacts], load: StepLoad | None) -> list[Finding]:
    """The bus bandwidth as defined by nccl-tests, compared with what the gradients of a step need."""
    found, ranks = Findings(where), len(facts)
    if _failed(found, "all-reduce", facts, "run with NCCL_DEBUG=INFO, and set NCCL_SOCKET_IFNAME for the job"):
        return found
    factor = 2 * (ranks - 1) / ranks  # how often each byte crosses a link
    bandwidth = factor * facts[0].bytes / max(fact.seconds for fact in facts)
    what = f"all-reduce: {bandwidth / 1e9:,.2f} GB/s bus bandwidth between {ranks} ranks"
    step = load.step_seconds(ranks) if load else None
    seconds = factor * load.gradient_bytes / bandwidth if load else 0.0
    if load is not None:
        what += f", {seconds:,.2g} s for the gradients of a step"
    if step is not None and load is not None and load.pace is not None and seconds > step:
        found.warning(
            f"{what}, which computes for {step:,.2g} s ({load.pace.source})",
            "check with NCCL_DEBUG=INFO which network is used, and set NCCL_SOCKET_IFNAME for the job",
        )
    else:
        found.ok(what)
    return found


def not_compared(where: str) -> Finding:
    """That there is no burn-in, since equal bits are not to be expected."""
    what = "burn-in: none, since without deterministic GPUs compute other bits each time; deterministic=true has one"
    return Finding("ok", where, what)


def assess_burn_in(where: str, devices: Sequence[DeviceBits]) -> list[Finding]:
    """Whether all ranks have computed equal bits each time, and on whom it is that some have not."""
    found = Findings(where)
    without = _grouped((one for one in devices if one.problem), lambda one: one.problem or "")
    for problem, those in without.items():
        found.warning(f"burn-in: {problem} (on {_nodes(those)})", "end other programs there, and check again")
    computed = [one for one in devices if not one.problem]
    wrong = suspects(computed)
    if len(computed) > 1 and [one.reason for one in wrong] == ["itself"] * len(computed):
        found.error(
            f"burn-in: all {len(computed)} ranks compute other bits than themselves, such as {wrong[0].text}",
            "look at the software first: a kernel, driver or library that is not deterministic",
        )
        return found
    for one in wrong:
        found.error(f"burn-in: {one.text}", _without(one))
    if computed and not wrong:
        found.ok(f"burn-in: {_equal_bits(computed)}")
    return found


def _without(suspect: Suspect) -> str:
    node = suspect.device.node
    drain = f"drain the node (scontrol update NodeName={node} State=DRAIN Reason=bits), or leave it out"
    fix = f"{drain} (resources.flags: [--exclude={node}])"
    return f"check with more nodes to find out which one it is, then {fix}" if suspect.reason == "undecided" else fix


def _equal_bits(devices: Sequence[DeviceBits]) -> str:
    times = sorted({one.repetitions for one in devices})
    often = f"{times[0]:,}" if len(times) == 1 else f"{times[0]:,} to {times[-1]:,}"
    seconds = max(one.seconds for one in devices)
    what = (
        f"{counted(len(devices), 'rank')} computed one micro-batch {often} times with equal bits, in {seconds:,.2g} s"
    )
    kinds = _grouped(devices, lambda one: one.kind)
    if len(devices) == 1:
        return f"{what}; there is no other one to compare with"
    if len(kinds) == 1:
        return what
    which = "; ".join(f"{kind} on {_nodes(those)}" for kind, those in kinds.items())
    return f"{what} within each kind of device, and kinds are not compared with each other: {which}"


def assess_reading(where: str, facts: Sequence[ReadFacts], load: StepLoad) -> list[Finding]:
    """What the readers of all ranks deliver, compared with what training needs."""
    found = Findings(where)
    if _failed(found, "reading", facts, "repair the shards"):
        return found
    delivered = sum(fact.images / fact.seconds for fact in facts)
    skipped = sum(fact.skipped for fact in facts)
    what = f"reading: {delivered:,.0f} images/s by {len(facts)} ranks"
    if skipped:
        what += f", {skipped:,} samples could not be used"
    if load.pace is None:
        found.ok(what)
        return found
    needed = load.pace.images_per_second * len(facts)
    what += f", and training needs {needed:,.0f} ({load.pace.source})"
    if delivered < needed:
        found.warning(
            what,
            "raise data.workers and resources.cpus_per_rank, or find the bottleneck with `coatnet bench data`",
        )
    else:
        found.ok(what)
    return found


def assess_writing(where: str, facts: Sequence[WriteFacts], load: StepLoad) -> list[Finding]:
    """What all ranks write together, and how long a save takes at that rate."""
    found = Findings(where)
    if _failed(found, "checkpoints", facts, "set runs or checkpoint.folder to a folder that all nodes can write"):
        return found
    speed = sum(fact.bytes for fact in facts) / max(fact.seconds for fact in facts)
    seconds = load.checkpoint_bytes / speed
    what = f"checkpoints: {speed / 1e9:,.2f} GB/s by {len(facts)} ranks, {seconds:,.2g} s for one"
    step = load.step_seconds(len(facts))
    if step is not None and load.pace is not None and seconds > step * load.every_steps:
        found.warning(
            f"{what}, with one every {step * load.every_steps:,.2g} s ({load.pace.source})",
            "raise checkpoint.every_steps, or set checkpoint.folder to a faster place",
        )
    else:
        found.ok(what)
    return found


class _Measurement(Fact, Protocol):
    @property
    def problem(self) -> str | None: ...


def _failed(found: Findings, what: str, facts: Sequence[_Measurement], fix: str) -> bool:
    problems = _grouped([fact for fact in facts if fact.problem], lambda fact: fact.problem or "")
    for problem, those in problems.items():
        found.error(f"{what}: {problem} (on {_nodes(those)})", fix)
    return bool(problems)


def _grouped(facts: Iterable[F], key: Callable[[F], str]) -> dict[str, list[F]]:
    groups: dict[str, list[F]] = {}
    for fact in facts:
        groups.setdefault(key(fact), []).append(fact)
    return groups


def _nodes(facts: Iterable[Fact]) -> str:
    """The names of the nodes, shortened for a message."""
    names = list(dict.fromkeys(fact.node for fact in facts))
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more

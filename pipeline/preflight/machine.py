"""Whether this machine has what a stage that runs on it asks for: GPUs, cores, a processor that is fast enough."""

from dataclasses import dataclass, replace
from typing import Self

from data.text.counted import counted
from pipeline.host import Host, this_host
from pipeline.preflight.finding import Findings
from pipeline.ranks.gpus import Gpu, present_gpus
from pipeline.recipe.schema import Stage


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine on which stages run."""

    host: Host
    gpus: tuple[Gpu, ...]

    @property
    def text(self) -> str:
        """`2 cores, 24.0 GB of memory, no GPU`."""
        names = list(dict.fromkeys(gpu.name for gpu in self.gpus))
        gpus = f"{len(self.gpus)} x {' and '.join(names)}" if self.gpus else "no GPU"
        return f"{self.host.text}, {gpus}"

    def seen_by(self, stage: Stage) -> Self:
        """The machine as the ranks of a stage see it: without GPUs if they have none."""
        return self if stage.resources.gpus_per_rank else replace(self, gpus=())


def this_machine() -> Machine:
    """The machine of this process."""
    return Machine(this_host(), present_gpus())


def assess_machine(name: str, stage: Stage, machine: Machine) -> Findings:
    """Hold what a stage asks for against the machine that it will run on."""
    found, resources, machine = Findings(name), stage.resources, machine.seen_by(stage)
    ranks = resources.ranks_per_node
    if machine.gpus:
        if ranks > len(machine.gpus):
            gpus = counted(len(machine.gpus), "GPU")
            what = f"resources.ranks: {ranks} ranks on a machine with {gpus}, and each rank needs one"
            found.error(what, f"set resources.ranks={len(machine.gpus)}, or resources.gpus_per_rank=0 to use CPUs")
        return found
    threads = ranks * resources.threads_per_rank
    if threads > machine.host.cores:
        found.warning(
            f"{counted(ranks, 'rank')} with {counted(resources.threads_per_rank, 'thread')} each share "
            f"{counted(machine.host.cores, 'core')}, which is slower "
            "than one thread for each core",
            f"set resources.ranks={_ranks(machine.host.cores, ranks)} resources.threads_per_rank=1",
        )
    if stage.precision != "fp32":
        found.warning(
            f"precision: {stage.precision} is several times slower than fp32 on most processors", "set precision=fp32"
        )
    return found


def _ranks(cores: int, ranks: int) -> int:
    """The most ranks, at most one for each core, that divide what `ranks` divide."""
    return next(count for count in range(min(cores, ranks), 0, -1) if ranks % count == 0)

"""The cluster that a stage is planned for: kind, number and memory of its GPUs, and what connects them.

`hardware.yaml` has the figures, each with its origin.
"""

import re
from dataclasses import dataclass
from functools import cache

from pipeline.errors import ConfigError
from pipeline.planner.figures import Figure, StrictModel, bundled_figures
from pipeline.planner.pricing import EfficiencyFile, GpuModel, gpu_model
from pipeline.planner.ranges import Range
from pipeline.ranks.gpus import PEAKS


class ClusterLaw(StrictModel):
    """What holds for all clusters."""

    link_share: Figure
    """Share of a link's bandwidth that large collectives within a node reach."""
    network_share: Figure
    """The same for network cards."""
    link_latency: Figure
    """Seconds of one hop of a ring within a node."""
    network_latency: Figure
    """Seconds of one hop of a tree between nodes."""
    host_launch: Figure
    """Seconds that the host takes to issue an eager kernel."""
    zero3_tensor: Figure
    """Seconds of the host for each parameter tensor in a micro-batch, to gather and release it with ZeRO 3."""
    loader_milliseconds: Figure
    """Of one core for an image that is read, decoded, cropped and augmented."""
    download_milliseconds: Figure
    """Of one core for an image of a remote shard, in addition."""
    image_bytes: Figure
    """Of a sample in a shard."""
    context: Figure
    """Bytes of a GPU that CUDA and its libraries take."""
    fragmentation: Figure
    """What the allocator holds beyond the peak of a micro-batch, as a share of it."""
    facility: Figure
    """Watts of the whole for each watt of a GPU's board."""


class GpuHardware(StrictModel):
    """What comes with one kind of GPU."""

    memory: Figure
    """Bytes."""
    power: Figure
    """Watts of the board at most."""
    link: Figure
    """Bytes per second and direction between GPUs of a node."""
    network: Figure
    """Bytes per second and direction of the network card for each GPU."""


class HardwareFile(StrictModel):
    """`hardware.yaml`."""

    version: int
    law: ClusterLaw
    gpus: dict[str, GpuHardware]


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs of one kind in equal nodes."""

    gpu: GpuModel
    gpus: int
    gpus_per_node: int
    memory: float
    """Bytes of a GPU."""
    power: float
    """Watts of a GPU's board."""
    link: Figure
    network: Figure
    law: ClusterLaw
    cores_per_node: int | None = None
    """None if not known."""

    @property
    def nodes(self) -> int:
        """Their number."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def bus(self) -> Range:
        """Bytes per second at which a ring through all GPUs passes each of them.

        Within a node that is the link. Between nodes as many rings run side by side as there are network cards, so a
        node's cards count together, unless the link is slower.
        """
        link = _times(self.link, self.law.link_share)
        if self.nodes == 1:
            return link
        network = _times(self.network, self.law.network_share) * self.gpus_per_node
        return Range(min(link.value, network.value), min(link.least, network.least), min(link.most, network.most))

    def with_gpus(self, gpus: int) -> "Cluster":
        """The same with another number of GPUs; fewer than a node's are on one node."""
        return Cluster(
            self.gpu, gpus, min(gpus, self.gpus_per_node), self.memory, self.power, self.link, self.network, self.law,
            self.cores_per_node,
        )  # fmt: skip


def figure_range(figure: Figure) -> Range:
    """The figure with its ends, which are itself where it has none."""
    value = figure.value
    return Range(value, value if figure.least is None else figure.least, value if figure.most is None else figure.most)


@cache
def bundled_hardware() -> HardwareFile:
    """The file that comes with the program."""
    return bundled_figures(HardwareFile, "hardware.yaml")


def find_cluster(
    gpu: str,
    gpus: int,
    gpus_per_node: int,
    *,
    link: float | None = None,
    network: float | None = None,
    cores_per_node: int | None = None,
    efficiencies: EfficiencyFile | None = None,
) -> Cluster:
    """A cluster by the name of its GPUs.

    Args:
        gpu: a key of `PEAKS` in any spelling, as `h100`, or torch's name of the device; `-80` behind it is the memory
            of each in GB.
        gpus: their number.
        gpus_per_node: of each node.
        link: bytes per second and direction between the GPUs of a node, if not the data sheet's.
        network: bytes per second and direction of each GPU's network card.
        cores_per_node: of a node's processors.
        efficiencies: instead of those that come with the program.

    Raises:
        ConfigError: an unknown GPU, or nodes that do not divide them.
    """
    kind, memory, name = _named(gpu)
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise ConfigError(
            f"{gpus} GPUs in nodes of {gpus_per_node}: the last node would have fewer; set --gpus to a multiple, or "
            "--gpus-per-node"
        )
    hardware, content = bundled_hardware().gpus[kind], bundled_hardware()
    given = "given"
    return Cluster(
        gpu=gpu_model(name, efficiencies),
        gpus=gpus,
        gpus_per_node=min(gpus, gpus_per_node),
        memory=hardware.memory.value if memory is None else memory,
        power=hardware.power.value,
        link=hardware.link if link is None else Figure(value=link, origin=given),
        network=hardware.network if network is None else Figure(value=network, origin=given),
        law=content.law,
        cores_per_node=cores_per_node,
    )


def gpu_of_size(gigabytes: float) -> str:
    """The name of a GPU of this memory: the most usual one, else an H100 that has it."""
    usual = ("H100", "H200", "A100", "B200", "MI300X", "H100 NVL", "L40S", "RTX 5090", "RTX 4090")
    hardware = bundled_hardware().gpus
    kind = next((kind for kind in usual if round(hardware[kind].memory.value / 1e9) == round(gigabytes)), usual[0])
    return f"{kind}-{gigabytes:g}"


def _named(gpu: str) -> tuple[str, float | None, str]:
    """The key in `PEAKS`, the bytes of memory in the name, and a name for which the table of bandwidths is right."""
    text = gpu.casefold()
    found = next(((key, place) for key in PEAKS if (place := _place(key, text))), None)
    if found is None:
        raise ConfigError(
            f"GPU {gpu}: not known; use one of {', '.join(PEAKS)}, with its memory if there are several, as h100-80"
        )
    kind, place = found
    size = re.search(r"(?<![0-9a-z.])(\d+(?:\.\d+)?)\s*(?:gb?)?(?![0-9a-z.])", text[place.end() :])
    memory = float(size[1]) * 1e9 if size else None
    if (kind, memory) == ("GH200", 480e9):  # as torch calls one with 96: it is the memory of its host
        memory = None
    # The two kinds of A100 and of GH200 have memories of different speeds.
    eighty = "A100 80GB PCIe" if "pcie" in text else "A100-SXM4-80GB"
    return kind, memory, {("A100", 80e9): eighty, ("GH200", 144e9): "GH200 144G"}.get((kind, memory or 0.0), kind)


def _place(key: str, text: str) -> re.Match[str] | None:
    """Where a name has the letters of a key, in words of its own: an RTX A1000 is no A100."""
    letters = (re.escape(letter) for letter in key.casefold() if letter.isalnum())
    return re.search(rf"(?<![0-9a-z]){'[^0-9a-z]*'.join(letters)}(?!\d)", text)


def _times(bandwidth: Figure, share: Figure) -> Range:
    one, other = figure_range(bandwidth), figure_range(share)
    return Range(one.value * other.value, one.least * other.least, one.most * other.most)

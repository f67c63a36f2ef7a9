"""What the ranks of a run compute on: only equal devices compute equal bits."""

import json
from dataclasses import asdict, dataclass

import torch

from data.files.json_records import parse_json
from pipeline.errors import ConfigError
from pipeline.host import processor_name
from pipeline.ranks.distributed import Ranks
from pipeline.ranks.gpus import gpu_uuid


@dataclass(frozen=True, slots=True)
class RankDevice:
    """What a rank computes on."""

    node: str
    """As the scheduler knows it."""
    name: str
    """Of the GPU, or of the processor."""
    uuid: str | None
    """Of a GPU, as `nvidia-smi -L` prints it."""
    torch: str
    """Version."""

    def __str__(self) -> str:
        return f"{self.node} ({', '.join(filter(None, (self.name, self.uuid)))})"


def devices_of(ranks: Ranks, node: str) -> list[RankDevice]:
    """The devices of all ranks, in their order; all ranks call this, each with the name of its `node`."""
    if ranks.device.type == "cuda":
        name = torch.cuda.get_device_name(ranks.device)
        own = RankDevice(node, name, gpu_uuid(ranks.device) or None, torch.__version__)
    else:
        own = RankDevice(node, processor_name(), None, torch.__version__)
    return [parse_json(RankDevice, text) for text in ranks.gather_texts(json.dumps(asdict(own)))]


def refuse_different_devices(devices: list[RankDevice]) -> None:
    """Refuse to compare the bits of devices that may compute others though they work.

    Raises:
        ConfigError: two ranks have another device or another version of torch.
    """
    kinds = [f"{device.name} with torch {device.torch}" for device in devices]
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ConfigError(
                f"verify.every_steps: rank {rank} on {devices[rank].node} computes on {kind}, and rank 0 on "
                f"{devices[0].node} on {kinds[0]}, so that their bits differ; use machines of one kind, or "
                "leave verify out"
            )

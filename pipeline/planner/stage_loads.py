"""What a stage asks of its nodes and its storage beside the GPUs: decoding, downloads, checkpoints."""

import math
from dataclasses import dataclass

from data.order import lanes_read
from data.remote.shard_download import shard_requests
from data.remote.storage import is_remote
from pipeline.checkpoints.retention import reasons_to_keep
from pipeline.planner.datasets import PlannedDataset
from pipeline.planner.failures.run_timing import SaveCost, save_cost
from pipeline.planner.hardware import Cluster, figure_range
from pipeline.planner.ranges import Range
from pipeline.planner.step_estimate import StepEstimate, parameters_of
from pipeline.recipe.schema import TrainStage
from pipeline.state_bytes import checkpoint_bytes


@dataclass(frozen=True, slots=True)
class LoaderLoad:
    """Reading, decoding and augmenting on each node."""

    images_per_second: Range
    cores: Range
    """Busy with it."""
    cores_per_gpu: Range


@dataclass(frozen=True, slots=True)
class ShardLoad:
    """Downloads of remote shards, by all nodes together."""

    times_downloaded: float
    """By how many nodes a shard is downloaded in an epoch, on average: those that share its lane."""
    bytes_per_second: Range
    requests_per_second: Range
    bytes_per_second_of_node: Range


@dataclass(frozen=True, slots=True)
class CheckpointLoad:
    """Saves of a stage."""

    bytes: int
    """Of a checkpoint."""
    every_steps: int
    saves: int
    """In the whole stage, if nothing stops it."""
    kept: int
    """At its end."""
    kept_bytes: int
    most_bytes: int
    """While one more is being written, before the oldest is removed."""
    cost: SaveCost
    between: Range
    """Seconds between the beginnings of two saves."""


def loader_load(stage: TrainStage, step: StepEstimate, cluster: Cluster) -> LoaderLoad:
    """The demand of a node, for images that are cropped and augmented on processors like the one measured.

    The measured cost is that of a crop of 224 pixels with RandAugment; decoding, most of it, does not depend on that.
    """
    law = cluster.law
    milliseconds = figure_range(law.loader_milliseconds)
    if is_remote(stage.data.train or ""):
        milliseconds = milliseconds + figure_range(law.download_milliseconds)
    each = step.images_per_second * (1 / cluster.nodes)
    cores = Range(
        each.value * milliseconds.value / 1e3,
        each.least * milliseconds.least / 1e3,
        each.most * milliseconds.most / 1e3,
    )
    return LoaderLoad(each, cores, cores * (1 / cluster.gpus_per_node))


def shard_load(dataset: PlannedDataset, step: StepEstimate, cluster: Cluster, lanes: int) -> ShardLoad:
    """What the nodes download, if the shards are remote: a node downloads the shards of its ranks' lanes.

    Ranks take contiguous positions of the batch and a lane has as many of them, so nodes share lanes where there are
    fewer lanes than nodes, and where a lane's positions end inside of a node's. A shard is downloaded whole, in
    one request or, if it is large, in ranges.
    """
    of_node = step.images // cluster.gpus * cluster.gpus_per_node
    times = lanes_read(step.images, lanes, of_node) / lanes
    images, size = step.images_per_second, dataset.image_bytes
    in_shard = dataset.samples / max(1, dataset.shards)

    def loads(images: float, size: float) -> tuple[float, float]:
        shards = times * images / in_shard
        return times * images * size, shards * shard_requests(math.ceil(in_shard * size))

    value, least, most = (
        loads(images.value, size.value), loads(images.least, size.least), loads(images.most, size.most)
    )  # fmt: skip
    speed, requests = (Range(*ends) for ends in zip(value, least, most, strict=True))
    return ShardLoad(times, speed, requests, speed * (1 / cluster.nodes))


def checkpoint_load(
    stage: TrainStage, classes: int, steps: int, every_steps: int, step: StepEstimate, cluster: Cluster
) -> CheckpointLoad:
    """The checkpoints of a stage of `steps` steps.

    The last step is saved as well. What is kept follows `checkpoint.keep_last`, `keep_every` and `keep_best`; the best
    ones are counted as others than those.
    """
    size = checkpoint_bytes(stage, parameters_of(stage, classes))
    saved = sorted({*range(every_steps, steps + 1, every_steps), steps})
    kept = {number for number, reasons in reasons_to_keep(saved, stage.checkpoint, {}).items() if reasons}
    best = min(stage.checkpoint.keep_best, len(saved) - len(kept))
    count = len(kept) + best
    remote = is_remote(stage.checkpoint.folder or "")
    return CheckpointLoad(
        bytes=size,
        every_steps=every_steps,
        saves=len(saved),
        kept=count,
        kept_bytes=count * size,
        most_bytes=min(len(saved), count + 1) * size,
        cost=save_cost(size, cluster.gpus, cluster.gpus_per_node, remote=remote),
        between=step.seconds * every_steps,
    )

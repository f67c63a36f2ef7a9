"""The times of a run that decide what failures cost it: steps, saves, starts, and how long a failure goes unnoticed."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from data.files.file_sizes import CONCURRENT_LOOKS
from data.remote.storage import CONCURRENT_QUESTIONS
from pipeline.errors import ConfigError
from pipeline.faults.hang_report import GATHER_SECONDS
from pipeline.planner.cluster import ClusterFigures, bundled_cluster_figures
from pipeline.recipe.sections import WatchdogSettings

_POLL_SECONDS = 1.0  # of the watchdog
_PAGE = 1000  # names of a listing


class Ending(StrEnum):
    """How a start ends early."""

    NODE = "node"
    """A node goes down or loses its network: its connections do not close."""
    RANK = "rank"
    """A process is killed, or its GPU fails, on a node that lives."""
    HANG = "hang"
    """The training thread of a rank makes no progress; its process lives, and goes on with a save in flight."""
    SIGNAL = "signal"
    """SIGTERM and the like, as before a preemption or a time limit: the ranks save first."""


@dataclass(frozen=True, slots=True)
class SaveCost:
    """What one save takes."""

    stall: float
    """Seconds that training waits: for the copy to host memory."""
    write: float
    """Seconds in the background after that, until the checkpoint counts."""


@dataclass(frozen=True, slots=True)
class RunTiming:
    """A run as failures see it; all times are in seconds."""

    nodes: int
    ranks_per_node: int
    batch: int
    """Samples of a step."""
    step: float
    interval: int
    """Steps between saves."""
    save: SaveCost
    start: float
    """From the launch to the first step of a start that continues."""
    watchdog: WatchdogSettings = field(default_factory=WatchdogSettings)
    grace: float = 120.0
    """`checkpoint.grace_seconds`."""
    figures: ClusterFigures | None = None
    """Those that come with the program if None."""

    def __post_init__(self) -> None:
        counts = {"nodes": self.nodes, "ranks_per_node": self.ranks_per_node, "interval": self.interval}
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"{name}: {count} is less than 1; a run has at least one")
        for name, seconds in {"step": self.step, "save.stall": self.save.stall + 1, "start": self.start + 1}.items():
            if not 0 < seconds < math.inf:
                raise ConfigError(f"{name}: {seconds} is no number of seconds; give a positive one")

    @property
    def known(self) -> ClusterFigures:
        """The figures of the cluster."""
        return self.figures or bundled_cluster_figures()

    @property
    def work(self) -> float:
        """Seconds of the steps between two saves."""
        return self.interval * self.step

    @property
    def cycle(self) -> float:
        """Seconds from one save to the next: training waits for the write of the one before if that takes longer."""
        return self.save.stall + max(self.work, self.save.write)

    @property
    def write_binds(self) -> bool:
        """Whether the write takes longer than the steps between two saves, so that training waits for it."""
        return self.save.write > self.work

    def notice(self, ending: Ending, *, saving: bool = False) -> float:
        """Seconds from a failure until all ranks have ended; `saving` if a save is in flight, which they wait for when
        another rank is gone."""
        failures = self.known.failures
        if ending is Ending.SIGNAL:
            return 0.0
        if ending is Ending.RANK:
            return failures.connection_closed.value + (failures.lost_rank_patience.value if saving else 0.0)
        watched = self.watchdog_limit + _POLL_SECONDS + GATHER_SECONDS
        return min(watched, failures.node_missed.value) if ending is Ending.NODE else watched

    def ended_by_scheduler(self, ending: Ending) -> bool:
        """Whether Slurm misses the node before a watchdog ends the ranks, and so ends and requeues the job itself."""
        return ending is Ending.NODE and self.notice(ending) < self.notice(Ending.HANG)

    @property
    def watchdog_limit(self) -> float:
        """Seconds that a step may take before it counts as hanging."""
        return max(self.watchdog.least_seconds, self.watchdog.factor * self.step)

    def downtime(self, ending: Ending = Ending.NODE) -> float:
        """Seconds from a failure to the first step after it."""
        return self.notice(ending) + self.known.failures.requeue_delay.value + self.start


def save_cost(
    state_bytes: float, ranks: int, ranks_per_node: int, *, remote: bool = False, figures: ClusterFigures | None = None
) -> SaveCost:
    """What a save of `state_bytes` of all ranks together takes, by the bandwidths of the figures.

    Each rank copies, hashes and writes its share and reads it back; with `remote` it also sends it to an object store
    and reads it from there. Then the leader reads and removes the records of all ranks: `publishing_seconds`.
    """
    known = (figures or bundled_cluster_figures()).saves
    share, node = state_bytes / ranks, state_bytes / ranks * min(ranks, ranks_per_node)
    stall = known.agreement.value + share / known.copy_bandwidth.value
    moved = node / known.node_write_bandwidth.value + node / known.node_read_bandwidth.value
    hashed = share / known.hash_bandwidth.value + (share / known.read_hash_bandwidth.value if remote else 0.0)
    return SaveCost(stall, max(moved, hashed) + publishing_seconds(ranks, remote=remote, figures=figures))


def publishing_seconds(ranks: int, *, remote: bool, figures: ClusterFigures | None = None) -> float:
    """How long the leader is busy with the records of all ranks before a save counts.

    In an object store it asks for the size of each, reads and removes it, 32 at a time, and lists the records and files
    of the ranks twice and the files once. In a folder it opens each record and looks at its file, 32 at a time, and
    removes the records: Linux does that one after the other in a folder. Listings while ranks still write are not
    counted.
    """
    known = figures or bundled_cluster_figures()
    if remote:
        pages = 2 * -(-2 * ranks // _PAGE) + -(-ranks // _PAGE)
        return pages * known.saves.request_seconds.value + _requests_seconds(ranks, 3, known)
    return ranks * known.saves.file_seconds.value + _file_operations_seconds(ranks, 2, known)


def pruning_seconds(ranks: int, kept: int, *, remote: bool, figures: ClusterFigures | None = None) -> float:
    """How long the leader then takes to remove the oldest of `kept` + 1 checkpoints.

    It lists all of them with their sizes, and removes the files of one: in an object store 32 at a time.
    """
    known, files = figures or bundled_cluster_figures(), ranks + 3
    if remote:
        pages = -(-(kept + 1) * files // _PAGE) + -(-files // _PAGE)
        return pages * known.saves.request_seconds.value + _requests_seconds(files, 1, known)
    return files * known.saves.file_seconds.value + _file_operations_seconds((kept + 1) * files, 1, known)


def start_seconds(
    state_bytes: float,
    ranks: int,
    ranks_per_node: int,
    *,
    parameters: int = 0,
    shards: int = 0,
    compiled: bool = False,
    remote: bool = False,
    figures: ClusterFigures | None = None,
) -> float:
    """Seconds from the launch to the first step of a start that continues from a checkpoint of `state_bytes`.

    Each rank reads and checks the index of `shards` shards, makes the model, and verifies and loads its own share. All
    of them wait for the leader, which looks at every shard.
    """
    known = figures or bundled_cluster_figures()
    starts, saves = known.starts, known.saves
    share, node = state_bytes / ranks, state_bytes / ranks * min(ranks, ranks_per_node)
    loading = max(node / saves.node_read_bandwidth.value, share / saves.read_hash_bandwidth.value)
    seconds = starts.launch.value + starts.processor_seconds.value + starts.devices.value + loading
    seconds += shards * starts.index_shard_seconds.value + parameters * starts.parameter_seconds.value
    seconds += looking_at_shards_seconds(shards, remote=remote, figures=figures)
    return seconds + (starts.compile.value if compiled else 0.0)


def looking_at_shards_seconds(shards: int, *, remote: bool, figures: ClusterFigures | None = None) -> float:
    """How long the leader takes to see that every shard is there, with its size: a look at each file, 32 at a time as
    far as the file system answers that many, or pages of a thousand names, one after the other."""
    known = figures or bundled_cluster_figures()
    if remote:
        return -(-shards // _PAGE) * known.saves.request_seconds.value
    return _file_operations_seconds(shards, 1, known)


def _file_operations_seconds(files: int, operations: int, figures: ClusterFigures) -> float:
    """How long one process takes for so many operations on each of so many files, `CONCURRENT_LOOKS` files at a time,
    unless they are more than the file system does in that time."""
    waiting = -(-files // CONCURRENT_LOOKS) * operations * figures.saves.file_seconds.value
    return max(waiting, files * operations / figures.limits.file_operations.value)


def _requests_seconds(objects: int, requests: int, figures: ClusterFigures) -> float:
    """How long so many small requests for each of so many objects take: they wait at the same time for
    `CONCURRENT_QUESTIONS` objects, but one thread makes them all."""
    saves = figures.saves
    waiting = -(-objects // CONCURRENT_QUESTIONS) * requests * saves.request_seconds.value
    return max(waiting, objects * requests * saves.request_processor_seconds.value)

"""Figures of clusters and of starts, with their origins: `cluster_figures.yaml`."""

from functools import cache

from pipeline.planner.figures import Figure, StrictModel, bundled_figures


class FailureFigures(StrictModel):
    """How often nodes fail, and how that is noticed and acted upon."""

    node_hours: Figure
    """Mean time between failures of one node, in hours; whatever ends a run counts."""
    connection_closed: Figure
    """Seconds until the other ranks notice a process that ended on a node that lives."""
    node_missed: Figure
    """Seconds until the scheduler notices a node that does not answer."""
    lost_rank_patience: Figure
    """Seconds that a rank gives the save in flight when another one is gone."""
    requeue_delay: Figure
    """Seconds from the end of a job to its next start."""


class StartFigures(StrictModel):
    """What the start of one rank takes, until its first step."""

    launch: Figure
    """Seconds until the processes run."""
    processor_seconds: Figure
    """Of one core; on a cluster it is waited for."""
    devices: Figure
    """Seconds for GPUs and their connections."""
    compile: Figure
    """Seconds of a stage with `compile`."""
    parameter_seconds: Figure
    """Seconds of making the model on each rank, for each parameter."""
    names: Figure
    """Different names that a process asks the file system for."""
    name_calls: Figure
    """Calls that ask for a name, repeated ones included."""
    opens: Figure
    """Files opened."""
    file_bytes: Figure
    """Of the files that are read whole."""
    library_bytes: Figure
    """Of the libraries that are mapped; what is touched of them is read."""
    index_shard_bytes: Figure
    """Bytes of an index for each shard."""
    index_shard_seconds: Figure
    """Processor seconds of reading it, for each shard."""
    index_shard_memory: Figure
    """Bytes in memory, for each shard."""
    verified_line_seconds: Figure
    """Processor seconds for each shard that earlier starts have verified."""
    store_connections: Figure
    """Of each rank to the store where the ranks meet."""


class SaveFigures(StrictModel):
    """What saving and loading a checkpoint takes."""

    copy_bandwidth: Figure
    """Bytes per second from one GPU to the host, while training waits."""
    agreement: Figure
    """Seconds that training waits beside the copy."""
    hash_bandwidth: Figure
    """Bytes per second at which one rank writes and reads back its file, as far as its core limits it."""
    node_write_bandwidth: Figure
    """Bytes per second of all ranks of a node."""
    node_read_bandwidth: Figure
    """Bytes per second of all ranks of a node."""
    read_hash_bandwidth: Figure
    """Bytes per second at which one rank verifies and loads its file, as far as its core limits it."""
    request_seconds: Figure
    """Of one small request to an object store."""
    request_processor_seconds: Figure
    """Processor time of the one thread of a process that makes all its requests, for a small one."""
    file_seconds: Figure
    """Of one operation on a file of a shared file system, as its client waits for it."""


class LimitFigures(StrictModel):
    """What all ranks share."""

    file_operations: Figure
    """Metadata operations per second of a shared file system."""
    shared_bandwidth: Figure
    """Bytes per second of the storage to all nodes."""
    node_network: Figure
    """Bytes per second of one node to the storage."""
    prefix_gets: Figure
    """GET requests per second for one prefix of an object store."""
    prefix_puts: Figure
    """PUT and DELETE requests per second for one prefix."""
    lists: Figure
    """LIST requests per second."""
    store_requests: Figure
    """Requests per second of the store where the ranks meet."""
    open_files: Figure
    """Descriptors that one process can be allowed."""
    start_patience: Figure
    """Seconds that one kind of work of a start may take."""


class ClusterFigures(StrictModel):
    """`cluster_figures.yaml`."""

    version: int
    failures: FailureFigures
    starts: StartFigures
    saves: SaveFigures
    limits: LimitFigures


@cache
def bundled_cluster_figures() -> ClusterFigures:
    """The file that comes with the program."""
    return bundled_figures(ClusterFigures, "cluster_figures.yaml")

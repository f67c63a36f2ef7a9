"""What a run asks of what its ranks share while it trains: shards, checkpoints, log lines."""

from data.remote.shard_download import shard_requests
from data.remote.storage import PIECE
from pipeline.planner.failures.run_timing import pruning_seconds, publishing_seconds
from pipeline.planner.scaling.load import Basis, Load, ScaledRun, lanes_of_nodes, lanes_of_ranks

_PART = 64 * 2**20  # bytes of a part of an upload, as in data/remote/storage.py
_EVENT_FILES = 2  # of TensorBoard: training and validation


def run_loads(run: ScaledRun, ranks: int) -> tuple[Load, ...]:
    """What training on `ranks` ranks needs, the largest share first."""
    found = [_written(run, ranks), _published(run, ranks), _logged(run, ranks)]
    if run.remote:
        found += [
            _puts(run, ranks),
            _save_gets(run, ranks),
            _downloaded(run, ranks),
            _node_downloads(run, ranks),
            _gets(run, ranks),
        ]
    else:
        found += [_read(run, ranks), _opened(run, ranks)]
        if run.verify_shards:
            found.append(_verified(run, ranks))
    return tuple(sorted(found, key=lambda load: -load.share))


def upload_requests(size: float) -> int:
    """Requests that one file of `size` bytes takes: one, or a multipart upload."""
    return 1 if size <= _PART else 2 + int(-(-size // _PART))


def _written(run: ScaledRun, ranks: int) -> Load:
    limits, saves = run.known.limits, run.known.saves
    times = 2
    return Load(
        "bytes of a save", "save", times * run.state_bytes, "bytes", run.interval_seconds(ranks),
        min(limits.shared_bandwidth.value, run.nodes(ranks) * saves.node_write_bandwidth.value), Basis.SIMULATED,
        f"{run.state_bytes / 1e9:,.1f} GB, written and read back; law: the same for all numbers of ranks, in less time",
        "each rank writes its own share behind the training, and at most one save is in flight",
    )  # fmt: skip


def _published(run: ScaledRun, ranks: int) -> Load:
    publishing = publishing_seconds(ranks, remote=run.remote, figures=run.figures)
    pruning = pruning_seconds(ranks, run.kept_checkpoints, remote=run.remote, figures=run.figures)
    asks = (
        "a size, the content and a removal for the record of each rank, 32 at a time"
        if run.remote
        else "a record of each rank opened and its file looked at, 32 at a time, and removed, one after the other"
    )
    return Load(
        "the leader's work for a save", "save", publishing + pruning, "seconds", run.interval_seconds(ranks), 1.0,
        Basis.SIMULATED,
        f"{asks}: {publishing:,.1f} s; and {pruning:,.1f} s to list what is kept and to remove the oldest of it; law: "
        "linear in ranks, in less time",
        "it waits behind the training; the next save waits for it, so a save takes no less than that",
    )  # fmt: skip


def _puts(run: ScaledRun, ranks: int) -> Load:
    requests = ranks * (upload_requests(run.state_bytes / ranks) + 2)
    return Load(
        "requests of a save that write", "save", requests, "PUT and DELETE requests", run.interval_seconds(ranks),
        run.known.limits.prefix_puts.value, Basis.SIMULATED,
        f"{upload_requests(run.state_bytes / ranks)} for each rank's file, in parts of 64 MiB, one for its record and "
        "one that removes it; law: linear in ranks, in less time",
        "refused requests are repeated with growing pauses (data/remote/retries.py)",
    )  # fmt: skip


def _save_gets(run: ScaledRun, ranks: int) -> Load:
    pieces = -(-run.state_bytes // ranks // PIECE)
    return Load(
        "requests of a save that read", "save", ranks * (pieces + 4), "GET and HEAD requests",
        run.interval_seconds(ranks), run.known.limits.prefix_gets.value, Basis.SIMULATED,
        f"{pieces:,.0f} for each rank's file, which is read back in pieces of 16 MiB, two of the rank for a manifest, "
        "and two of the leader for its record; law: linear in ranks, in less time",
        "no rank lists anything, apart from the leader",
    )  # fmt: skip


def _bytes_per_second(run: ScaledRun, ranks: int) -> float:
    return run.images_per_second(ranks) * run.sample_bytes


def _amplification(run: ScaledRun, ranks: int) -> float:
    """How often each shard is downloaded: once for each node that reads its lane."""
    lanes = lanes_of_nodes(run, 1)
    return lanes_of_nodes(run, ranks) / lanes


def _downloaded(run: ScaledRun, ranks: int) -> Load:
    again = _amplification(run, ranks)
    return Load(
        "bytes of shards", "step", _bytes_per_second(run, ranks) * again, "bytes", 1.0,
        run.known.limits.shared_bandwidth.value, Basis.SIMULATED,
        f"images/s x bytes of an image, downloaded {again:,.1f} times by the lanes of data/order.py; law: images/s, "
        "times nodes over lanes beyond that many nodes",
        "the ranks of a node share a cache, filled by one process; a lane that several nodes read is downloaded by "
        "each: a greater data.lanes avoids it",
    )  # fmt: skip


def _node_downloads(run: ScaledRun, ranks: int) -> Load:
    return Load(
        "bytes of shards of one node", "step",
        _bytes_per_second(run, ranks) * _amplification(run, ranks) / run.nodes(ranks), "bytes", 1.0,
        run.known.limits.node_network.value, Basis.SIMULATED, "the same for each node; law: images/s of a node",
        "data.cache.downloads of them at a time, shards of the next window ahead of need",
    )  # fmt: skip


def _gets(run: ScaledRun, ranks: int) -> Load:
    size = run.samples * run.sample_bytes / run.shards
    each = shard_requests(round(size))
    demand = _bytes_per_second(run, ranks) * _amplification(run, ranks) / size * each
    return Load(
        "requests for shards", "step", demand, "GET requests", 1.0, run.known.limits.prefix_gets.value,
        Basis.SIMULATED, f"{each:,} for each shard of {size / 1e6:,.0f} MB; law: as the bytes",
        "whole shards, in one request up to 128 MiB and else in ranges of 64 MiB, never single images",
    )  # fmt: skip


def _read(run: ScaledRun, ranks: int) -> Load:
    return Load(
        "bytes of images", "step", _bytes_per_second(run, ranks), "bytes", 1.0, run.known.limits.shared_bandwidth.value,
        Basis.SIMULATED, "images/s x bytes of an image; law: images/s",
        "images are read by their positions in a shard; each rank that opens one also reads its headers",
    )  # fmt: skip


def _opened(run: ScaledRun, ranks: int) -> Load:
    lanes = lanes_of_ranks(run, 1)
    shards = run.images_per_second(ranks) / (run.samples / run.shards)
    again = lanes_of_ranks(run, ranks) / lanes
    return Load(
        "shards opened", "step", shards * again, "file operations", 1.0, run.known.limits.file_operations.value,
        Basis.SIMULATED, f"each shard by {again:,.0f} ranks that share its lane; law: images/s x ranks / lanes",
        "a shard stays open while its lane is in it; a greater data.lanes leaves fewer ranks in each",
    )  # fmt: skip


def _verified(run: ScaledRun, ranks: int) -> Load:
    rate = run.known.saves.read_hash_bandwidth.value
    hours = run.samples * run.sample_bytes / min(ranks * rate, run.known.limits.shared_bandwidth.value) / 3600
    return Load(
        "bytes of shards that are verified behind the first start", "step", ranks * rate, "bytes", 1.0,
        run.known.limits.shared_bandwidth.value, Basis.MEASURED,
        f"{rate / 1e9:.1f} GB/s of a core that hashes; law: linear in ranks, until all are read once, after "
        f"{hours:,.1f} hours",
        "each shard is hashed by one rank alone, in a thread of the lowest priority, which does not make its reads "
        "fewer; data.verify_shards: false leaves it out",
    )  # fmt: skip


def _logged(run: ScaledRun, ranks: int) -> Load:
    lines = (1 + _EVENT_FILES) / (run.log_every * run.step_seconds(ranks))
    return Load(
        "log lines and TensorBoard", "step", lines, "file operations", 1.0, run.known.limits.file_operations.value,
        Basis.SIMULATED, f"a line and a write to an event file every {run.log_every} steps; law: the same for all "
        "numbers of ranks", "the leader alone writes them; each rank has a log of its own, with a few lines a start",
    )  # fmt: skip

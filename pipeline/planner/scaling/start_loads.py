"""What the start of a run asks of what its ranks share: the file system, the object store, the leader.

The ranks of a node share its cache: a name or a byte that several of them need is counted once for each node where the
kernel keeps it, and once for each rank where the program asks again.
"""

from data.remote.storage import PIECE
from pipeline.planner.failures.run_timing import looking_at_shards_seconds
from pipeline.planner.scaling.load import Basis, Load, ScaledRun

_LISTED = 1000  # names on a page of a listing
_FRAGMENT_BYTES = 150  # of a manifest, see data/limits.py
_FILE_BYTES = 120  # of a manifest: name, size and sha256 of a rank's file
_VERIFIED_BYTES = 250  # of a line of verified_shards


def start_loads(run: ScaledRun, ranks: int) -> tuple[Load, ...]:
    """What a start on `ranks` ranks needs that continues from a checkpoint of as many, the largest share first."""
    found = [_names(run, ranks), _program(run, ranks), _store(run, ranks), _store_polls(run, ranks)]
    found += [_indexes(run, ranks), _shards_looked_at(run), _checkpoint_looked_at(run, ranks), _manifest(run, ranks)]
    found.append(_state(run, ranks))
    if run.verify_shards and not run.remote:
        found.append(_verified_records(run, ranks))
    return tuple(sorted(found, key=lambda load: -load.share))


def index_bytes(run: ScaledRun) -> float:
    """Of the index of the training shards."""
    return run.shards * run.known.starts.index_shard_bytes.value


def fragments(run: ScaledRun, ranks: int) -> int:
    """Ranges of parameters in a manifest: with ZeRO 3, each rank has one of every parameter."""
    return run.tensors * ranks if run.zero_stage == 3 else run.tensors + (ranks if run.zero_stage else 0)


def manifest_bytes(run: ScaledRun, ranks: int) -> int:
    """Of the manifest of a checkpoint."""
    return _FRAGMENT_BYTES * fragments(run, ranks) + _FILE_BYTES * ranks


def _names(run: ScaledRun, ranks: int) -> Load:
    starts, limits = run.known.starts, run.known.limits
    demand = run.nodes(ranks) * (starts.names.value + run.ranks_per_node * starts.opens.value)
    return Load(
        "names and files of Python and its packages", "start", demand, "file operations", limits.start_patience.value,
        limits.file_operations.value, Basis.MEASURED,
        f"one start asks for {starts.names.value:,.0f} different names, in {starts.name_calls.value:,.0f} calls, and "
        f"opens {starts.opens.value:,.0f} files; law: names once for each node, opened files once for each rank",
        "resources.container brings the environment as one image; nothing else in the program makes it less",
    )  # fmt: skip


def _program(run: ScaledRun, ranks: int) -> Load:
    starts, limits = run.known.starts, run.known.limits
    demand = run.nodes(ranks) * (starts.file_bytes.value + starts.library_bytes.value)
    return Load(
        "bytes of Python and its packages", "start", demand, "bytes", limits.start_patience.value,
        limits.shared_bandwidth.value, Basis.ASSUMED,
        f"{starts.file_bytes.value / 1e6:,.0f} MB of Python's files (measured), "
        f"{starts.library_bytes.value / 1e9:.1f} GB of libraries with CUDA (assumed); law: once for each node",
        "the ranks of a node share the kernel's page cache; resources.container brings one image",
    )  # fmt: skip


def _store(run: ScaledRun, ranks: int) -> Load:
    starts, limits = run.known.starts, run.known.limits
    return Load(
        "connections to the store of the ranks", "start", ranks * starts.store_connections.value, "descriptors", 1.0,
        limits.open_files.value, Basis.MEASURED,
        f"{starts.store_connections.value:.0f} for each rank, with 2 and 3 ranks; law: linear",
        "rank 0 holds the store, and raises its limit of open files up to the hard one before it listens; where that "
        "is too low, it says so at once",
    )  # fmt: skip


def _store_polls(run: ScaledRun, ranks: int) -> Load:
    return Load(
        "questions to the store of the ranks", "step", ranks, "requests", 1.0, run.known.limits.store_requests.value,
        Basis.SIMULATED, "each watchdog asks once a second whether there is an alarm; law: linear",
        "it asks for one key, which is all that it exchanges while nothing is wrong",
    )  # fmt: skip


def _indexes(run: ScaledRun, ranks: int) -> Load:
    starts, limits = run.known.starts, run.known.limits
    readers = ranks if run.remote else run.nodes(ranks)
    return Load(
        "bytes of the index of the shards", "start", readers * index_bytes(run), "bytes", limits.start_patience.value,
        limits.shared_bandwidth.value, Basis.MEASURED,
        f"{starts.index_shard_bytes.value:.0f} bytes for each of {run.shards:,} shards; law: linear; once for each "
        + ("rank" if run.remote else "node"),
        "every rank reads and checks the whole index itself"
        + ("" if run.remote else ", through the page cache of its node"),
    )  # fmt: skip


def _shards_looked_at(run: ScaledRun) -> Load:
    seconds = looking_at_shards_seconds(run.shards, remote=run.remote, figures=run.figures)
    looks = "a page for 1,000 shards, one after the other" if run.remote else "one look at each shard, 32 at a time"
    return Load(
        "the leader's look at every shard", "start", seconds, "seconds", run.known.limits.start_patience.value, 1.0,
        Basis.SIMULATED, f"{looks}; law: linear in shards, the same for all numbers of ranks",
        "rank 0 alone looks, and the others wait for it where the ranks meet, at most watchdog.setup_seconds",
    )  # fmt: skip


def _checkpoint_looked_at(run: ScaledRun, ranks: int) -> Load:
    files, limits = (run.kept_checkpoints + 1) * (ranks + 3), run.known.limits
    name, design = "the leader's look at the files of checkpoints", (
        "the leader lists what is kept, chooses the checkpoint for all, and sees whether its files have their sizes; "
        "the others hash theirs"
    )  # fmt: skip
    if run.remote:
        return Load(
            name, "start", -(-files // _LISTED), "pages of a listing", limits.start_patience.value, limits.lists.value,
            Basis.SIMULATED, "one listing of all that are kept and one of the chosen; law: ranks / 1,000", design,
        )  # fmt: skip
    return Load(
        name, "start", files, "file operations", limits.start_patience.value, limits.file_operations.value,
        Basis.SIMULATED, "one look at each file of all that are kept, and one more at those of the chosen, 32 at a "
        "time; law: linear in ranks", design,
    )  # fmt: skip


def _manifest(run: ScaledRun, ranks: int) -> Load:
    limits = run.known.limits
    readers = ranks if run.remote else run.nodes(ranks)
    return Load(
        "bytes of the checkpoint's manifest", "start", readers * manifest_bytes(run, ranks), "bytes",
        limits.start_patience.value, limits.shared_bandwidth.value, Basis.SIMULATED,
        f"{fragments(run, ranks):,} ranges of parameters and {ranks:,} files, "
        f"{manifest_bytes(run, ranks) / 1e6:,.1f} MB, read by each "
        + ("rank" if run.remote else "node") + "; law: linear in ranks, and with ZeRO 3 in ranks x tensors",
        "a rank saves contiguous ranges, so that ZeRO 1 and 2 add one range for each rank",
    )  # fmt: skip


def _state(run: ScaledRun, ranks: int) -> Load:
    limits = run.known.limits
    if run.remote:
        pieces = -(-run.state_bytes // ranks // PIECE) * ranks
        return Load(
            "requests for the state in the checkpoint", "start", pieces, "GET requests", limits.start_patience.value,
            limits.prefix_gets.value, Basis.SIMULATED, "pieces of 16 MiB of each rank's file; law: the bytes, at least "
            "one for each rank", "each rank downloads only the files that it needs, and hashes them on the way",
        )  # fmt: skip
    return Load(
        "bytes of the state in the checkpoint", "start", run.state_bytes, "bytes", limits.start_patience.value,
        limits.shared_bandwidth.value, Basis.SIMULATED,
        "each file is read once, by the rank that wrote it; law: the same for all numbers of ranks",
        "each rank hashes the files that the same rank wrote, and then finds them in its page cache",
    )  # fmt: skip


def _verified_records(run: ScaledRun, ranks: int) -> Load:
    limits, seconds = run.known.limits, run.shards * run.known.starts.verified_line_seconds.value
    megabytes = run.shards * _VERIFIED_BYTES / 1e6
    return Load(
        "the look at which shards are verified", "start", run.shards + 2 * ranks, "file operations",
        limits.start_patience.value, limits.file_operations.value, Basis.SIMULATED,
        "each rank looks at its share of the shards and opens its own record, and the leader, where some are left, the "
        f"records of all, together {megabytes:,.0f} MB and {seconds:,.0f} s once all shards are verified; law: linear "
        "in shards and ranks",
        "each shard is hashed by one rank alone and never again; the leader tells the others what is in the records of "
        "other ranks, as after a change of their number; data.verify_shards: false leaves it out",
    )  # fmt: skip

"""The result of `coatnet plan --rehearse` as tables."""

from rich.console import Console
from rich.text import Text

from data.text.counted import counted
from jobs.console import make_table, print_line
from pipeline.rehearsal.partitions import PartitionSizes, Share
from pipeline.rehearsal.record import Rehearsal, RehearsedRank
from pipeline.rehearsal.reshape import Reshape
from pipeline.rehearsal.sample_shares import StepShare

_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}
_MOST_SHARDS = 6


def show_rehearsal(found: Rehearsal, console: Console) -> None:
    """Print what each rehearsed rank holds, saves and reads, what was checked over all ranks, and what would fail."""
    print_line(
        console,
        (f"{found.recipe}, stage {found.stage}", "bold"),
        f": {found.model} with {found.parameters:,} parameters, {found.precision}, ZeRO {found.zero_stage}, on "
        f"{counted(found.ranks, 'rank')} of {counted(found.nodes, 'node')}, {found.ranks_per_node} on each; "
        f"{counted(found.micro_batches_per_rank, 'micro-batch', 'micro-batches')} a step and rank",
    )
    _partitions(found, console)
    _checkpoint(found, console)
    _samples(found, console)
    for reshape in found.reshapes:
        _reshape(reshape, console)
    _consistency(found, console)
    _lines("answered for others, or left out", found.answered, console)
    _lines("assumed", found.assumed, console)
    _findings(found, console)
    print_line(console, "")
    print_line(
        console,
        f"rehearsed in {found.seconds:.1f} s; the largest process had {found.peak_bytes / 1e6:,.0f} MB of memory",
    )


def _partitions(found: Rehearsal, console: Console) -> None:
    _heading(console, "what a rank holds during training, padding included")
    kinds = ("weights", "gradients", "masters", "moments", "average", "all")
    table = make_table("rank", "ZeRO", *kinds, "elements", "padding", right=(*kinds, "elements", "padding"))
    for one in found.rehearsed:
        for sizes in one.partitions:
            style = "bold" if sizes.zero_stage == found.zero_stage else ""
            table.add_row(*_sizes_row(one, sizes), style=style)
    console.print(table)
    print_line(
        console,
        f"  elements and padding of what AdamW updates; ZeRO {found.zero_stage}, that of the recipe, by DeepSpeed's "
        "engine, the others by arithmetic",
    )


def _sizes_row(one: RehearsedRank, sizes: PartitionSizes) -> list[str]:
    updated = sizes.masters if sizes.masters.elements else sizes.weights
    shares: list[Share | None] = [sizes.weights, sizes.gradients, sizes.masters, sizes.moments, sizes.average]
    shown = [_size(share.bytes) if share is not None and share.bytes else "" for share in shares]
    own = (f"{updated.elements:,}", f"{updated.padding:,}")
    return [str(one.rank), str(sizes.zero_stage), *shown, _size(sizes.bytes), *own]


def _checkpoint(found: Rehearsal, console: Console) -> None:
    whole = found.checkpoint
    _heading(console, f"a checkpoint: {counted(whole.files, 'file')}, {_size(whole.bytes)}")
    table = make_table("rank", "node", "file", "bytes", "fragments", right=("bytes", "fragments"))
    for one in found.rehearsed:
        for file in one.files:
            table.add_row(str(one.rank), str(one.node), file.name, f"{file.bytes:,}", f"{file.fragments:,}")
    console.print(table)
    print_line(
        console,
        f"  files of ranks have {_size(whole.smallest_rank_file)} to {_size(whole.largest_rank_file)}; the manifest "
        f"has {counted(whole.fragments, 'fragment')}, and its bytes are known but for some hundred",
    )


def _samples(found: Rehearsal, console: Console) -> None:
    data = found.data
    if data is None:
        return
    made_up = ", made up" if data.assumed else ""
    _heading(
        console,
        f"samples: {data.samples:,} of {data.classes:,} classes in {counted(data.shards, 'shard')} of "
        f"{_size(data.shard_bytes)}{made_up}; {counted(data.steps, 'step')}",
    )
    table = make_table("step", "rank", "positions", "samples", "epoch", "first ids", "shards", right=("samples",))
    for number in range(len(found.rehearsed[0].steps)):
        for one in found.rehearsed:
            table.add_row(*_share_row(one.steps[number]))
    console.print(table)
    if found.cache is not None:
        need = found.cache
        parts = f"{_size(need.training_bytes)} for training and {_size(need.evaluation_bytes)} for the evaluation"
        if need.remote:
            print_line(console, f"  a node keeps at most {parts} in its cache of {_size(need.cache_bytes)}")
        else:
            print_line(
                console, f"  the shards are on a file system, so nothing is cached; if they were remote: {parts}"
            )


def _share_row(share: StepShare) -> list[str]:
    last = share.first_position + share.samples - 1
    names = ", ".join(map(str, share.shards[:_MOST_SHARDS]))
    more = f" and {len(share.shards) - _MOST_SHARDS} more" if len(share.shards) > _MOST_SHARDS else ""
    return [
        f"{share.step:,}",
        str(share.rank),
        f"{share.first_position:,} to {last:,}",
        f"{share.samples:,}",
        ", ".join(map(str, share.epochs)),
        ", ".join(map(str, share.first_ids)),
        f"{names}{more}",
    ]


def _reshape(found: Reshape, console: Console) -> None:
    _heading(console, f"{found.to_ranks} ranks that read the checkpoint {found.source}")
    table = make_table(
        "rank", "reads from", "pieces", "state", "verifies", "if remote, downloads",
        right=("pieces", "state", "verifies", "if remote, downloads"),
    )  # fmt: skip
    for one in found.ranks:
        table.add_row(
            str(one.rank),
            _named(one.files),
            f"{one.pieces:,}",
            _size(one.state_bytes),
            _size(one.hashed_bytes),
            _size(one.downloaded_bytes),
        )
    console.print(table)
    print_line(
        console,
        f"  written by {counted(found.from_ranks, 'rank')}, {_size(found.checkpoint_bytes)}; all ranks read "
        f"{_size(found.state_bytes)}, none of them from more than {counted(found.most_files, 'file')}; each of the "
        f"{found.elements:,} elements is in exactly one place",
    )
    if found.refused:
        print_line(console, "  ", ("a start on so many ranks fails", "bold red"), f": {found.refused}")


def _named(files: tuple[str, ...]) -> str:
    ranks = [name.removesuffix(".safetensors") for name in files if name.startswith("rank-")]
    others = [name for name in files if not name.startswith("rank-")]
    if len(ranks) > 4:
        ranks = [f"{counted(len(ranks), 'file')} from {ranks[0]} to {ranks[-1]}"]
    return ", ".join([*ranks, *others])


def _consistency(found: Rehearsal, console: Console) -> None:
    checked = found.consistency
    _heading(console, f"checked over all {found.ranks:,} ranks")
    stages = ", ".join(map(str, checked.elements_owned_once))
    print_line(
        console, f"  every one of {found.parameters:,} elements is saved by exactly one rank, with ZeRO {stages}"
    )
    for step, samples in checked.samples_seen_once.items():
        print_line(console, f"  every one of the {samples:,} samples of step {step:,} is read by exactly one rank")
    print_line(
        console,
        f"  {counted(checked.files_named_once, 'file')} of a checkpoint beside the manifest have different names",
    )
    print_line(
        console,
        f"  {counted(checked.engines_as_computed, 'engine')} of DeepSpeed, of the ranks above, hold and save to the "
        "element and byte what was computed for the others",
    )


def _findings(found: Rehearsal, console: Console) -> None:
    _heading(console, "what would fail")
    table = make_table("", "what", "fix")
    for finding in found.findings:
        table.add_row(Text(finding.level, _COLOURS[finding.level]), Text(finding.what), Text(finding.fix))
    console.print(table)


def _lines(title: str, lines: tuple[str, ...], console: Console) -> None:
    if not lines:
        return
    _heading(console, title)
    for line in lines:
        print_line(console, f"  - {line}")


def _heading(console: Console, text: str) -> None:
    print_line(console, "")
    print_line(console, (text, "bold"))


def _size(size: int) -> str:
    if size >= 1e12:
        return f"{size / 1e12:,.2f} TB"
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"

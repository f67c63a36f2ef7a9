"""The plan of a stage as tables."""

from rich.console import Console
from rich.table import Table

from data.remote.storage import is_remote
from data.text.counted import counted
from jobs.console import make_table, print_line
from jobs.planning.failures import duration
from jobs.planning.paper import PRINTED
from pipeline.planner.alternatives import Alternative, policy_name
from pipeline.planner.ranges import Range
from pipeline.planner.stage_plan import StagePlan

_DAY = 24.0


def show_plan(plan: StagePlan, console: Console) -> None:
    """Print what the stage costs and needs, other settings of it, and last what to set."""
    for show in (_introduction, _cost, _step, _memory, _alternatives, _loads, _paper, _remarks, _recommended):
        show(plan, console)


def _introduction(plan: StagePlan, console: Console) -> None:
    stage, cluster = plan.stage, plan.cluster
    print_line(
        console,
        (f"{plan.name} of {plan.recipe}", "bold"),
        f": {stage.model.name} at {stage.resolution} pixels, {stage.precision}, ZeRO {stage.zero_stage}, "
        f"{policy_name(stage.activation_checkpointing)}{', compiled' if stage.compile else ''}",
    )
    gpus = f"{counted(cluster.gpus, 'GPU')} {cluster.gpu.kind} of {cluster.memory / 1e9:g} GB"
    print_line(console, f"on {gpus} in {counted(cluster.nodes, 'node')}")
    if plan.is_measured:
        print_line(console, ("measured", "green"), " on such a GPU; communication and loads are estimates")
    else:
        print_line(console, ("estimate", "yellow"), ": no step was measured on such a GPU; ranges are in brackets")
    dataset = plan.dataset
    print_line(
        console,
        f"{dataset.samples:,} images of {counted(dataset.classes, 'class', 'classes')} in "
        f"{counted(dataset.shards, 'shard')}: {dataset.source}",
    )


def _cost(plan: StagePlan, console: Console) -> None:
    _heading(console, "the stage")
    step, cost, cluster = plan.step, plan.cost, plan.cluster
    table = _pairs()
    table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row("multiply-adds of an image", f"{plan.multiply_adds / 1e9:,.2f} billion")
    table.add_row("steps", f"{plan.steps:,} of {plan.stage.batch.global_size:,} images")
    table.add_row("a step", milliseconds(step.seconds))
    table.add_row("images per second", f"{with_range(step.images_per_second, ',.0f')}; of each GPU "
                  f"{step.images_per_second.value / cluster.gpus:,.1f}")  # fmt: skip
    table.add_row("MFU", with_range(step.utilization * 100, ".1f", " %"))
    table.add_row("FLOPs of a step on each GPU", f"{step.model_flops / 1e12:,.1f} TFLOP; executed "
                  f"{step.executed_flops / 1e12:,.1f}")  # fmt: skip
    table.add_row("time", f"{with_range(cost.hours, ',.1f')} hours, {cost.hours.value / _DAY:,.1f} days")
    whole = cost.hours_with_failures
    useful = f"{plan.useful.failures:,.2f} failures, {plan.useful.exact:.2%} of the time useful"
    table.add_row(
        "with starts and failures",
        f"{with_range(whole, ',.1f')} hours; {useful}" if whole else "never done: failures come too often",
    )
    table.add_row("GPU-hours", f"{with_range(cost.gpu_hours, ',.0f')}; {cost.gpu_hours.value / _DAY:,.0f} GPU-days")
    table.add_row("energy", with_range(cost.energy * 1e-3, ",.2f", " MWh"))
    if cost.price is not None:
        table.add_row("price", with_range(cost.price, ",.0f"))
    console.print(table)


def _step(plan: StagePlan, console: Console) -> None:
    _heading(console, "a step of each GPU")
    step = plan.step
    table = make_table("part", "times", "ms each", "ms", right=("times", "ms each", "ms"))
    rounds = step.micro_batches
    for name, part in (("forward", step.forward), ("recomputation", step.recomputation), ("backward", step.backward)):
        if part.value:
            table.add_row(name, f"{rounds:,}", f"{1e3 * part.value:,.1f}", f"{1e3 * rounds * part.value:,.1f}")
    table.add_row("optimizer", "1", f"{1e3 * step.optimizer.value:,.1f}", f"{1e3 * step.optimizer.value:,.1f}")
    for one, seconds in zip(step.collectives, step.communication.each, strict=True):
        what = f"{one.kind.replace('_', '-')} of {one.what}, {one.bytes / 1e9:,.2f} GB"
        place = "during the backward" if one.during_backward else "exposed"
        spent = 1e3 * seconds.value
        table.add_row(f"{what}, {place}", f"{one.times:,}", f"{spent / one.times:,.1f}", f"{spent:,.1f}")
    exposed = step.communication.exposed
    if step.collectives:
        table.add_row("communication that nothing hides", "", "", f"{1e3 * exposed.value:,.1f}")
    table.add_row("the host issues kernels for", "", "", f"{1e3 * step.issuing.value:,.1f}")
    console.print(table)
    shares = sum(step.kinds.values())
    kinds = ", ".join(f"{kind} {seconds / shares:.0%}" for kind, seconds in step.kinds.items())
    print_line(console, f"micro-batches by the kind of operation: {kinds}")


def _memory(plan: StagePlan, console: Console) -> None:
    _heading(console, "memory of a GPU")
    table = make_table("kind", "GB", right=("GB",))
    for kind, size in plan.memory.kinds.items():
        table.add_row(kind, f"{size / 1e9:,.2f}")
    table.add_row("together", f"{plan.memory.needed / 1e9:,.2f} of {plan.memory.size / 1e9:,.1f}")
    console.print(table)
    share = plan.cluster.law.fragmentation.value
    print_line(
        console, f"the reserve is an assumption: CUDA, its libraries, and {share:.0%} of activations for fragmentation"
    )


def _alternatives(plan: StagePlan, console: Console) -> None:
    _heading(console, f"other settings with the same result, in micro-batches of {plan.stage.batch.micro_size}")
    right = ("GB", "largest micro-batch", "ms a step", "images/s")
    table = make_table("settings", *right, "", right=right)
    for one in plan.alternatives:
        table.add_row(one.name, *alternative_cells(one))
    console.print(table)


def alternative_cells(one: Alternative) -> tuple[str, ...]:
    """Its memory, largest micro-batch, time, speed, and remark."""
    step = one.step
    return (
        f"{one.memory.needed / 1e9:,.1f}",
        str(one.largest_micro_size or "none"),
        f"{1e3 * step.seconds.value:,.1f}" if step else "",
        f"{step.images_per_second.value:,.0f}" if step else "",
        ", ".join((*(["the recipe's"] if one.is_own else []), *([] if step else ["does not fit"]))),
    )


def _loads(plan: StagePlan, console: Console) -> None:
    _heading(console, "nodes and storage")
    table = _pairs()
    loader, shards, saves = plan.loader, plan.shards, plan.checkpoints
    table.add_row("images that a node reads", f"{with_range(loader.images_per_second, ',.0f')} per second")
    table.add_row("cores for that", f"{with_range(loader.cores, ',.1f')} of a node, "
                  f"{with_range(loader.cores_per_gpu, ',.2f')} for each GPU")  # fmt: skip
    remote = "" if is_remote(plan.stage.data.train or "") else ", if they were remote"
    speed = with_range(shards.bytes_per_second * 1e-6, ",.0f", " MB/s")
    table.add_row(f"downloads of shards{remote}", f"{speed} by all nodes, "
                  f"{shards.bytes_per_second_of_node.value / 1e6:,.0f} MB/s by each; "
                  f"{with_range(shards.requests_per_second, ',.2f')} GET requests per second")  # fmt: skip
    if shards.times_downloaded > 1:
        table.add_row("", f"each shard by {shards.times_downloaded:.3g} nodes on average, which share a lane")
    table.add_row("checkpoints", f"{saves.saves:,} of {_size(saves.bytes)}, one every {saves.every_steps:,} steps = "
                  f"{saves.between.value / 60:,.0f} min")  # fmt: skip
    table.add_row("storage for them", f"{saves.kept:,} of them kept, {_size(saves.kept_bytes)}; at most "
                  f"{_size(saves.most_bytes)}")  # fmt: skip
    table.add_row("a save", f"holds training up for {duration(saves.cost.stall)}, and counts "
                  f"{duration(saves.cost.write)} later")  # fmt: skip
    best = plan.intervals.best
    table.add_row("best time between saves", f"{best.steps:,} steps = {duration(best.seconds)}: {best.share:.2%} "
                  f"useful, and {plan.intervals.own.share:.2%} with the recipe's")  # fmt: skip
    console.print(table)


def _paper(plan: StagePlan, console: Console) -> None:
    """What the paper's models took, beside this stage."""
    if not any(one.recipe == plan.recipe for one in PRINTED) or plan.stage.start_from is not None:
        return
    _heading(console, "pretraining as the paper prints it, beside this plan")
    table = make_table("model", "data", "TPUv3-core-days", "top-1 at 512", f"{plan.cluster.gpu.kind}-days", right=())
    for one in PRINTED:
        own = f"{plan.cost.gpu_hours.value / _DAY:,.0f}" if one.recipe == plan.recipe else ""
        table.add_row(one.model, one.data, one.core_days, f"{one.top1:g} %", own)
    console.print(table)


def _remarks(plan: StagePlan, console: Console) -> None:
    if plan.remarks:
        _heading(console, "not counted, or to be known")
    for remark in plan.remarks:
        print_line(console, f"  {remark}")


def _recommended(plan: StagePlan, console: Console) -> None:
    found = plan.recommended
    print_line(console, "")
    if not found.fits:
        print_line(console, ("nothing fits", "bold red"), " on these GPUs, not even one image; the least is:")
    print_line(console, (f"recommended for stage {plan.name}:", "bold"))
    for key, value in found.settings.items():
        changed = key in found.changes
        print_line(
            console, "  ", (f"{key}={value}", "green" if changed else ""),
            f"  # {found.reasons[key]}" + ("" if changed else ", as in the recipe"),
        )  # fmt: skip


def with_range(found: Range, form: str, unit: str = "") -> str:
    """A figure, with its ends in brackets if it has any."""
    value = f"{found.value:{form}}{unit}"
    return value if found.is_exact else f"{value} [{found.least:{form}} to {found.most:{form}}]"


def milliseconds(seconds: Range) -> str:
    """The seconds in milliseconds, or in seconds if they are many."""
    if seconds.most >= 60:
        return with_range(seconds, ",.1f", " s")
    return with_range(seconds * 1e3, ",.1f", " ms")


def _pairs() -> Table:
    """A table of names and values, without headings."""
    table = make_table("", "")
    table.show_header = False
    return table


def _size(size: float) -> str:
    return f"{size / 1e12:,.2f} TB" if size >= 1e12 else f"{size / 1e9:,.1f} GB"


def _heading(console: Console, text: str) -> None:
    print_line(console, "")
    print_line(console, (text, "bold"))

"""The record of `coatnet bench gpu` as tables."""

from rich.console import Console

from jobs.console import make_table, print_line
from pipeline.burn_in.verdict import suspects
from pipeline.gpu_benchmark.record import GpuBenchmark, StepsRun, VariantRun, Work
from pipeline.gpu_benchmark.variants import ROUNDING

_WORK = ("ms", "TFLOP/s", "GB/s", "least ms", "of roofline")


def show_benchmark(found: GpuBenchmark, console: Console) -> None:
    """Print what was measured, what was not, and last what to set."""
    print_line(console, _device(found))
    for show in (
        _step,
        _equal_bits,
        _burn_in,
        _variants,
        _parts,
        _operations,
        _copies,
        _saves,
        _micro_batches,
        _unmeasured,
    ):
        show(found, console)
    print_line(console, "")
    if not found.choices:
        print_line(console, "set in the recipe: nothing, since what would decide was not measured")
        return
    print_line(console, (f"set in the recipe, for stage {found.stage}:", "bold"))
    for choice in found.choices:
        value = str(choice.value).lower()
        print_line(console, "  ", (f"{choice.setting}={value}", "green"), f"  # {choice.reason}")


def _device(found: GpuBenchmark) -> str:
    device = found.device
    parts = [device.name, f"torch {device.torch}"]
    for name, value in (("driver", device.driver), ("CUDA", device.cuda), ("NCCL", device.nccl)):
        parts += [f"{name} {value}"] if value else []
    if device.memory_bytes:
        parts.append(f"{device.memory_bytes / 1e9:.0f} GB")
    if device.peak and device.bandwidth:
        peaks = f"{device.peak / 1e12:,.0f} TFLOP/s in bf16, {device.bandwidth / 1e12:.2f} TB/s"
        parts.append(f"by its data sheet {peaks}" + ("; no roofline for fp32" if found.precision == "fp32" else ""))
    elif device.is_gpu:
        parts.append("its peaks are not in the table, so there is no roofline")
    else:
        parts.append("no peak is known, so there is no roofline")
    return ", ".join(parts)


def _step(found: GpuBenchmark, console: Console) -> None:
    step = found.step
    if step is None:
        return
    utilization = f", MFU {found.utilization:.1%}" if found.utilization is not None else ""
    _heading(console, "a step of the recipe")
    print_line(
        console,
        f"  {step.step_milliseconds:,.1f} ms, median of {step.timed_steps}; {step.images_per_second:,.0f} images/s"
        f"{utilization}; the first step took {step.first_step_seconds:.1f} s",
    )
    print_line(console, f"  memory {_gigabytes(step.peak_bytes)}, by estimate {_gigabytes(found.estimated_bytes)}")
    print_line(console, "  ", _losses(step))


def _losses(step: StepsRun) -> tuple[str, str]:
    shown = ", ".join("not finite" if loss is None else f"{loss:.4f}" for loss in step.losses)
    return (f"losses {shown}", "red" if None in step.losses else "")


def _equal_bits(found: GpuBenchmark, console: Console) -> None:
    if not found.equal_bits:
        return
    _heading(console, "two runs of the same steps")
    for one in found.equal_bits:
        setting = f"  deterministic: {str(one.deterministic).lower()}  "
        if one.equal:
            print_line(console, setting, ("equal to the bit", "green"))
        else:
            step = one.first_step_that_differs
            where = f"the loss of step {step}" if step else "the weights, not the losses"
            print_line(console, setting, (f"not equal: {where}", "red" if one.deterministic else "yellow"))
    if found.cost_of_determinism is not None:
        print_line(console, f"  a step takes {found.cost_of_determinism:+.1%} with deterministic: true")
    if not found.device.is_gpu:
        print_line(console, "  on CPUs the setting has no effect: all algorithms are deterministic")


def _burn_in(found: GpuBenchmark, console: Console) -> None:
    if found.burn_in is None:
        return
    _heading(console, "one micro-batch again and again, deterministic")
    wrong = {one.device.where: one for one in suspects(found.burn_in.devices)}
    for device in found.burn_in.devices:
        if device.problem is not None:
            print_line(console, f"  {device.text}: ", (f"not computed: {device.problem}", "yellow"))
        elif device.where in wrong:
            print_line(console, "  ", (wrong[device.where].text, "bold red"))
        else:
            times = f"{device.repetitions:,} times in {device.seconds:.1f} s: "
            print_line(console, f"  {device.text}: {times}", ("equal to the bit", "green"))
    kinds = {device.kind for device in found.burn_in.devices}
    if len(kinds) > 1:
        print_line(console, f"  there are {len(kinds)} kinds of GPUs, which are not compared with each other")


def _variants(found: GpuBenchmark, console: Console) -> None:
    if not found.variants:
        return
    _heading(console, "variants")
    right = ("ms", "images/s", "memory", "first step", "difference of losses")
    table = make_table("variant", *right, "", right=right)
    for one in found.variants:
        run = one.run
        if run is None:
            table.add_row(one.name, "", "", "", "", "", f"not measured: {one.not_run}")
            continue
        difference = "" if one.loss_difference is None else f"{one.loss_difference:.1e}"
        table.add_row(
            one.name, f"{run.step_milliseconds:,.1f}", f"{run.images_per_second:,.0f}", _gigabytes(run.peak_bytes),
            f"{run.first_step_seconds:.1f} s", difference, _verdict(one, found.precision),
        )  # fmt: skip
    console.print(table)
    print_line(console, f"  losses count as equal up to {ROUNDING[found.precision]:.0e} of them in {found.precision}")


def _verdict(one: VariantRun, precision: str) -> str:
    if one.loss_difference is None:
        return "not compared: a loss is not finite, or there is no eager one"
    return "equal up to rounding" if one.loss_difference <= ROUNDING[precision] else "DIFFERENT losses"


def _parts(found: GpuBenchmark, console: Console) -> None:
    if not found.parts:
        return
    _heading(console, f"parts: forward and backward of one micro-batch of {found.micro_size}, no sample dropped")
    table = make_table("part", *_WORK, right=_WORK)
    for one in found.parts:
        table.add_row(one.name, *_cells(one.work))
    if found.step is not None:
        table.add_row("optimizer, once a step", *_cells(found.step.optimizer))
    console.print(table)


def _operations(found: GpuBenchmark, console: Console) -> None:
    if not found.operations:
        return
    _heading(console, "operations at the shapes of the stage, eager")
    table = make_table("kind", "what", *_WORK, "", right=_WORK)
    for one in found.operations:
        cells = _cells(one.work) if one.work else [""] * len(_WORK)
        table.add_row(one.kind, one.what, *cells, one.not_run or "")
    console.print(table)


def _cells(work: Work) -> list[str]:
    least = "" if work.least_milliseconds is None else f"{work.least_milliseconds:,.3f}"
    share = "" if work.roofline_share is None else f"{work.roofline_share:.0%}"
    return [
        f"{work.milliseconds:,.3f}", f"{work.teraflops:,.3g}", f"{work.gigabytes_per_second:,.4g}", least, share,
    ]  # fmt: skip


def _copies(found: GpuBenchmark, console: Console) -> None:
    if not found.copies:
        return
    _heading(console, "copies")
    for one in found.copies:
        print_line(console, f"  {one.name}: {one.gigabytes_per_second:.1f} GB/s")


def _saves(found: GpuBenchmark, console: Console) -> None:
    saves = found.saves
    if saves is None:
        return
    _heading(console, f"saves of {_gigabytes(saves.bytes)} to {saves.folder}, the state of all ranks")
    pairs = zip(saves.stall_milliseconds, saves.published_seconds, strict=True)
    for which, (stall, seconds) in zip(("first", "second"), pairs, strict=True):
        rate = saves.bytes / stall / 1e6
        print_line(
            console, f"  {which}: steps waited {stall:,.1f} ms ({rate:.2f} GB/s), complete after {seconds:.2f} s"
        )


def _micro_batches(found: GpuBenchmark, console: Console) -> None:
    if not found.micro_batches:
        return
    _heading(console, "micro-batches, each in two steps of one")
    table = make_table("images", "", "memory", "by estimate", right=("images", "memory", "by estimate"))
    for one in found.micro_batches:
        fits = "fits" if one.fits else "does not fit"
        held = _gigabytes(one.peak_bytes) if one.fits else ""
        table.add_row(str(one.micro_size), fits, held, _gigabytes(one.estimated_bytes))
    console.print(table)


def _unmeasured(found: GpuBenchmark, console: Console) -> None:
    if not found.unmeasured:
        return
    _heading(console, "not measured")
    for one in found.unmeasured:
        mark = ("failed", "red") if one.failed else ("left out", "yellow")
        print_line(console, f"  {one.name}: ", mark, f", {one.reason}")


def _heading(console: Console, text: str) -> None:
    print_line(console, "")
    print_line(console, (text, "bold"))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

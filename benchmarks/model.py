"""Whole models: forward, training step and peak memory, ours eager and compiled, and timm's where it can be imported.

    python -m benchmarks.model                                   # coatnet_0 at 224 on this machine
    python -m benchmarks.model --variants coatnet_0 coatnet_3 coatnet_5 --dtype bf16 --batch 64 --compile
    python -m benchmarks.model --policy none mbconv every_block
    python -m benchmarks.model --variants coatnet_6 coatnet_7 --dtype bf16 --batch largest --policy every_block
    python -m benchmarks.model --variants coatnet_5 --dtype bf16 --batch 32 --where

timm's models are `coatnet_N_224` as registered (average pooling, strided depthwise convolutions) and, to compare one
network, `like ours`: timm's blocks with the paper's choices and our weights, whose logits are compared with ours.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import interleaved, machine, peak_mebibytes, report
from models.coatnet import CoAtNet
from models.complexity import count_costs
from models.registry import create_model
from models.variants import VARIANTS
from pipeline.ranks.gpus import PEAKS, known_gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["coatnet_0"], choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", default="8", help="images of a micro-batch, or `largest` that fits the GPU")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--drop-path-rate", type=float, default=0.0)
    parser.add_argument(
        "--policy", nargs="+", default=["none"], help="activation checkpointing of ours, one or several"
    )
    parser.add_argument("--compile", action="store_true", help="ours and timm's compiled as well")
    parser.add_argument("--where", action="store_true", help="the time of a training step by kind of block")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)  # contestant and mode, in a process of its own
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(_peak_here(arguments, *arguments.peak_of))
        return
    device = torch.device(arguments.device)
    print(f"{machine(device)}; {arguments.dtype}, {arguments.image_size} pixels")
    if arguments.where:
        _report_blocks(arguments)
        return
    rows = [row for variant in arguments.variants for row in _rows(arguments, variant)]
    report("Speed is relative to timm's registered model, or else to the first.", rows, arguments.json)


def _rows(arguments: argparse.Namespace, variant: str) -> list[dict[str, Any]]:
    device = torch.device(arguments.device)
    batch = _largest_batch(arguments, variant) if arguments.batch == "largest" else int(arguments.batch)
    x = _images(arguments, batch)
    makers = _makers(arguments, variant)
    models = {name: make() for name, make in makers.items()}
    _compare_with_timm(models, x)
    costs = count_costs(VARIANTS[variant], arguments.image_size)
    operations = 2 * batch * sum(cost.multiply_adds for cost in costs)
    rows = []
    for mode, passes in (("forward", 1), ("training step", 3)):
        runs = {name: _run(model, x, mode) for name, model in models.items()}
        timings = interleaved(runs, rounds=arguments.rounds, device=device)
        baseline = timings.get("timm", next(iter(timings.values())))
        for name, timing in timings.items():
            # Of the arithmetic of our model; recomputation does not count.
            tflops = passes * operations / timing.median / 1e12 if name.startswith("ours") else None
            gpu = known_gpu(device)
            peak = PEAKS[gpu] / 1e12 if gpu else None
            rows.append(
                {
                    "variant": variant,
                    "model": name,
                    "mode": mode,
                    "batch": batch,
                    "ms": timing.median * 1e3,
                    "images/s": batch / timing.median,
                    "speed": timing.speed_against(baseline),
                    "TFLOP/s": tflops or "",
                    "MFU %": 100 * tflops / peak if tflops and peak and arguments.dtype == "bf16" else "",
                    "peak MiB": _peak(arguments, variant, name, mode, batch, models[name], x),
                }
            )
    return rows


def _makers(arguments: argparse.Namespace, variant: str) -> dict[str, Callable[[], nn.Module]]:
    """A function for each contestant that creates it."""
    dtype, device = DTYPES[arguments.dtype], torch.device(arguments.device)

    def ours(policy: str, compiled: bool = False) -> CoAtNet:
        rate = arguments.drop_path_rate
        model = create_model(variant, image_size=arguments.image_size, drop_path_rate=rate, device=device)
        model.set_grad_checkpointing(policy=int(policy) if policy.isdigit() else policy)  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        if compiled:
            model.compile_blocks(dynamic=False)
        return model

    makers: dict[str, Callable[[], nn.Module]] = {}
    for policy in arguments.policy:
        name = "ours" if policy == "none" else f"ours, {policy}"
        makers[name] = partial(ours, policy)
        if arguments.compile:
            makers[f"{name}, compiled"] = partial(ours, policy, compiled=True)
    try:
        from benchmarks.timm_models import import_timm, like_ours

        timm = import_timm()
    except ImportError as error:
        print(f"without timm: {error}")
        timm = None
    registered = f"{variant}_224"
    if timm is not None and timm.is_model(registered):

        def theirs(compiled: bool = False) -> nn.Module:
            rate = arguments.drop_path_rate
            model: nn.Module = timm.create_model(registered, img_size=arguments.image_size, drop_path_rate=rate)
            model = model.to(device, dtype)
            return torch.compile(model) if compiled else model  # type: ignore[return-value]

        makers["timm"] = theirs
        makers["timm like ours"] = lambda: like_ours(ours("none"), variant, 1000).to(device, dtype)
        if arguments.compile:
            makers["timm, compiled"] = partial(theirs, compiled=True)
    return makers


def _images(arguments: argparse.Namespace, batch: int) -> Tensor:
    size = arguments.image_size
    return torch.randn(batch, size, size, 3, device=arguments.device, dtype=DTYPES[arguments.dtype])


def _for(model: nn.Module, x_BHWC: Tensor) -> Tensor:
    """The images in the order that the model takes; timm's is contiguous (B, C, H, W), its default."""
    return x_BHWC if hasattr(model, "compile_blocks") else x_BHWC.permute(0, 3, 1, 2).contiguous()


def _run(model: nn.Module, x_BHWC: Tensor, mode: str) -> Callable[[], None]:
    x = _for(model, x_BHWC)

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            model(x)

    def step() -> None:
        model.train()
        model(x).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return forward if mode == "forward" else step


def _compare_with_timm(models: dict[str, nn.Module], x: Tensor) -> None:
    """Check that the two implementations of the same network compute the same."""
    if not {"ours", "timm like ours"} <= models.keys() or x.dtype != torch.float32:
        return
    # Evaluation first: a forward in training moves timm's running statistics at once.
    for mode in ("evaluation", "training"):
        with torch.no_grad():
            ours, theirs = (
                model.train(mode == "training")(_for(model, x)) for model in (models["ours"], models["timm like ours"])
            )
        difference = (ours - theirs).abs().max().item()
        print(f"greatest difference of a logit between ours and timm like ours in {mode}: {difference:.1e}")
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _peak(
    arguments: argparse.Namespace, variant: str, name: str, mode: str, batch: int, model: nn.Module, x: Tensor
) -> float:
    if arguments.device == "cuda":
        return peak_mebibytes(_run(model, x, mode), torch.device("cuda"))
    command = [
        sys.executable, "-m", "benchmarks.model", "--variants", variant, "--image-size", str(arguments.image_size),
        "--batch", str(batch), "--dtype", arguments.dtype, "--policy", *arguments.policy, "--device", arguments.device,
        "--drop-path-rate", str(arguments.drop_path_rate), "--peak-of", name, mode,
    ]  # fmt: skip
    command += ["--compile"] if "compiled" in name else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _peak_here(arguments: argparse.Namespace, name: str, mode: str) -> float:
    model = _makers(arguments, arguments.variants[0])[name]()
    return peak_mebibytes(_run(model, _images(arguments, int(arguments.batch)), mode), torch.device(arguments.device))


def _largest_batch(arguments: argparse.Namespace, variant: str) -> int:
    """The largest multiple of eight images whose training step fits the GPU beside bf16 weights and gradients."""
    assert arguments.device == "cuda", "the largest micro-batch is that of a GPU"
    model = next(iter(_makers(arguments, variant).values()))()

    def fits(batch: int) -> bool:
        try:
            _run(model, _images(arguments, batch), "training step")()
        except torch.OutOfMemoryError:
            return False
        finally:
            for parameter in model.parameters():
                parameter.grad = None
            torch.cuda.empty_cache()
        return True

    high = 8
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 8:
        middle = (low + high) // 16 * 8
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _report_blocks(arguments: argparse.Namespace) -> None:
    """Forward and backward of one block of each kind alone, times their number."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    for variant in arguments.variants:
        model = create_model(variant, image_size=arguments.image_size, device=device).train()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        if arguments.compile:
            model.compile_blocks(dynamic=False)
        x = _images(arguments, int(arguments.batch))
        costs = count_costs(model.variant, arguments.image_size)
        modules = [model.stem, *model.blocks, model.head]
        names = ["S0 stem"]
        for number, stage in enumerate(model.variant.stages, 1):
            names += [f"S{number} {stage.kind} first"] + [f"S{number} {stage.kind}"] * (stage.depth - 1)
        names.append("head")
        runs: dict[str, Callable[[], None]] = {}
        for name, module in zip(names, modules, strict=True):
            source = x.detach().requires_grad_(name != "S0 stem")
            runs.setdefault(name, _block_step(module, source))
            with torch.no_grad():
                x = module(x)
        timings = interleaved(runs, rounds=arguments.rounds, device=device)
        whole = sum(timings[name].median for name in names)
        rows = []
        for name, timing in timings.items():
            count, cost = names.count(name), costs[names.index(name)]
            operations = 6 * int(arguments.batch) * cost.multiply_adds
            rows.append(
                {
                    "variant": variant,
                    "part": name,
                    "blocks": count,
                    "ms of one": timing.median * 1e3,
                    "share of time %": 100 * count * timing.median / whole,
                    "share of arithmetic %": 100 * count * cost.multiply_adds / sum(c.multiply_adds for c in costs),
                    "TFLOP/s": operations / timing.median / 1e12,
                }
            )
        report(f"Where a training step of {variant} goes", rows, arguments.json)


def _block_step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        y = module(x)
        y.backward(torch.ones_like(y))
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None

    return step


if __name__ == "__main__":
    main()

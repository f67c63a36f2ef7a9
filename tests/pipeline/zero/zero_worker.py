"""One rank of the ZeRO tests: `python zero_worker.py RECIPE FOLDER CASE...`.

A case is STAGE-PRECISION, then -recomputed for activation checkpointing, -compiled, -fused or -overlapped, then -from-CASE. For
each case, four steps into FOLDER/CASE-whole, and again into FOLDER/CASE from the checkpoint of step 2 of that run or of
the case named. FOLDER/CASE-again has that checkpoint loaded and saved again without a step between. A compiled,
fused or overlapped case is only run whole, one that another process left only loaded and saved again, and two ranks do not
continue -from- another case.

A case -checked is `check` on one engine; it leaves what was found in FOLDER/CASE.json.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.coatnet import CoAtNet
from models.norm import discard_recorded_statistics, recorded_statistics
from pipeline import plan as plan_module
from pipeline import train as train_module
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.checkpoints.manifest import NonFiniteRecord
from pipeline.checkpoints.saver import Saver
from pipeline.checkpoints.store import checkpoint_store
from pipeline.errors import ConfigError
from pipeline.faults.preemption import REASONS
from pipeline.faults.watchdog import Watchdog
from pipeline.monitoring.step_clock import StepClock
from pipeline.plan import TrainPlan, plan_stage
from pipeline.precision import autocast, model_dtype
from pipeline.ranks.distributed import Ranks, join_ranks, leave_ranks
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import TrainStage
from pipeline.recipe.section import WhichWeights
from pipeline.runs.run_folder import RunFolder
from pipeline.trained_model import open_trained_model
from pipeline.training.step import StepContext, take_step
from pipeline.training.step_message import StepMessage
from pipeline.training.training_batches import open_stream
from pipeline.training.training_state import TrainingState
from pipeline.weights import build_model, copy_tensors, to_precision
from pipeline.zero import engine as engine_module
from pipeline.zero.engine import ZeroEngine, build_engine
from tests.support.operators import HostReads, Recorded
from tests.support.records import RUN
from tests.support.training import end_here, train_here

COMPILE_BLOCKS = CoAtNet.compile_blocks
CONFIGURATION = engine_module._configuration


def sharded_at_debug_size(stage: TrainStage, ranks: Ranks) -> dict[str, Any]:
    """ZeRO 3 keeps small parameters whole on every rank; of the debug model that would be all."""
    configuration = CONFIGURATION(stage, ranks)
    configuration["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    return configuration


def plan(recipe: str, case: str, ranks: Ranks) -> TrainPlan:
    stage, precision = case.split("-")[:2]
    changes = [
        f"zero_stage={stage}", f"precision={precision}", "pretrain.steps=4", "pretrain.checkpoint.every_steps=2",
    ]  # fmt: skip
    if "recomputed" in case:
        changes.append("activation_checkpointing=every_block")
    if "compiled" in case:
        # Traced and differentiated ahead of time as for real; writing and compiling C++ would take minutes on a CPU.
        CoAtNet.compile_blocks = partialmethod(COMPILE_BLOCKS, backend="aot_eager")  # type: ignore[method-assign, assignment]
        changes.append("compile=true")
    if "overlapped" in case:
        changes += ["communication.overlap=true", "communication.bucket_size=5000"]
    if "fused" in case:
        changes.append("fused_depthwise=true")
    if "checked" in case:
        changes += [f"batch.global_size={6 * ranks.world_size}", "data.lanes=3"]  # two micro-batches on each rank
    planned = plan_stage(load_recipe(Path(recipe), changes), "pretrain", ranks.world_size)
    assert isinstance(planned, TrainPlan)
    return planned


def built(planned: TrainPlan, ranks: Ranks) -> TrainingState:
    return TrainingState(build_engine(build_model(planned), planned.stage, ranks), ranks, planned.stage.ema_decay)


def save(state: TrainingState, planned: TrainPlan, path: Path, step: int, ranks: Ranks) -> None:
    run = RunFolder(path)
    with Saver(checkpoint_store(run, planned.stage), run, planned.stage.checkpoint, ranks) as saver:
        saver.save(state.live(RUN, step, 0, 0, NonFiniteRecord()))
        saver.finish_or_retry()


def save_again(planned: TrainPlan, checkpoint: Path, path: Path, ranks: Ranks) -> None:
    state = built(planned, ranks)
    state.load(open_checkpoint(checkpoint))
    save(state, planned, path, 2, ranks)


def check(planned: TrainPlan, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Differences that should not exist: at the start, after refused steps, swapped averages, and with recomputed blocks.

    The weights that forwards use are compared by their logits.
    """
    precision, device = planned.stage.precision, torch.device("cpu")
    state = built(planned, ranks)
    engine = state.engine
    engine.set_learning_rate(1e-3)
    norms_beside_deepspeed: list[tuple[float, float]] = []
    probe = torch.randn(3, 32, 32, 3, generator=torch.Generator().manual_seed(9)).to(engine.dtype)

    def step(
        seed: int,
        spoiled_by: float | None = None,
        apply: bool = True,
        together: bool = True,
        on_gradient: Callable[[str, Tensor], None] | None = None,
    ) -> tuple[float, Tensor]:
        with engine.micro_batches(2) if together else nullcontext():
            for number in range(2):
                torch.manual_seed(1000 * seed + 10 * ranks.rank + number)
                images, labels = torch.randn(3, 32, 32, 3), torch.randint(3, (3,))
                loss = F.cross_entropy(engine(images.to(engine.dtype)).float(), labels)
                # On the last rank alone, and only in its first micro-batch.
                spoiled = number == 0 and ranks.rank == ranks.world_size - 1
                engine.backward(loss * spoiled_by if spoiled and spoiled_by is not None else loss)
                if number == 0:
                    engine.accumulate()
        statistics = recorded_statistics(engine.module).clone()
        discard_recorded_statistics(engine.module)
        zero: Any = engine._zero
        theirs = zero.scaled_global_norm().item() if not getattr(zero, "compute_grad_norm", True) else None
        norm = engine.step(torch.tensor(0.0 if apply else math.nan), on_gradient).item()
        if theirs is not None:
            norms_beside_deepspeed.append((norm, theirs))
        return norm, statistics

    @torch.no_grad()
    def logits(network: CoAtNet | ZeroEngine) -> Tensor:
        network.eval()
        result: Tensor = network(probe)
        network.train()
        return result

    def snapshot() -> dict[str, Tensor]:
        found = {f"{kind}.{f.parameter}": t.clone() for f in state.fragments for kind, t in f.tensors.items()}
        found |= {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
        return found | {"logits": logits(engine), "steps": torch.tensor(engine.optimizer_steps)}

    @torch.no_grad()
    def restore(found: dict[str, Tensor]) -> None:
        for fragment in state.fragments:
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(found[f"{kind}.{fragment.parameter}"])
        engine.optimizer_steps = int(found["steps"])
        engine.publish_masters()

    def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
        return [name for name in one if not torch.equal(one[name], other[name])]

    def without_engine(which: WhichWeights) -> Tensor:
        with open_trained_model(str(folder / "checkpoints/step-00000001"), which) as trained:
            model = trained.build()
        to_precision(model, model_dtype(precision))
        with autocast(precision, device):
            return logits(model)

    def from_weights(weights: dict[str, Tensor]) -> list[str]:
        """The state that is not what a start from these float32 weights has."""
        model = build_model(planned)
        copy_tensors(weights, dict(model.named_parameters()))
        wrong = [
            f"{kind}.{f.parameter}"
            for f in state.fragments
            for kind in ("master", "ema")
            if not torch.equal(f.tensors[kind], weights[f.parameter].view(-1)[f.start : f.stop])
        ]
        to_precision(model, model_dtype(precision))
        with autocast(precision, device):
            return wrong if torch.equal(logits(engine), logits(model)) else [*wrong, "logits"]

    found: dict[str, Any] = {}
    initial = {name: p.detach().clone() for name, p in build_model(planned).named_parameters()}
    found["initial weights"] = from_weights(initial)
    earlier = {name: 1.1 * p for name, p in initial.items() if not name.startswith("head.classifier.")}
    state.set_weights(earlier)
    found["weights of an earlier stage"] = from_weights(initial | earlier)
    step(0)
    state.update_average()
    before = snapshot()
    found["norms"] = []
    for name, spoiled_by, apply in (("apply", None, False), ("nan", float("nan"), True), ("inf", float("inf"), True)):
        norm, _ = step(1, spoiled_by, apply)
        found["norms"].append(norm)
        found[f"refused by {name}"] = differences(before, snapshot())

    save(state, planned, folder, 1, ranks)
    with state.averaged():
        averaged = logits(engine)
    found["put back"] = differences(before, snapshot())
    found["averaged differ from raw"] = not torch.equal(averaged, before["logits"])
    found["raw alike without engine"] = torch.equal(before["logits"], without_engine("raw"))
    found["averaged alike without engine"] = torch.equal(averaged, without_engine("ema"))

    gradients: list[tuple[str, int, float]] = []

    def see(parameter: str, gradient: Tensor) -> None:
        assert gradient.shape == (gradient.numel(),)
        gradients.append((parameter, gradient.numel(), gradient.double().square().sum().item()))

    with Recorded() as recorded:
        norm, statistics = step(2, on_gradient=see)
    after = snapshot()
    found["gradients seen"], found["norm of them"] = gradients, norm
    found["elements"] = {name: parameter.numel() for name, parameter in initial.items()}
    found["a step changes"] = len(differences(before, after))
    # Which blocks are recomputed is independent of the number of ranks, so one of the two is enough.
    for policy in ("none", "every_block", "mbconv", 2) if ranks.world_size > 1 else ("none",):
        engine.module.set_grad_checkpointing(policy=policy)
        restore(before)
        again, statistics_again = step(2)
        found[f"after {policy}"] = differences(
            after | {"statistics": statistics, "norm": torch.tensor(norm)},
            snapshot() | {"statistics": statistics_again, "norm": torch.tensor(again)},
        )

    engine.module.set_grad_checkpointing(policy="none")
    restore(before)
    with Recorded() as recorded_alone:
        again, statistics_again = step(2, together=False)
    found["after micro-batches apart"] = differences(
        after | {"statistics": statistics, "norm": torch.tensor(norm)},
        snapshot() | {"statistics": statistics_again, "norm": torch.tensor(again)},
    )
    found["casts to bf16"] = [
        sum(cast[1:] == (torch.float32, torch.bfloat16) for cast in one.casts) for one in (recorded, recorded_alone)
    ]
    found["parameters"] = len(initial)

    found["moved"], found["moved without gradient"] = [], []
    for fragment in state.fragments:
        first, last = engine.parameters.without_gradient.get(fragment.parameter, (0, 0))
        for kind in ("master", "exp_avg"):
            moved = fragment.tensors[kind].nonzero().flatten() + fragment.start
            if ((moved >= first) & (moved < last)).any():
                found["moved without gradient"].append(f"{kind}.{fragment.parameter}")
            elif moved.numel() and fragment.parameter.endswith(".bias"):
                found["moved"].append(f"{kind}.{fragment.parameter}")

    with HostReads() as reads, closing(open_stream(planned, ranks.rank, ranks.world_size, 1)) as stream:
        watchdog = Watchdog(planned.stage.watchdog, ranks.rank, ranks.world_size, "node", folder / "log", end_here)
        context = StepContext(engine, planned, ranks, StepClock(device), watchdog)
        message = StepMessage([0.0] * len(REASONS), 0.0, [0.0] * (2 * ranks.world_size))
        assert take_step(context, stream, 1, message).applied
    found["reads of the host"] = reads.modules
    found["norms beside DeepSpeed's"] = norms_beside_deepspeed

    bare = TrainingState(engine, ranks)
    save(bare, planned, folder / "bare", 1, ranks)
    for name, one, path in (("with", state, folder / "bare"), ("without", bare, folder)):
        try:
            one.load(open_checkpoint(path / "checkpoints/step-00000001"))
        except ConfigError as error:
            found[f"refused {name}"] = str(error)
    return found


def main(recipe: str, folder: Path, cases: list[str]) -> None:
    ranks = join_ranks(1)
    engine_module._configuration = sharded_at_debug_size
    # The fused convolution in plain torch, which stages on CPUs are not given.
    for module, name in ((plan_module, "check_fused_depthwise"), (train_module, "check_kernel_device")):
        assert hasattr(module, name)
        setattr(module, name, lambda *_, **__: None)
    for case in cases:
        planned = plan(recipe, case, ranks)
        if "checked" in case:
            found = check(planned, folder / case, ranks)
            (folder / f"{case}-{ranks.rank}.json").write_text(json.dumps(found))
            continue
        before = folder / f"{case.partition('-from-')[2] or case}-whole"
        reshaped, left = "-from-" in case, before.is_symlink()
        if not ranks.broadcast(before.exists()):  # its folder is there as soon as any rank begins
            train_here(planned, RunFolder(before), ranks)
        if any(kind in case for kind in ("compiled", "fused", "overlapped")):
            continue
        save_again(planned, before / "checkpoints/step-00000002", folder / f"{case}-again", ranks)
        if ranks.world_size > 1 if reshaped else left:
            continue
        if ranks.is_leader:
            (folder / case / "checkpoints").mkdir(parents=True)
            shutil.copytree(before / "checkpoints/step-00000002", folder / case / "checkpoints/step-00000002")
        ranks.barrier()
        train_here(planned, RunFolder(folder / case), ranks)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    leave_ranks()

"""torch takes longer to import than most commands take to run, so that only what computes with tensors imports it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.runs import MadeRun
from tests.support.command import environment
from tests.support.recipes import write_recipe

pytestmark = pytest.mark.slow


def imported(program: str, *arguments: str | Path, **variables: str) -> set[str]:
    """The modules that a Python process with `variables` set has imported at the end of `program`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}\nprint(*sys.modules, file=sys.stderr)", *map(str, arguments)],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return set(done.stderr.split())


def test_no_command_imports_torch_before_it_runs() -> None:
    assert imported("import jobs.cli").isdisjoint({"torch", "deepspeed", "pydantic", "numpy"})


@pytest.mark.parametrize(
    "program",
    [
        # What the process that starts the ranks does, up to that.
        "import jobs.chain\n"
        "from pipeline.plan import plan_stage\n"
        "from pipeline.recipe.loader import load_recipe\n"
        "from pipeline.run_folder import run_folder\n"
        "recipe = load_recipe(Path(sys.argv[1]))\n"
        "run_folder(recipe, 'pretrain').check(plan_stage(recipe, 'pretrain'), None)",
        "from jobs.commands.order import order; order(Path(sys.argv[1]), 'pretrain', as_json=True)",
    ],
    ids=["launcher", "order"],
)
def test_what_reads_a_recipe_and_looks_at_shards_does_without_torch(shards: Path, tmp_path: Path, program: str) -> None:
    modules = imported(f"from pathlib import Path\n{program}", write_recipe(tmp_path, shards))
    assert "pipeline.plan" in modules
    assert modules.isdisjoint({"torch", "deepspeed"})


def test_a_look_at_run_folders_does_without_numpy_and_pydantic(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    run.freeze()
    run.note("pretrain", "begin")
    modules = imported(
        "from pathlib import Path\nfrom jobs.commands.status import status; status(Path(sys.argv[1]))", run.path
    )
    assert "jobs.scheduler.stage_status" in modules
    assert modules.isdisjoint({"torch", "deepspeed", "numpy", "pydantic"})


def test_a_rank_that_compiles_nothing_does_without_the_compiler(shards: Path, tmp_path: Path) -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    recipe = write_recipe(tmp_path, shards)
    modules = imported(
        "from pathlib import Path\nfrom jobs.commands.train import train\n"
        "train(Path(sys.argv[1]), 'pretrain', ['pretrain.steps=1', 'optimizer.warmup_steps=0'])",
        recipe,
        **alone,
    )
    assert (tmp_path / "runs/test/pretrain/result.json").exists()
    assert "deepspeed.runtime.zero.muon.original_muon" in modules
    assert "torch._inductor.compile_fx" not in modules

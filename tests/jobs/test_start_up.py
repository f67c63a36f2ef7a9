"""torch takes longer to import than most commands take to run, so only what computes with tensors imports it."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from jobs import cli
from jobs.commands import shards as shards_group
from jobs.lazy_commands import LazyCommand
from tests.jobs.runs import MadeRun
from tests.support.command import coatnet, environment
from tests.support.ports import free_ports
from tests.support.recipes import write_recipe


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


@pytest.mark.parametrize(
    ("name", "module", "help"),
    [
        *((name, f"jobs.commands.{name}", help) for name, help in cli.COMMANDS.items()),
        *((name, f"jobs.commands.shards.{name}", help) for name, help in shards_group.COMMANDS.items()),
    ],
    ids=lambda value: value if value.isalpha() else "",
)
def test_a_command_is_listed_with_the_first_line_of_its_own_help(name: str, module: str, help: str) -> None:
    command = LazyCommand(module, help, name).load(name)
    assert command.help.partition("\n")[0] == help


def test_no_command_imports_torch_before_it_runs() -> None:
    assert imported("import jobs.cli").isdisjoint({"torch", "deepspeed", "pydantic", "numpy"})


def test_help_lists_every_command_and_imports_none() -> None:
    modules = imported(
        "from jobs.cli import app\n"
        "for words in (['--help'], ['-h'], ['shards', '-h'], ['statsu']):\n"
        "    try: app(words, prog_name='coatnet')\n"
        "    except SystemExit: pass\n"
    )
    assert {module for module in modules if module.startswith("jobs.commands")} <= {
        "jobs.commands", "jobs.commands.shards",
    }  # fmt: skip
    assert modules.isdisjoint({"torch", "deepspeed", "numpy"})  # pydantic is typer's
    for option in ("-h", "--help"):
        shown = coatnet(option).stdout
        assert all(f" {name} " in shown for name in cli.COMMANDS)
    assert "Did you mean 'status'?" in coatnet("statsu").stderr


def test_short_help_reaches_every_command() -> None:
    assert "--watch" in coatnet("status", "-h").stdout
    assert "--short-side" in coatnet("shards", "build", "-h").stdout


def test_the_version_is_printed() -> None:
    done = coatnet("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "coatnet")


def test_the_shell_completes_commands_and_options() -> None:
    for words, completed in (
        ("coatnet sta", "status"),
        ("coatnet shards mer", "merge"),
        ("coatnet logs --fol", "--follow"),
    ):
        count = str(words.count(" "))
        done = coatnet(COMP_WORDS=words, COMP_CWORD=count, _COATNET_COMPLETE="complete_bash")
        assert done.stdout.split() == [completed]
    assert {"--install-completion", "--show-completion"} <= set(coatnet("-h").stdout.split())


def test_an_import_that_is_interrupted_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(command: LazyCommand, name: str) -> typer.Typer:
        raise KeyboardInterrupt

    monkeypatch.setattr(LazyCommand, "load", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.app(["status"], prog_name="coatnet")
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: stopped; nothing was started\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        # What the process that starts the ranks does, up to that point.
        "import jobs.commands.run\n"
        "import jobs.commands.train\n"
        "from pipeline.plan import plan_stage\n"
        "from pipeline.recipe.loader import load_recipe\n"
        "from pipeline.runs.run_folder import run_folder\n"
        "recipe = load_recipe(Path(sys.argv[1]))\n"
        "run_folder(recipe, 'pretrain').check(plan_stage(recipe, 'pretrain'), None)",
        "from jobs.commands.order import order; order(Path(sys.argv[1]), 'pretrain', as_json=True)",
        "from jobs.commands.submit import submit; submit(Path(sys.argv[1]), dry_run=True, doctor=False)\n"
        "import pipeline.plan",
    ],
    ids=["launcher", "order", "submit"],
)
def test_reading_a_recipe_and_its_shards_takes_no_torch(shards: Path, tmp_path: Path, program: str) -> None:
    modules = imported(f"from pathlib import Path\n{program}", write_recipe(tmp_path, shards))
    assert "pipeline.plan" in modules
    assert modules.isdisjoint({"torch", "deepspeed"})


@pytest.mark.slow
def test_status_logs_and_cancel_take_no_numpy_and_no_pydantic(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    run.freeze()
    run.note("pretrain", "begin")
    modules = imported(
        "from pathlib import Path\nimport jobs.commands.logs, jobs.commands.cancel\n"
        "from jobs.commands.status import status; status(Path(sys.argv[1]))",
        run.path,
    )
    assert "jobs.scheduler.stage_status" in modules
    assert modules.isdisjoint({"torch", "deepspeed", "numpy", "pydantic"})


@pytest.mark.slow
def test_a_rank_that_compiles_nothing_does_not_import_the_compiler(shards: Path, tmp_path: Path) -> None:
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    recipe = write_recipe(tmp_path, shards)
    modules = imported(
        "from pathlib import Path\nfrom jobs.commands.train import train\n"
        "train(Path(sys.argv[1]), 'pretrain', ['pretrain.steps=1', 'optimizer.warmup_steps=0', 'resources.ranks=1'])",
        recipe,
        **alone,
    )
    assert (tmp_path / "runs/test/pretrain/result.json").exists()
    assert "deepspeed.runtime.zero.muon.original_muon" in modules
    assert "torch._inductor.compile_fx" not in modules

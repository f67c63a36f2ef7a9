"""`coatnet recipes`: the recipes that come with the program, listed, shown and copied."""

import difflib
import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.bundled_recipes import bundled_recipes
from jobs.commands.arguments import AsJson
from jobs.console import make_console, make_table, print_json, print_line
from jobs.exit_codes import exit_on_error
from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe

_ADAPTABLE = "own_images"

recipes = typer.Typer(add_completion=False)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe, as `coatnet recipes` lists it.")]


@recipes.callback(invoke_without_command=True)
def listed(context: typer.Context, as_json: AsJson = False) -> None:
    """List, show and copy the recipes that come with the program.

    Without a subcommand, list them.
    """
    if context.invoked_subcommand is not None:
        return
    with exit_on_error():
        facts = _facts()
        if as_json:
            print_json(facts)
            return
        table = make_table("recipe", "model", "stages, and pixels of each", "GPUs", right=["GPUs"])
        table.columns[0].no_wrap = True
        for name, fact in facts.items():
            model, *others = fact["models"]
            models = f"{model}, {len(others)} more" if others else model
            table.add_row(name, models, _stages(fact["stages"]), str(fact["gpus"]))
        console = make_console()
        console.print(table)
        console.print()
        print_line(console, "To start from one: coatnet recipes copy NAME")


@recipes.command()
def show(name: Name) -> None:
    """Print a recipe."""
    with exit_on_error():
        print(_file(name).read_text(), end="")


@recipes.command()
def copy(
    name: Name,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The file to write.", show_default="./NAME.yaml")
    ] = None,
    for_this_machine: Annotated[
        bool,
        typer.Option(
            "--for-this-machine",
            help="Of own_images: choose model, image size, ranks and batch so that it trains here in sensible time.",
        ),
    ] = False,
    hours: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="With --for-this-machine: what pretraining may take.", show_default="1 on CPUs, 24 on GPUs"
        ),
    ] = None,
) -> None:
    """Copy a recipe to a file, to run or change it."""
    with exit_on_error():
        text, target = _file(name).read_text(), file or Path(f"{name}.yaml")
        if target.exists():  # before the speed of the machine is measured
            raise ConfigError(f"{target} exists; name another file: coatnet recipes copy {name} FILE")
        if for_this_machine:
            text = _for_this_machine(name, target, hours)
        elif hours is not None:
            raise ConfigError("--hours: has no effect without --for-this-machine; give both, or neither")
        try:
            with open(target, "x") as new:
                new.write(text)
        except FileExistsError:
            raise ConfigError(f"{target} exists; name another file: coatnet recipes copy {name} FILE") from None
        except OSError as error:
            raise ConfigError(f"{target}: {error.strerror}") from None
        print_line(make_console(), f"wrote {target}")
        for line in text.splitlines()[4:6] if for_this_machine else []:
            print_line(make_console(), line.removeprefix("# "))


def _for_this_machine(name: str, target: Path, hours: float | None) -> str:
    if name != _ADAPTABLE:
        raise ConfigError(
            f"--for-this-machine: the settings of {name} do not depend on a machine; only {_ADAPTABLE} is written for "
            "one"
        )
    from jobs.machine_recipe import machine_recipe, training_data  # torch, which the other commands do without
    from pipeline.preflight.machine import this_machine
    from pipeline.ranks.cpu_speed import training_rate

    machine = this_machine()
    with make_console().status("measuring how fast this machine trains"):
        rate = 0.0 if machine.gpus else training_rate()
    return machine_recipe(name, machine, rate, training_data(target.parent / "shards/train"), hours)


def _facts() -> dict[str, dict[str, Any]]:
    """What `--json` prints: models, stages with their image sizes, and the largest number of GPUs of any stage."""
    facts = {}
    for name, path in bundled_recipes().items():
        stages = load_recipe(path).stages
        facts[name] = {
            "models": list(dict.fromkeys(stage.model.name for stage in stages.values())),
            "stages": {key: stage.resolution for key, stage in stages.items()},
            "gpus": max(stage.resources.ranks for stage in stages.values()),
        }
    return facts


def _stages(sizes: dict[str, int]) -> str:
    """`pretrain 224, finetune 224 384 512`, or `5 at 224` if all have one size."""
    if len(sizes) > 1 and len(set(sizes.values())) == 1:
        return f"{len(sizes)} at {next(iter(sizes.values()))}"
    named = [(name.removesuffix(f"_{size}"), str(size)) for name, size in sizes.items()]
    groups = itertools.groupby(named, key=lambda pair: pair[0])
    return ", ".join(" ".join([name, *(size for _, size in pairs)]) for name, pairs in groups)


def _file(name: str) -> Path:
    bundled = bundled_recipes()
    if name not in bundled:
        near = difflib.get_close_matches(name, bundled, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`coatnet recipes` lists them"
        raise ConfigError(f"no recipe {name} comes with the program; {hint}")
    return bundled[name]

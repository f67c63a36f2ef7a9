"""`coatnet recipes`: the recipes that ship with the program, listed, shown and copied."""

import difflib
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jobs.exit_codes import exit_on_error

recipes = typer.Typer(help="The recipes that ship with the program; without a word, a list of them.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A recipe that ships, as `coatnet recipes` lists it.")]


@recipes.callback(invoke_without_command=True)
def listed(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one object, keyed by recipe.")] = False,
) -> None:
    """The recipes that ship with the program; without a word, a list of them."""
    if context.invoked_subcommand is not None:
        return
    with exit_on_error():
        facts = _facts()
        if as_json:
            print(json.dumps(facts, indent=1))
            return
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column("recipe", no_wrap=True)
        table.add_column("model")
        table.add_column("stages, and pixels of each")
        table.add_column("GPUs", justify="right")
        for name, fact in facts.items():
            model, *others = fact["models"]
            models = f"{model}, {len(others)} more" if others else model
            table.add_row(name, models, _stages(fact["stages"]), str(fact["gpus"]))
        # A pipe has no width to keep to.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        console.print(table)
        console.print("\nTo start from one: coatnet recipes copy NAME")


@recipes.command()
def show(name: Name) -> None:
    """Print a recipe."""
    with exit_on_error():
        print(_file(name).read_text(), end="")


@recipes.command()
def copy(
    name: Name,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="By default NAME.yaml, here.")] = None,
) -> None:
    """Write a recipe into a file, to be run or changed."""
    from pipeline.errors import ConfigError

    with exit_on_error():
        text, target = _file(name).read_text(), file or Path(f"{name}.yaml")
        try:
            with open(target, "x") as new:
                new.write(text)
        except FileExistsError:
            raise ConfigError(f"{target} exists; name another file: coatnet recipes copy {name} FILE") from None
        except OSError as error:
            raise ConfigError(f"{target}: {error.strerror}") from None
        Console(highlight=False).print(f"wrote {target}", soft_wrap=True, markup=False)


def _facts() -> dict[str, dict[str, Any]]:
    """What `--json` prints: models, stages with their pictures' sizes, and the most GPUs that a stage asks for."""
    from jobs.bundled_recipes import bundled_recipes
    from pipeline.recipe.loader import load_recipe

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
    """`pretrain 224, finetune 224 384 512`, or `5 at 224` where all are of one size."""
    if len(sizes) > 1 and len(set(sizes.values())) == 1:
        return f"{len(sizes)} at {next(iter(sizes.values()))}"
    named = [(name.removesuffix(f"_{size}"), str(size)) for name, size in sizes.items()]
    groups = itertools.groupby(named, key=lambda pair: pair[0])
    return ", ".join(" ".join([name, *(size for _, size in pairs)]) for name, pairs in groups)


def _file(name: str) -> Path:
    from jobs.bundled_recipes import bundled_recipes
    from pipeline.errors import ConfigError

    bundled = bundled_recipes()
    if name not in bundled:
        near = difflib.get_close_matches(name, bundled, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`coatnet recipes` lists them"
        raise ConfigError(f"no recipe {name} ships; {hint}")
    return bundled[name]

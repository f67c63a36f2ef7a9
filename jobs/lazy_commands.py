"""Commands that are imported when they are used: `--help` and a slip in a command's name cost no imports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """A command, or a group of commands, called `function` in `module`."""

    module: str
    help: str
    """The first line of its docstring, or of the group's help."""
    function: str

    def load(self, name: str) -> Any:
        """The command as typer's groups hold it; `name` is what it is called there."""
        found = getattr(import_module(self.module), self.function)
        if isinstance(found, typer.Typer):
            return get_command(found)
        alone = typer.Typer(add_completion=False)
        alone.command(name)(found)
        return get_command(alone)


def lazy_group(commands: Mapping[str, LazyCommand]) -> type[TyperGroup]:
    """The class of a typer group with these commands, by name."""

    class LazyGroup(TyperGroup):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            for name, command in commands.items():
                self.add_command(TyperCommand(name, help=command.help))  # stands for it in lists

        def resolve_command(self, ctx: Any, args: Sequence[str]) -> Any:
            name, placeholder, rest = super().resolve_command(ctx, list(args))
            if name is None or placeholder is None:
                return name, placeholder, rest
            from jobs.exit_codes import exit_on_error  # one of our packages, which main() has checked by now

            with exit_on_error("nothing was started"):
                return name, commands[name].load(name), rest

    return LazyGroup

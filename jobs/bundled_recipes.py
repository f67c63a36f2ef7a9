"""The recipes that come with the program."""

from importlib.resources import files
from pathlib import Path

from jobs.frozen_recipe import check_frozen
from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe as read_recipe
from pipeline.recipe.schema import Recipe


def bundled_recipes() -> dict[str, Path]:
    """The file of each recipe by its name, in the order of the names."""
    paths = Path(str(files("jobs") / "recipes")).glob("*.yaml")
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe at `path`, as `pipeline.recipe.loader.load_recipe`, with a hint if it must be copied there first.

    Raises:
        ConfigError: what is wrong with the file or the overrides, or a frozen recipe that was changed.
    """
    name = path.name.removesuffix(".yaml").removesuffix(".yml")
    if not path.exists() and name in bundled_recipes():
        raise ConfigError(f"recipe {path}: no such file; `coatnet recipes copy {name}` writes it")
    check_frozen(path)
    return read_recipe(path, overrides)

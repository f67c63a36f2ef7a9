"""The recipe of a run as it was when the run started or was submitted: what its ranks, later stages and jobs read.

`runs/<recipe>/recipes/<digest>.yaml` has all settings, overrides included, and absolute paths; beside it are copies of
the label maps that it names. The name of each file has the digest of its content, so that nothing ever replaces one
that a run or a waiting job reads, and whoever reads one notices when it was edited.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data.errors import raise_if_passing
from data.files.atomic_file import write_atomically
from data.files.digest import json_sha256
from data.files.yaml_text import YamlError, load_plain_yaml, yaml_file
from pipeline.errors import ConfigError
from pipeline.runs.run_access import cannot_be_written

if TYPE_CHECKING:  # commands that only look at a folder start in half the time without pydantic
    from pipeline.recipe.schema import Recipe

FOLDER = "recipes"
_DIGITS = 16  # of a digest, in a file's name
_NAME = re.compile(rf"[0-9a-f]{{{_DIGITS}}}")
_LABEL_MAPS = ("label_map", "validation_label_map")


@dataclass(frozen=True, slots=True)
class FrozenRecipe:
    """A recipe to be frozen.

    Args:
        recipe: it names the copies of its label maps.
        path: where it is written.
        label_maps: content of each copy by its path.
    """

    recipe: "Recipe"
    path: Path
    label_maps: Mapping[Path, bytes]

    def write(self) -> None:
        """Write the recipe and its label maps, unless they are there.

        Raises:
            ConfigError: the folder cannot be written.
            DiskFull: there is no room.
        """
        content = recipe_text(self.recipe).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path, data in {**self.label_maps, self.path: content}.items():
                if not path.exists() or path.read_bytes() != data:  # a full disk may have cut one short
                    write_atomically(path, data, shared=True)
        except OSError as error:
            raise_if_passing(error)
            raise cannot_be_written(self.path.parents[1], error) from None


def frozen_recipe(recipe: "Recipe") -> FrozenRecipe:
    """What is frozen of `recipe`; nothing is written. A label map that does not exist is left to the checks of data."""
    folder = Path(recipe.runs) / recipe.name / FOLDER
    label_maps: dict[Path, bytes] = {}
    stages = {}
    for name, stage in recipe.stages.items():
        copies = {}
        for key in _LABEL_MAPS:
            original = getattr(stage.data, key)
            if original is None or not Path(original).is_file():
                continue
            data = Path(original).read_bytes()
            copy = folder / f"{hashlib.sha256(data).hexdigest()[:_DIGITS]}-{_base_name(Path(original))}"
            label_maps[copy] = data
            copies[key] = str(copy)
        stages[name] = stage.model_copy(update={"data": stage.data.model_copy(update=copies)})
    recipe = recipe.model_copy(update={"stages": stages})
    return FrozenRecipe(recipe, folder / f"{_digest(recipe_content(recipe))}.yaml", label_maps)


def is_frozen(path: Path) -> bool:
    """Whether the file at `path` is a frozen recipe, by its place and name."""
    return path.parent.name == FOLDER and _NAME.fullmatch(path.stem) is not None and path.is_file()


def check_frozen(path: Path) -> None:
    """If the file at `path` is a frozen recipe, make sure that it is what was frozen.

    Raises:
        ConfigError: it was changed; the message names both digests.
    """
    if not is_frozen(path):
        return
    content = frozen_content(path)
    found = _digest(content) if content is not None else "unreadable"
    if found != path.stem:
        raise ConfigError(
            f"{path}: changed since the run started with it (digest {found} instead of {path.stem}); restore it, or "
            "start again with a recipe file of your own, which is frozen anew"
        )


def frozen_content(path: Path) -> dict[str, Any] | None:
    """All settings of the frozen recipe at `path` as plain values; None if it cannot be read."""
    try:
        content = load_plain_yaml(yaml_file(path), str(path))
    except (OSError, YamlError):
        return None
    return content if isinstance(content, dict) else None


def recipe_content(recipe: "Recipe") -> dict[str, Any]:
    """All settings of a recipe as plain values that are read back as the same recipe: resolved, and `$$` in paths for a
    dollar sign, which would begin the name of an environment variable."""
    from pipeline.recipe.locations import as_written

    return as_written(recipe)


def recipe_text(recipe: "Recipe") -> str:
    """`recipe_content` as YAML."""
    # Long values are not folded, in which a signature would not be found.
    return yaml.dump(recipe_content(recipe), Dumper=_Dumper, sort_keys=False, width=math.inf)


class _Dumper(yaml.SafeDumper):
    """Quotes what is not a plain word: `1e-3` and `010` as text are numbers to some readers."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = re.fullmatch(r"[A-Za-z_/][\w./-]*", text) is not None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def _digest(content: Mapping[str, Any]) -> str:
    return json_sha256(content)[:_DIGITS]


def _base_name(original: Path) -> str:
    """The name of a label map, without the digest that a copy of it begins with."""
    digest, dash, rest = original.name.partition("-")
    return rest if original.parent.name == FOLDER and dash and _NAME.fullmatch(digest) else original.name

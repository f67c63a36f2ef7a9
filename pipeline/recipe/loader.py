"""Recipes from YAML: defaults merged into stages, `key=value` overrides, errors with file, line and nearest key."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import ConfigError, SeveralErrors
from pipeline.recipe.schema import EvaluateStage, Recipe, Stage, TrainStage

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML with the numbers people write: `1e-3` is a float, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass
class _Document:
    """Plain values, and where each of them was written."""

    values: dict[str, Any]
    places: dict[KeyPath, str]
    """Path of a key -> `file:line` or the override that set it."""

    def place(self, path: KeyPath) -> str:
        """The place of the key at `path`, or of the nearest enclosing one."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in the file at `path`, `overrides` applied, relative paths made absolute from its folder.

    `defaults:` in the file is merged under every stage. An override `key=value` names a whole path
    (`stages.pretrain.epochs=3`, `seed=1`), a stage's key (`pretrain.epochs=3`), or a key of a stage without the stage
    (`optimizer.peak_learning_rate=1e-3`), which then holds for every stage that has it.

    Raises:
        ConfigError: no such file, not YAML.
        SeveralErrors: unknown or mistyped keys, or settings that contradict each other.
    """
    document = _read(path)
    _merge_defaults(document)
    for override in overrides or []:
        _override(document, override)
    unknown = _unknown_keys(document)
    if unknown:
        raise SeveralErrors(unknown[0], unknown)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        problems = _explained(error, document)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SeveralErrors(problems[0] + more, problems) from None
    return _absolute(recipe, path.parent)


def _read(path: Path) -> _Document:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path}: not a text file") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places: dict[KeyPath, str] = {(): f"{path}:1"}
        if node is not None:
            _note_places(node, (), places, path, set())
        values = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}:{line}: not YAML: {problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    return _Document(_unshared(values), places)


def _unshared(value: Any) -> Any:
    """A copy in which no mapping or list stands in two places, as YAML's aliases make them."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _note_places(node: yaml.Node, path: KeyPath, places: dict[KeyPath, str], file: Path, above: set[int]) -> None:
    """Record the line of every key; refuse keys given twice and aliases that contain themselves."""
    if id(node) in above:
        raise ConfigError(f"{file}:{node.start_mark.line + 1}: an alias that contains itself")
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        own: dict[str, str] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                _note_places(value, path, places, file, above)
                continue
            below, place = (*path, key.value), f"{file}:{key.start_mark.line + 1}"
            if key.value in own:
                dotted = ".".join(map(str, below))
                raise ConfigError(f"{place}: {dotted} is given twice (first at {own[key.value]})")
            own[key.value] = places[below] = place
            _note_places(value, below, places, file, above)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            places[(*path, number)] = f"{file}:{item.start_mark.line + 1}"
            _note_places(item, (*path, number), places, file, above)


def _merge_defaults(document: _Document) -> None:
    """Move `defaults` under each stage; a stage's own keys win."""
    defaults = document.values.pop("defaults", None)
    stages = document.values.get("stages")
    if defaults is not None and not isinstance(defaults, dict):
        raise ConfigError(f"{document.place(('defaults',))}: defaults: must be a mapping of settings of a stage")
    if not isinstance(stages, dict):
        return
    for name, stage in stages.items():
        if isinstance(stage, dict):
            known = _stage_class(stage).model_fields
            # What only training stages have is no mistake in the defaults of a recipe that also evaluates.
            shared = {k: v for k, v in (defaults or {}).items() if k in known or k not in TrainStage.model_fields}
            stages[name] = {"task": "train"} | _merged(shared, stage, ("defaults",), ("stages", name), document.places)


def _merged(
    under: dict[str, Any], over: dict[str, Any], source: KeyPath, target: KeyPath, places: dict[KeyPath, str]
) -> dict[str, Any]:
    """`over` with what only `under` has; the places of what is taken over come along."""
    merged = dict(over)
    for key, value in under.items():
        here, there = (*source, key), (*target, key)
        if key not in over:
            merged[key] = _unshared(value)
            for path, place in list(places.items()):
                if path[: len(here)] == here:
                    places[(*there, *path[len(here) :])] = place
        elif isinstance(value, dict) and isinstance(over[key], dict):
            merged[key] = _merged(value, over[key], here, there, places)
    return merged


def _override(document: _Document, override: str) -> None:
    """Set one `key=value`; the value is YAML."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override}: an override is written key=value, such as optimizer.peak_learning_rate=1e-3")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{override}: the value is not YAML") from None
    stages = document.values.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    if keys[0] in Recipe.model_fields:
        paths = [keys]
    elif keys[0] in stages:
        paths = [["stages", *keys]]
    elif keys[0] in TrainStage.model_fields:
        takes = {name: _stage_class(stage) for name, stage in stages.items()}
        paths = [["stages", name, *keys] for name, kind in takes.items() if keys[0] in kind.model_fields]
    else:
        known = [*Recipe.model_fields, *stages, *TrainStage.model_fields]
        raise ConfigError(f"{override}: unknown key {keys[0]}{_nearest(keys[0], known)}")
    for path in paths:
        target = document.values
        for key in path[:-1]:
            target = target.setdefault(key, {}) if isinstance(target, dict) else {}
            if not isinstance(target, dict):
                raise ConfigError(f"{override}: {key} is a single value and has no keys of its own")
        target[path[-1]] = value
        document.places[tuple(path)] = f"override {override}"


def _stage_class(stage: Any) -> type[Stage]:
    return EvaluateStage if isinstance(stage, dict) and stage.get("task") == "evaluate" else TrainStage


def _unknown_keys(document: _Document) -> list[str]:
    """A line for each; what stands in `defaults` is found in every stage, and told once."""
    found = dict(_unknown_below(document.values, Recipe, (), document))
    stages = document.values.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if isinstance(stage, dict):
            for which, message in _unknown_below(stage, _stage_class(stage), ("stages", name), document):
                found.setdefault(which, message)
    return list(found.values())


def _unknown_below(
    values: dict[str, Any], section: type[BaseModel], path: KeyPath, document: _Document
) -> Iterator[tuple[tuple[str, str], str]]:
    """Place and key, and what to tell of it."""
    known = list(section.model_fields) + ([] if path else ["defaults"])
    for key, value in values.items():
        here = (*path, key)
        if key not in section.model_fields:
            dotted = ".".join(map(str, here))
            place = document.place(here)
            yield (place, str(key)), f"{place}: unknown key {dotted}{_nearest(str(key), known)}"
            continue
        kind = section.model_fields[key].annotation
        nested = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
        if nested and isinstance(value, dict):
            yield from _unknown_below(value, nested[0], here, document)


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}"


def _explained(error: ValidationError, document: _Document) -> list[str]:
    """What is wrong, a line for each; what stands in `defaults` is found in every stage, and told once."""
    found: dict[tuple[str, str], str] = {}
    for one in error.errors():
        path = _key_path(one["loc"])
        dotted = ".".join(map(str, path))
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "missing":
            message = "is missing"
        elif one["type"] == "union_tag_invalid":
            path, dotted = (*path, "task"), f"{dotted}.task"
            message = f"is {one['input'].get('task')!r}; it must be train or evaluate"
        elif one["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, not {one['input']!r}"
        subject = f"{dotted}: " if dotted else ""
        found.setdefault((document.place(path), one["msg"]), f"{document.place(path)}: {subject}{message}")
    return list(found.values())


def _key_path(location: KeyPath) -> KeyPath:
    """A place in pydantic's words as a path of keys: without the name of the chosen kind of stage."""
    return tuple(part for i, part in enumerate(location) if not (i == 2 and part in ("train", "evaluate")))


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    """Folders of the recipe as absolute paths; URLs stay as they are."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else str((folder / Path(path).expanduser()).resolve())

    stages = {}
    for name, stage in recipe.stages.items():
        places: dict[str, Any] = {
            key: absolute(getattr(stage.data, key))
            for key in ("train", "validation", "label_map", "validation_label_map")
        }
        places["cache"] = stage.data.cache.model_copy(update={"folder": absolute(stage.data.cache.folder)})
        changes: dict[str, Any] = {"data": stage.data.model_copy(update=places)}
        if isinstance(stage, TrainStage):
            folder_of_checkpoints = {"folder": absolute(stage.checkpoint.folder)}
            changes["checkpoint"] = stage.checkpoint.model_copy(update=folder_of_checkpoints)
        stages[name] = stage.model_copy(update=changes)
    shards = recipe.shards and recipe.shards.model_copy(
        update={"source": absolute(recipe.shards.source), "folder": absolute(recipe.shards.folder)}
    )
    return recipe.model_copy(update={"runs": absolute(recipe.runs), "shards": shards, "stages": stages})

"""Recipes from YAML: defaults merged into stages, `key=value` overrides, errors with file, line and nearest key."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from data.errors import raise_if_passing
from pipeline.errors import ConfigError, SeveralErrors
from pipeline.recipe.schema import EvaluateStage, Recipe, Stage, TrainStage

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a float, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass
class _Document:
    """Plain values, and where each of them was written."""

    values: dict[str, Any]
    origins: dict[KeyPath, str]
    """Path of a key -> `file:line`, or the override that set it."""

    def origin(self, path: KeyPath) -> str:
        """The origin of the key at `path`, or of the nearest enclosing one."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins[path]


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in the file at `path`, `overrides` applied, relative paths made absolute from its folder.

    `defaults:` in the file is merged under every stage. An override `key=value` names a whole path
    (`stages.pretrain.epochs=3`, `seed=1`), a stage's key (`pretrain.epochs=3`), or a key of a stage without the stage
    (`optimizer.peak_learning_rate=1e-3`), which then holds for every stage that has it.

    Raises:
        ConfigError: no such file, or not YAML.
        SeveralErrors: unknown or mistyped keys, or settings that contradict each other.
    """
    document = _read(path)
    _merge_defaults(document)
    for override in overrides or []:
        _apply_override(document, override)
    unknown = _unknown_keys(document)
    if unknown:
        raise SeveralErrors(unknown[0], unknown)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        problems = _validation_messages(error, document)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SeveralErrors(problems[0] + more, problems) from None
    return _with_absolute_paths(recipe, path.parent)


def _read(path: Path) -> _Document:
    try:
        text = path.read_text()
    except OSError as error:
        raise_if_passing(error)
        raise ConfigError(f"recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path}: not a text file") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        origins: dict[KeyPath, str] = {(): f"{path}:1"}
        if node is not None:
            _collect_origins(node, (), origins, path, set())
        values = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}:{line}: not YAML: {problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    return _Document(_unshared(values), origins)


def _unshared(value: Any) -> Any:
    """A copy in which no mapping or list occurs twice, as YAML's aliases make them."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _collect_origins(node: yaml.Node, path: KeyPath, origins: dict[KeyPath, str], file: Path, above: set[int]) -> None:
    """Record the line of every key; refuse duplicate keys and aliases that contain themselves."""
    if id(node) in above:
        raise ConfigError(f"{file}:{node.start_mark.line + 1}: an alias that contains itself")
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        own: dict[str, str] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                _collect_origins(value, path, origins, file, above)
                continue
            below, origin = (*path, key.value), f"{file}:{key.start_mark.line + 1}"
            if key.value in own:
                dotted = ".".join(map(str, below))
                raise ConfigError(f"{origin}: {dotted} is given twice (first at {own[key.value]}); remove one")
            own[key.value] = origins[below] = origin
            _collect_origins(value, below, origins, file, above)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            origins[(*path, number)] = f"{file}:{item.start_mark.line + 1}"
            _collect_origins(item, (*path, number), origins, file, above)


def _merge_defaults(document: _Document) -> None:
    """Move `defaults` under each stage; a stage's own keys win."""
    defaults = document.values.pop("defaults", None)
    stages = document.values.get("stages")
    if defaults is not None and not isinstance(defaults, dict):
        raise ConfigError(f"{document.origin(('defaults',))}: defaults: must be a mapping of settings of a stage")
    if not isinstance(stages, dict):
        return
    for name, stage in stages.items():
        if isinstance(stage, dict):
            known = _stage_class(stage).model_fields
            # Settings that only training stages have are allowed in the defaults of a recipe that also evaluates.
            shared = {k: v for k, v in (defaults or {}).items() if k in known or k not in TrainStage.model_fields}
            stages[name] = {"task": "train"} | _merged(shared, stage, ("defaults",), ("stages", name), document.origins)


def _merged(
    defaults: dict[str, Any], own: dict[str, Any], source: KeyPath, target: KeyPath, origins: dict[KeyPath, str]
) -> dict[str, Any]:
    """`own` with what only `defaults` has; origins at `source` are copied to `target` along with it."""
    merged = dict(own)
    for key, value in defaults.items():
        here, there = (*source, key), (*target, key)
        if key not in own:
            merged[key] = _unshared(value)
            for path, origin in list(origins.items()):
                if path[: len(here)] == here:
                    origins[(*there, *path[len(here) :])] = origin
        elif isinstance(value, dict) and isinstance(own[key], dict):
            merged[key] = _merged(value, own[key], here, there, origins)
    return merged


def _apply_override(document: _Document, override: str) -> None:
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
        paths = [
            ["stages", name, *keys] for name, stage in stages.items() if keys[0] in _stage_class(stage).model_fields
        ]
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
        document.origins[tuple(path)] = f"override {override}"


def _stage_class(stage: Any) -> type[Stage]:
    return EvaluateStage if isinstance(stage, dict) and stage.get("task") == "evaluate" else TrainStage


def _unknown_keys(document: _Document) -> list[str]:
    """A message for each; one in `defaults` is found in every stage, and reported once."""
    found = dict(_unknown_below(document.values, Recipe, (), document))
    stages = document.values.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if isinstance(stage, dict):
            for key, message in _unknown_below(stage, _stage_class(stage), ("stages", name), document):
                found.setdefault(key, message)
    return list(found.values())


def _unknown_below(
    values: dict[str, Any], section: type[BaseModel], path: KeyPath, document: _Document
) -> Iterator[tuple[tuple[str, str], str]]:
    """Origin and name of each unknown key, and the message."""
    known = list(section.model_fields) + ([] if path else ["defaults"])
    for key, value in values.items():
        here = (*path, key)
        if key not in section.model_fields:
            dotted = ".".join(map(str, here))
            origin = document.origin(here)
            yield (origin, str(key)), f"{origin}: unknown key {dotted}{_nearest(str(key), known)}"
            continue
        kind = section.model_fields[key].annotation
        nested = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
        if nested and isinstance(value, dict):
            yield from _unknown_below(value, nested[0], here, document)


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}"


def _validation_messages(error: ValidationError, document: _Document) -> list[str]:
    """A message for each problem; one in `defaults` is found in every stage, and reported once."""
    found: dict[tuple[str, str], str] = {}
    for problem in error.errors():
        path = _key_path(problem["loc"])
        dotted = ".".join(map(str, path))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            message = "is missing"
        elif problem["type"] == "union_tag_invalid":
            path, dotted = (*path, "task"), f"{dotted}.task"
            message = f"is {problem['input'].get('task')!r}; it must be train or evaluate"
        elif problem["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, not {problem['input']!r}"
        subject, origin = f"{dotted}: " if dotted else "", document.origin(path)
        found.setdefault((origin, problem["msg"]), f"{origin}: {subject}{message}")
    return list(found.values())


def _key_path(location: KeyPath) -> KeyPath:
    """A location as pydantic reports it as a path of keys: without the tag of the kind of stage."""
    return tuple(part for i, part in enumerate(location) if not (i == 2 and part in ("train", "evaluate")))


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with absolute paths, relative ones taken from `folder`; URLs stay as they are."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else str((folder / Path(path).expanduser()).resolve())

    stages = {}
    for name, stage in recipe.stages.items():
        data: dict[str, Any] = {
            key: absolute(getattr(stage.data, key))
            for key in ("train", "validation", "label_map", "validation_label_map")
        }
        data["cache"] = stage.data.cache.model_copy(update={"folder": absolute(stage.data.cache.folder)})
        changes: dict[str, Any] = {"data": stage.data.model_copy(update=data)}
        if isinstance(stage, TrainStage):
            checkpoint_folder = {"folder": absolute(stage.checkpoint.folder)}
            changes["checkpoint"] = stage.checkpoint.model_copy(update=checkpoint_folder)
        stages[name] = stage.model_copy(update=changes)
    shards = recipe.shards and recipe.shards.model_copy(
        update={"source": absolute(recipe.shards.source), "folder": absolute(recipe.shards.folder)}
    )
    return recipe.model_copy(update={"runs": absolute(recipe.runs), "shards": shards, "stages": stages})

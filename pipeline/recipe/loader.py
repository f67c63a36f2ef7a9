"""Recipes from YAML: defaults merged into stages, `key=value` overrides, errors with file, line and nearest key."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from data.errors import raise_if_passing
from data.files.yaml_text import KeyPath, Unquoted, YamlError, read_yaml, yaml_file
from pipeline.errors import ConfigError, SeveralErrors
from pipeline.recipe.locations import as_written
from pipeline.recipe.scalars import converted, number_fix
from pipeline.recipe.schema import EvaluateStage, Recipe, Stage, TrainStage


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
    """The recipe in the file at `path`, `overrides` applied, its paths and URLs resolved (`pipeline.recipe.locations`).

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
        return Recipe.model_validate(_converted(document.values), context=path.parent)
    except ValidationError as error:
        problems = _validation_messages(error, document)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SeveralErrors(problems[0] + more, problems) from None


def overridden_stage(name: str, settings: Mapping[str, Any], overrides: Sequence[str]) -> TrainStage:
    """The training stage `name` with recorded `settings`, and `overrides` of them as for `load_recipe`.

    Relative paths in overrides start at the working directory.

    Raises:
        ConfigError: an override of something else than settings of the stage.
        SeveralErrors: as for `load_recipe`.
    """
    recorded = TrainStage.model_validate(settings)
    stages = {name: as_written(recorded)}
    document = _Document({"name": "recorded", "stages": stages}, {(): f"the recorded settings of stage {name}"})
    for override in overrides:
        key = override.partition("=")[0].strip().split(".")[0]
        if key in Recipe.model_fields:
            raise ConfigError(f"{override}: not a setting of a stage; give settings of stage {name}")
        _apply_override(document, override)
    unknown = _unknown_keys(document)
    if unknown:
        raise SeveralErrors(unknown[0], unknown)
    try:
        return TrainStage.model_validate(_converted(document.values)["stages"][name], context=Path.cwd())
    except ValidationError as error:
        problems = _validation_messages(error, document, ("stages", name))
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SeveralErrors(problems[0] + more, problems) from None


def _read(path: Path) -> _Document:
    try:
        values, origins = read_yaml(yaml_file(path), str(path))
    except OSError as error:
        raise_if_passing(error)
        raise ConfigError(f"recipe {path}: {error.strerror}") from None
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    return _Document(values, origins)


def _merge_defaults(document: _Document) -> None:
    """Move `defaults` under each stage; a stage's own keys win."""
    defaults = document.values.pop("defaults", None)
    defaults = converted(defaults, dict | None) if isinstance(defaults, Unquoted) else defaults
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
            merged[key] = deepcopy(value)
            for path, origin in list(origins.items()):
                if path[: len(here)] == here:
                    origins[(*there, *path[len(here) :])] = origin
        elif isinstance(value, dict) and isinstance(own[key], dict):
            merged[key] = _merged(value, own[key], here, there, origins)
    return merged


def _apply_override(document: _Document, override: str) -> None:
    """Set one `key=value`."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override}: an override is written key=value, such as optimizer.peak_learning_rate=1e-3")
    value = _override_value(override, text)
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
        if len(keys) > 1:  # only stages and sections have keys of their own
            sections = [key for key in TrainStage.model_fields if _is_section(TrainStage, key)]
            near = difflib.get_close_matches(keys[0], [*stages, *sections], 1)
            there = f"stages: {', '.join(stages)}; sections: {', '.join(sections)}"
            hint = f"did you mean {near[0]}?" if near else there
            raise ConfigError(f"{override}: the recipe has no stage or section {keys[0]}; {hint}")
        raise ConfigError(f"{override}: unknown key {keys[0]}{_nearest(keys[0], known)}")
    for path in paths:
        target = document.values
        for key in path[:-1]:
            target = target.setdefault(key, {}) if isinstance(target, dict) else {}
            if not isinstance(target, dict):
                raise ConfigError(f"{override}: {key} is a single value and has no keys of its own")
        target[path[-1]] = deepcopy(value)
        for below in [key for key in document.origins if key[: len(path)] == tuple(path)]:
            del document.origins[below]
        document.origins[tuple(path)] = f"override {override}"


def _override_value(override: str, text: str) -> Any:
    """The value, which is YAML; a single one without quotes is taken whole, as a `#` in it begins no comment there."""
    try:
        value, _ = read_yaml(text, override)
    except YamlError as error:
        if error.problem.startswith("has "):  # an escape, in quotes
            raise ConfigError(f"{override}: the value {error.problem}") from None
        problem = f"the value is {error.problem}" if error.problem.startswith("not ") else error.problem
        raise ConfigError(f"{override}: {problem}; in YAML, such text is in quotes") from None
    return Unquoted(text.strip()) if value is None or isinstance(value, Unquoted) else value


def _converted(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe for validation, see `pipeline.recipe.scalars`."""
    found: dict[str, Any] = converted(values, Recipe)
    stages = values.get("stages")
    if isinstance(stages, dict):
        found["stages"] = {name: converted(stage, _stage_class(stage)) for name, stage in stages.items()}
    return found


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


def _is_section(section: type[BaseModel], key: str) -> bool:
    """Whether the value of `key` has keys of its own."""
    annotation = section.model_fields[key].annotation
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in (annotation, *get_args(annotation)))


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}"


def _validation_messages(error: ValidationError, document: _Document, within: KeyPath = ()) -> list[str]:
    """A message for each problem of what is `within`; one in `defaults` is found in every stage, and reported once."""
    found: dict[tuple[str, str], str] = {}
    for problem in error.errors():
        path = (*within, *_key_path(problem["loc"]))
        dotted = ".".join(map(str, path))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            message = "is missing"
        elif problem["type"] == "union_tag_invalid":
            path, dotted = (*path, "task"), f"{dotted}.task"
            message = f"is {problem['input'].get('task')!r}; it must be train or evaluate"
        elif problem["type"] != "value_error":
            message = _type_message(message, problem["type"], problem["input"])
        subject, origin = f"{dotted}: " if dotted else "", document.origin(path)
        found.setdefault((origin, problem["msg"]), f"{origin}: {subject}{message}")
    return list(found.values())


def _type_message(message: str, kind: str, value: Any) -> str:
    if value is None:
        return "is null, and needs a value; leave the key out for its default, and put text into quotes"
    fix = ""
    if isinstance(value, str) and kind in ("int_type", "float_type"):
        fix = f"; {number_fix(value, whole=kind == 'int_type')}"
    elif isinstance(value, str) and kind == "bool_type":
        fix = "; write true or false, without quotes"
    message = _YAML_KINDS.get(kind, f"{message[0].lower()}{message[1:]}")
    return f"{message}, not {value!r}{fix}"


_YAML_KINDS = {
    "tuple_type": "must be a list in brackets",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of settings",
}


def _key_path(location: KeyPath) -> KeyPath:
    """A location as pydantic reports it as a path of keys: without the tag of the kind of stage."""
    return tuple(part for i, part in enumerate(location) if not (i == 2 and part in ("train", "evaluate")))

"""Settings written into a person's recipe file: comments, order and everything else stay as they are."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data.errors import raise_if_passing
from data.files.atomic_file import atomic_path
from data.files.yaml_text import yaml_file
from jobs.bundled_recipes import bundled_recipes
from jobs.frozen_recipe import is_frozen
from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe

Edit = tuple[int, int, str]
"""Where a piece of the text begins and ends, and what replaces it."""


def check_editable(path: Path, stage: str, settings: Mapping[str, Any]) -> None:
    """Check that `write_settings` could write these, before anybody waits for their values.

    Raises:
        ConfigError: it could not; the message says why.
    """
    if path.resolve() in {bundled.resolve() for bundled in bundled_recipes().values()}:
        raise ConfigError(
            f"recipe {path} comes with the program and stays as it is; copy it: coatnet recipes copy {path.stem}"
        )
    if is_frozen(path):
        raise ConfigError(f"recipe {path} is that of a run and stays as it is; write to your own recipe file")
    if not os.access(path, os.W_OK) or not os.access(path.resolve().parent, os.W_OK):
        raise ConfigError(f"recipe {path}: it, or its folder, cannot be written; copy it to a folder of yours")
    _edited(path, _text(path), stage, settings, "")


def write_settings(path: Path, stage: str, settings: Mapping[str, Any], comment: str) -> None:
    """Set keys of a stage in the recipe file at `path`, each with `comment` behind it.

    Args:
        path: of the file.
        stage: its name.
        settings: scalars by their keys below the stage; `batch.micro_size` is in the section `batch`.
        comment: without the `#`; one line.

    Raises:
        ConfigError: the stage is written in a form that cannot be edited, the settings would not mean what they should,
            or would change another stage as well, or the file cannot be written. It is then unchanged.
    """
    before = load_recipe(path)
    text = _edited(path, _text(path), stage, settings, comment)
    target = path.resolve()
    try:
        mode = stat.S_IMODE(target.stat().st_mode)
        with atomic_path(target, shared=True) as unfinished:
            with open(unfinished, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            try:
                after = load_recipe(unfinished)
            except ConfigError as error:
                raise ConfigError(
                    f"recipe {path}: with {_listed(settings)} in stage {stage} it could not be read; write them by hand"
                ) from error
            changed = with_settings(before.stages[stage], settings)
            wanted = before.model_copy(update={"stages": before.stages | {stage: changed}})
            if after != wanted:
                others = [name for name in before.stages if after.stages.get(name) != wanted.stages[name]] or [stage]
                raise ConfigError(
                    f"recipe {path}: writing {_listed(settings)} to stage {stage} would change "
                    f"{', '.join(others)}, which takes settings from it; write them by hand"
                    if others != [stage]
                    else f"recipe {path}: {_listed(settings)} written to stage {stage} would change other settings of "
                    "it as well; write them by hand"
                )
        os.chmod(target, mode)
    except OSError as error:
        raise_if_passing(error)
        raise ConfigError(f"recipe {path}: {error.strerror}; it is unchanged") from None


def _text(path: Path) -> str:
    try:
        return yaml_file(path).decode()
    except OSError as error:
        raise_if_passing(error)
        raise ConfigError(f"recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path}: is not UTF-8; save it as that to have settings written into it") from None


def with_settings(section: Any, settings: Mapping[str, Any]) -> Any:
    """A stage, or a section of one, with settings by their keys, as `batch.micro_size`; they are not checked."""
    update: dict[str, Any] = {}
    for key, value in settings.items():
        name, _, rest = key.partition(".")
        held = update.get(name, getattr(section, name))
        update[name] = with_settings(held, {rest: value}) if rest else value
    return section.model_copy(update=update)


def _edited(path: Path, text: str, stage: str, settings: Mapping[str, Any], comment: str) -> str:
    """The text with the settings."""
    node = _stage_node(path, text, stage, settings)
    edits: list[Edit] = []
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    for section, values in sections.items():
        held = next((value for key, value in node.value if key.value == section), None)
        if not section:
            edits += [_edit(path, text, stage, node, f"{k}: {_scalar(v)}", comment) for k, v in values.items()]
        elif held is None:
            taken = _taken(node, section, text)
            if taken is None:
                raise _refusal(path, stage, f"it takes {section} from another one by `<<`", _listed(settings))
            whole = taken | {name: _scalar(value) for name, value in values.items()}
            written = ", ".join(f"{name}: {value}" for name, value in whole.items())
            edits.append(_edit(path, text, stage, node, f"{section}: {{{written}}}", comment))
        elif not isinstance(held, yaml.MappingNode) or not node.start_mark.index < held.start_mark.index:
            raise _refusal(path, stage, f"{section} is not written out in it", _listed(settings))
        elif held.flow_style:
            edits += _edits_in_braces(path, text, stage, held, values, comment)
        else:
            edits += [_edit(path, text, stage, held, f"{k}: {_scalar(v)}", comment) for k, v in values.items()]
    for start, end, piece in sorted(edits, key=lambda edit: -edit[0]):
        text = text[:start] + piece + text[end:]
    return text


def _taken(node: yaml.MappingNode, section: str, text: str) -> dict[str, str] | None:
    """What a stage takes of a section from others by `<<`, as written there; None if it is more than plain values.

    A section of its own would replace all of it.
    """
    sources = [value for key, value in node.value if key.value == "<<"]
    for source in sources[0].value if sources and isinstance(sources[0], yaml.SequenceNode) else sources:
        held = _value_of(source, section)
        if held is None:
            continue
        values = {key.value: text[value.start_mark.index : value.end_mark.index] for key, value in held.value}
        plain = all(isinstance(value, yaml.ScalarNode) for _, value in held.value)
        return values if plain and not any(value.startswith("&") for value in values.values()) else None
    return {}


def _edits_in_braces(
    path: Path, text: str, stage: str, node: yaml.MappingNode, values: Mapping[str, Any], comment: str
) -> list[Edit]:
    """The edits of a section in braces, on one line, behind which the comment stands."""
    if node.start_mark.line != node.end_mark.line:
        raise _refusal(path, stage, "a section in braces is on several lines", _listed(values))
    closing = node.end_mark.index - 1
    end = _line_end(text, closing)
    edits: list[Edit] = []
    added = []
    for name, value in values.items():
        held = next((found for key, found in node.value if key.value == name), None)
        if held is None:
            added.append(f"{name}: {_scalar(value)}")
        elif isinstance(held, yaml.ScalarNode) and node.start_mark.index < held.start_mark.index < closing:
            edits.append((held.start_mark.index, held.end_mark.index, _scalar(value)))
        else:
            raise _refusal(path, stage, f"the value of {name} is not a plain one", _listed(values))
    if added:
        before = text[node.start_mark.index : closing].rstrip()
        place = node.start_mark.index + len(before)
        separator = "" if before == "{" else " " if before.endswith(",") else ", "
        edits.append((place, place, separator + ", ".join(added)))
    if comment:
        edits.append((closing + 1, end, f" # {comment}"))
    return edits


def _edit(path: Path, text: str, stage: str, node: yaml.MappingNode, line: str, comment: str) -> Edit:
    """The edit that makes `line`, a key and its value, a line of the stage or of a section."""
    name = line.partition(":")[0]
    written = f"{line} # {comment}" if comment else line
    for key, value in node.value:
        if key.value != name:
            continue
        if not isinstance(value, yaml.ScalarNode) or value.start_mark.line != key.start_mark.line:
            raise _refusal(path, stage, f"the value of {name} is not a plain one on its line", line)
        return key.start_mark.index, _line_end(text, value.end_mark.index), written
    first = node.value[0][0].start_mark
    place = first.index - first.column
    ending = "\r\n" if "\r\n" in text else "\n"
    return place, place, f"{' ' * first.column}{written}{ending}"


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    end = len(text) if end < 0 else end
    return end - 1 if text[place:end].endswith("\r") else end


def _stage_node(path: Path, text: str, stage: str, settings: Mapping[str, Any]) -> yaml.MappingNode:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = _value_of(root, "stages")
    pair = next(((k, v) for k, v in (found.value if found else []) if k.value == stage), None)
    if pair is None:
        raise _refusal(path, stage, "it is not below `stages`", _listed(settings))
    key, value = pair
    if not isinstance(value, yaml.MappingNode) or value.start_mark.index < key.start_mark.index:
        raise _refusal(path, stage, "it repeats another one by an alias", _listed(settings))
    if value.flow_style or not value.value or value.value[0][0].start_mark.line == key.start_mark.line:
        raise _refusal(path, stage, "it is written in braces, or on one line", _listed(settings))
    return value


def _value_of(node: yaml.Node | None, name: str) -> yaml.MappingNode | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    value = next((value for key, value in node.value if key.value == name), None)
    return value if isinstance(value, yaml.MappingNode) else None


def _refusal(path: Path, stage: str, why: str, lines: str) -> ConfigError:
    return ConfigError(f"recipe {path}: stage {stage} cannot be edited, since {why}; write by hand: {lines}")


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {_scalar(value)}" for name, value in settings.items())


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

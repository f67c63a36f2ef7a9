"""Typed records from JSON and back: what a file must contain is declared once, by the fields of a frozen dataclass.

Own code rather than pydantic's, whose import doubles the start of commands that only look at a run folder.
"""

import functools
import json
import re
import types
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
_Parser = Callable[[Any], Any]

FLAT: Mapping[str, Any] = {"flat": True}
"""Metadata of a field whose record has its keys among those of the record around it."""

_SHA256 = re.compile("[0-9a-f]{64}")
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "an object"}


def load_json(content: bytes | str) -> object:
    """The value of a JSON document.

    Raises:
        ValueError: it is empty, incomplete or not JSON.
    """
    if not content.strip():
        raise ValueError("it is empty")
    try:
        value: object = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def to_record(kind: type[Record], value: object) -> Record:
    """A plain JSON value as `kind`; a field with a default may be missing, and unknown keys are ignored.

    Kinds and fields may be booleans, numbers, strings, literals, dataclasses, mappings by string, lists and tuples of
    any length, any of these or None, unions of them, whose kinds are tried in their order, and `Any`.

    Raises:
        ValueError: names what is missing or has another type.
    """
    return cast(Record, _parser(cast(Hashable, kind))(value))


def parse_json(kind: type[Record], content: bytes | str) -> Record:
    """The `kind` in a JSON document.

    Raises:
        ValueError: as for `load_json` and `to_record`.
    """
    return to_record(kind, load_json(content))


def check_sha256(value: str, name: str = "sha256") -> None:
    """
    Raises:
        ValueError: the value is not a sha256 in hex. It names files, so that nothing else must pass for one.
    """
    if not _SHA256.fullmatch(value):
        _refuse_item(name, "64 hexadecimal digits", value)


def check_at_least(least: int, **values: int) -> None:
    """
    Raises:
        ValueError: one of the values, which are given by their names, is below `least`.
    """
    for name, value in values.items():
        if value < least:
            _refuse_item(name, f"at least {least}", value)


def to_json(value: Any) -> Any:
    """A record as plain JSON values, without fields that are None by default and in fact."""
    if isinstance(value, str | int | float | None):
        return value
    if is_dataclass(value):
        content: dict[str, Any] = {}
        for field in _fields(cast(Hashable, type(value))):
            item = to_json(getattr(value, field.name))
            if field.metadata == FLAT:
                content |= item
            elif item is not None or field.default is not None:
                content[field.name] = item
        return content
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value]


_fields = functools.cache(fields)


# Made once for each type: a manifest may have hundreds of thousands of fragments.
@functools.cache
def _parser(kind: Any) -> _Parser:
    if kind is Any:
        return lambda value: value
    if is_dataclass(kind):
        return _record_parser(cast(type, kind))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return lambda value: value if value in arguments else _refuse(" or ".join(map(repr, arguments)), value)
    if origin in (types.UnionType, Union):  # with None; `Literal[...] | None` is the other kind before Python 3.14
        parse = _first_of([_parser(argument) for argument in arguments if argument is not types.NoneType])
        if types.NoneType not in arguments:
            return parse
        return lambda value: None if value is None else parse(value)
    if origin in (list, tuple):
        parse = _parser(arguments[0])
        return lambda value: (
            origin(_parse_item(parse, f"[{number}]", item) for number, item in enumerate(value))
            if isinstance(value, list)
            else _refuse("a list", value)
        )
    if origin is not None:
        parse = _parser(arguments[1])
        return lambda value: {name: _parse_item(parse, name, item) for name, item in _object(value).items()}
    if kind is float:
        return _float
    return lambda value: value if type(value) is kind else _refuse(_NAMES[kind], value)


def _first_of(parsers: list[_Parser]) -> _Parser:
    """The one that takes a value; the last one says what is wrong if none does."""
    *others, last = parsers

    def parse(value: Any) -> Any:
        for one in others:
            with suppress(ValueError):
                return one(value)
        return last(value)

    return parse if others else last


def _record_parser(kind: type) -> _Parser:
    hints = get_type_hints(kind)
    parsers = [(field, _parser(hints[field.name])) for field in fields(kind)]

    def parse_fields(value: Any) -> Any:
        found = {}
        for field, parse in parsers:
            if field.metadata == FLAT:
                found[field.name] = parse(_object(value))
            elif field.name in _object(value):
                found[field.name] = _parse_item(parse, field.name, value[field.name])
            elif field.default is MISSING:
                raise ValueError(f"{field.name} is missing")
        return kind(**found)

    return parse_fields


def _parse_item(parse: _Parser, name: str, item: Any) -> Any:
    try:
        return parse(item)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _float(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else _refuse(_NAMES[float], value)
    except OverflowError:
        return cast(float, _refuse("a number of at most 1.8e308", value))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else _refuse(_NAMES[dict], value)


def _refuse_item(name: str, expected: str, value: object) -> None:
    _parse_item(functools.partial(_refuse, expected), name, value)


def _refuse(expected: str, value: object) -> Any:
    shown = repr(value)
    raise ValueError(f"must be {expected}, not {shown if len(shown) <= 40 else shown[:37] + '...'}")

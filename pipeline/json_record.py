"""Frozen dataclasses from plain JSON values: what a file must contain is declared once, by the fields of its record."""

import functools
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
Parser = Callable[[Any], Any]

FLAT: Mapping[str, Any] = {"flat": True}
"""Metadata of a field whose record has its keys among those of the record around it."""

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "an object"}


def parse_record(kind: type[Record], content: object) -> Record:
    """`content` as the dataclass `kind`; a field with a default may be missing, and unknown keys are ignored.

    Fields may be booleans, numbers, texts, literals, dataclasses, mappings by text, tuples of any length, any of these
    or None, and `Any`.

    Raises:
        ValueError: names what is missing or has another type.
    """
    return cast(Record, _parser(cast(Hashable, kind))(content))


def to_json(value: Any) -> Any:
    """A record as plain JSON values, without fields that are None by default and in fact."""
    if isinstance(value, str | int | float | None):
        return value
    if is_dataclass(value):
        content: dict[str, Any] = {}
        for name, is_flat, is_optional in _fields(cast(Hashable, type(value))):
            item = to_json(getattr(value, name))
            if is_flat:
                content |= item
            elif item is not None or not is_optional:
                content[name] = item
        return content
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value]


# Both are made once for each type: a manifest may have hundreds of thousands of fragments.
@functools.cache
def _fields(kind: Any) -> list[tuple[str, bool, bool]]:
    return [(field.name, field.metadata == FLAT, field.default is None) for field in fields(kind)]


@functools.cache
def _parser(kind: Any) -> Parser:
    if kind is Any:
        return lambda value: value
    if is_dataclass(kind):
        return _record_parser(cast(type, kind))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return lambda value: value if value in arguments else _refuse(" or ".join(arguments), value)
    if origin is types.UnionType:  # with None
        parse = _parser(arguments[0])
        return lambda value: None if value is None else parse(value)
    if origin is tuple:
        parse = _parser(arguments[0])
        return lambda value: tuple(map(parse, value)) if isinstance(value, list) else _refuse("a list", value)
    if origin is not None:
        parse = _parser(arguments[1])
        return lambda value: {name: _parse_item(parse, name, item) for name, item in _object(value).items()}
    accepted = (int, float) if kind is float else (kind,)
    return lambda value: value if type(value) in accepted else _refuse(_NAMES[kind], value)


def _record_parser(kind: type) -> Parser:
    hints = get_type_hints(kind)
    parsers = [(field, _parser(hints[field.name])) for field in fields(kind)]
    flat = {field.name: parse for field, parse in parsers if field.metadata == FLAT}
    own = {field.name: (parse, field.default is MISSING) for field, parse in parsers if field.name not in flat}

    def parse_fields(value: Any) -> Any:
        found = {name: parse(_object(value)) for name, parse in flat.items()}
        for name, (parse, required) in own.items():
            if name in _object(value):
                found[name] = _parse_item(parse, name, value[name])
            elif required:
                raise ValueError(f"{name} is missing")
        return kind(**found)

    return parse_fields


def _parse_item(parse: Parser, name: str, item: Any) -> Any:
    try:
        return parse(item)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else _refuse(_NAMES[dict], value)


def _refuse(expected: str, value: object) -> Any:
    shown = repr(value)
    raise ValueError(f"must be {expected}, not {shown if len(shown) <= 40 else shown[:37] + '...'}")

"""Frozen dataclasses from plain JSON values: what a file must hold is declared once, by the fields of its record."""

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Record = TypeVar("Record")

FLAT: Mapping[str, Any] = {"flat": True}
"""Metadata of a field whose record has its keys among those of the record around it."""

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def parse_record(kind: type[Record], content: object) -> Record:
    """`content` as the dataclass `kind`; a field with a default may be missing, and unknown keys are ignored.

    Fields may be numbers, texts, booleans, None, literals, other dataclasses, mappings with text keys, tuples of any
    length, unions of these, and `Any`.

    Raises:
        ValueError: names what is missing or has another type.
    """
    return cast(Record, _parser(cast(Hashable, kind))(content))


def to_json(value: Any) -> Any:
    """A record as plain JSON values. A field that is None by default and in fact is left out."""
    if dataclasses.is_dataclass(value):
        content: dict[str, Any] = {}
        for name, optional, is_flat in _fields_to_write(cast(Hashable, type(value))):
            field = getattr(value, name)
            if is_flat:
                content |= to_json(field)
            elif field is not None or not optional:
                content[name] = to_json(field)
        return content
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, tuple | list) else value


@functools.cache
def _fields_to_write(kind: Any) -> list[tuple[str, bool, bool]]:
    return [(field.name, field.default is None, field.metadata == FLAT) for field in dataclasses.fields(kind)]


# Parsers are made once for each type: a manifest may have hundreds of thousands of fragments.
@functools.cache
def _parser(kind: Any) -> Callable[[Any], Any]:
    if kind is Any:
        return lambda value: value
    if dataclasses.is_dataclass(kind):
        return _record_parser(cast(type, kind))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return lambda value: value if value in arguments else _refuse(" or ".join(map(str, arguments)), value)
    if origin in (Union, types.UnionType):
        return _union_parser(arguments)
    if origin is tuple:
        item = _parser(arguments[0])
        return lambda value: tuple(map(item, value)) if isinstance(value, list) else _refuse("a list", value)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping_parser(_parser(arguments[1]))
    accepted = (int, float) if kind is float else (kind,)
    return lambda value: value if type(value) in accepted else _refuse(_NAMES[kind], value)


def _record_parser(kind: type) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    fields = [
        (field.name, _parser(hints[field.name]), field.default is dataclasses.MISSING, field.metadata == FLAT)
        for field in dataclasses.fields(kind)
    ]

    def parse(value: Any) -> Any:
        if not isinstance(value, dict):
            _refuse("an object", value)
        found = {}
        for name, parser, required, is_flat in fields:
            if is_flat:
                found[name] = parser(value)
            elif name in value:
                try:
                    found[name] = parser(value[name])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
            elif required:
                raise ValueError(f"{name} is missing")
        return kind(**found)

    return parse


def _mapping_parser(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if not isinstance(value, dict):
            _refuse("an object", value)
        found = {}
        for name, content in value.items():
            try:
                found[name] = item(content)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found

    return parse


def _union_parser(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    parsers = [_parser(kind) for kind in kinds if kind is not type(None)]
    nullable = type(None) in kinds

    def parse(value: Any) -> Any:
        if value is None and nullable:
            return None
        for parser in parsers[:-1]:
            try:
                return parser(value)
            except ValueError:
                continue
        return parsers[-1](value)

    return parse


def _refuse(expected: str, value: object) -> Any:
    shown = repr(value)
    raise ValueError(f"must be {expected}, not {shown if len(shown) <= 40 else shown[:37] + '...'}")

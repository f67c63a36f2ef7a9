"""Typed records from JSON. What was written by another process is parsed once, into a dataclass, with types checked."""

import json
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
_Parser = Callable[[Any], Any]

_SCALARS = {int: "an integer", str: "a string", bool: "true or false"}


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
    """A JSON value as `kind`: a dataclass, or a list or tuple of one type. Keys that it does not know are ignored.

    Raises:
        ValueError: a field is missing or has another type; the message names it.
    """
    schema: Any = kind
    record: Record = _parser(schema)(value)
    return record


def parse_json(kind: type[Record], content: bytes | str) -> Record:
    """The `kind` in a JSON document.

    Raises:
        ValueError: as for `load_json` and `to_record`.
    """
    return to_record(kind, load_json(content))


@cache
def _parser(kind: Any) -> _Parser:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass_parser(kind)
    if origin in (list, tuple):
        return _sequence_parser(origin, _parser(arguments[0]))
    if origin is Literal:
        return _checked(lambda value: value in arguments, f"one of {', '.join(map(repr, arguments))}", kind)
    if NoneType in arguments:
        (other,) = (argument for argument in arguments if argument is not NoneType)
        parse = _parser(other)
        return lambda value: None if value is None else parse(value)
    if kind is float:
        return _checked(lambda value: type(value) in (int, float), "a number", float)
    return _checked(lambda value: type(value) is kind, _SCALARS[kind], kind)


def _checked(accepts: Callable[[Any], bool], expected: str, kind: Any) -> _Parser:
    def parse(value: Any) -> Any:
        if not accepts(value):
            raise ValueError(f"{str(value)[:40]!r} is not {expected}")
        return float(value) if kind is float else value

    return parse


def _sequence_parser(sequence: Callable[[list[Any]], Any], parse_item: _Parser) -> _Parser:
    def parse(value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError(f"{str(value)[:40]!r} is not a list")
        items = []
        for position, item in enumerate(value):
            try:
                items.append(parse_item(item))
            except ValueError as error:
                raise ValueError(f"[{position}] {error}") from None
        return sequence(items)

    return parse


def _dataclass_parser(kind: Any) -> _Parser:
    hints = get_type_hints(kind)
    parsers = [(field.name, _parser(hints[field.name]), field.default is MISSING) for field in fields(kind)]

    def parse(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{str(value)[:40]!r} is not an object")
        found = {}
        for name, parse_field, required in parsers:
            if name in value:
                try:
                    found[name] = parse_field(value[name])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
            elif required:
                raise ValueError(f"{name} is missing")
        return kind(**found)

    return parse

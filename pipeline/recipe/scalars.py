"""Numbers, truth values and null from unquoted text, where the schema of a section asks for them."""

import math
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from data.files.yaml_text import Unquoted

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_NULL = {"", "~", "null", "Null", "NULL"}
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def converted(value: Any, annotation: Any) -> Any:
    """A value of `data.files.yaml_text` as plain Python values, unquoted text converted to what `annotation` asks for.

    Text that is not what is asked for stays text, which validation refuses.
    """
    kinds = list(_kinds(annotation))
    if isinstance(value, Unquoted):
        return _scalar(value, kinds)
    if isinstance(value, list):
        items = next((get_args(kind)[0] for kind in kinds if get_origin(kind) in (tuple, list)), str)
        return [converted(item, items) for item in value]
    if isinstance(value, dict):
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        known: Mapping[str, Any] = {} if section is None else section.model_fields
        return {key: converted(item, known[key].annotation if key in known else str) for key, item in value.items()}
    return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives that a type consists of, without their metadata."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for kind in get_args(annotation):
            yield from _kinds(kind)
    else:
        yield annotation


def _scalar(text: Unquoted, kinds: list[Any]) -> Any:
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if text in _NULL and text not in words:
        return None  # also where it is not allowed: then quotes are missing, or a value is
    if bool in kinds and text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    if (int in kinds or any(type(word) is int for word in words)) and _INTEGER.fullmatch(text):
        return int(text)
    if float in kinds and _is_decimal(text):
        return float(text)
    return str(text)


def _is_decimal(text: str) -> bool:
    return _DECIMAL.fullmatch(text) is not None and math.isfinite(float(text))


def number_fix(text: str, *, whole: bool) -> str:
    """How to write the number that `text` may mean, where it is not one."""
    bare = text.strip().replace("_", "")
    if _INTEGER.fullmatch(text) or (not whole and _is_decimal(text)):
        return "remove the quotes"
    if re.fullmatch(r"[-+]?0+[0-9]+", bare):
        return f"write {int(bare)}, without leading zeros, which some programs read as octal"
    if re.fullmatch(r"[-+]?0([xX][0-9a-fA-F]+|[oO][0-7]+|[bB][01]+)", bare):
        return f"write it in decimal digits: {int(bare, 0)}"
    if _is_decimal(bare) and not whole:
        return f"write {bare}"
    if _is_decimal(bare) and abs(float(bare)) < 1e15:
        return f"write {int(float(bare))}" if float(bare).is_integer() else "write a whole number"
    return "write a number in decimal digits"

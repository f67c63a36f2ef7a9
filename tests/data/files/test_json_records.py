"""Typed records from JSON: valid content is accepted, everything else is refused with the name of the field."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import pytest

from data.files.json_records import parse_json, to_record


@dataclass(frozen=True, slots=True)
class Inner:
    kind: Literal["a", "b"]
    share: float


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    count: int
    inner: Inner
    many: tuple[Inner, ...] = ()
    names: list[str] | None = None
    flag: bool = False


INNER = '{"kind": "a", "share": 1}'
INVALID_OUTER: list[tuple[str, str]] = [
    ("", "it is empty"),
    (" \n", "it is empty"),
    ('{"name": "x", "cou', "Unterminated string"),
    ("[" * 100_000, "nested too deeply"),
    ("[]", r"must be an object, not \[\]"),
    ("null", "must be an object, not None"),
    ('{"name": "x"}', "count is missing"),
    (f'{{"name": 1, "count": 1, "inner": {INNER}}}', "name: must be a string, not 1"),
    (f'{{"name": "x", "count": "1", "inner": {INNER}}}', "count: must be an integer, not '1'"),
    (f'{{"name": "x", "count": 1.0, "inner": {INNER}}}', "count: must be an integer, not 1.0"),
    (f'{{"name": "x", "count": true, "inner": {INNER}}}', "count: must be an integer, not True"),
    ('{"name": "x", "count": 1, "inner": {"kind": "c", "share": 1}}', "inner: kind: must be 'a' or 'b', not 'c'"),
    ('{"name": "x", "count": 1, "inner": {"kind": "a", "share": "1"}}', "inner: share: must be a number, not '1'"),
    (f'{{"name": "x", "count": 1, "inner": {INNER}, "many": {INNER}}}', "many: must be a list, not "),
    (f'{{"name": "x", "count": 1, "inner": {INNER}, "many": [{INNER}, 5]}}', r"many: \[1\]: must be an object, not 5"),
    (f'{{"name": "x", "count": 1, "inner": {INNER}, "names": [null]}}', r"names: \[0\]: must be a string, not None"),
    (f'{{"name": "x", "count": 1, "inner": {INNER}, "flag": 1}}', "flag: must be true or false, not 1"),
]


@pytest.mark.parametrize(("content", "message"), INVALID_OUTER)
def test_content_of_another_shape_is_refused_by_field(content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(Outer, content)


def test_a_record_has_the_types_of_its_fields_and_ignores_unknown_keys() -> None:
    content = f'{{"name": "x", "count": 2, "inner": {INNER}, "many": [{INNER}], "names": ["y"], "other": 3}}'
    record = parse_json(Outer, content.encode())
    assert record == Outer("x", 2, Inner("a", 1.0), (Inner("a", 1.0),), ["y"])
    assert type(record.inner.share) is float


def test_fields_with_a_default_may_be_missing_or_null() -> None:
    record = parse_json(Outer, f'{{"name": "x", "count": 2, "inner": {INNER}, "names": null}}')
    assert record == Outer("x", 2, Inner("a", 1.0), (), None, False)


def test_lists_are_records_too() -> None:
    assert parse_json(list[str], '["a", "b"]') == ["a", "b"]
    with pytest.raises(ValueError, match=r"\[1\]: must be a string, not 2"):
        parse_json(list[str], '["a", 2]')


def test_strings_that_are_not_utf_8_keep_their_bytes() -> None:
    assert parse_json(list[str], '["\\udcff"]')[0].encode("utf-8", "surrogateescape") == b"\xff"


def test_of_a_union_the_first_kind_that_takes_a_value_counts() -> None:
    kind: Any = float | str | None
    assert [to_record(kind, value) for value in (1, 0.5, "nan", None)] == [1.0, 0.5, "nan", None]
    with pytest.raises(ValueError, match="must be a string, not True"):
        to_record(kind, True)
    with pytest.raises(ValueError, match="must be a string, not None"):
        to_record(cast(Any, float | str), None)

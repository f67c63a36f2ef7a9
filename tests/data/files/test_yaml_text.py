"""YAML in which scalars stay the text that a person wrote."""

from typing import Any

import pytest

from data.files.yaml_text import Unquoted, YamlError, read_yaml

SURPRISES = [
    "010",
    "0x1F",
    "1_000",
    "2024_01",
    "2024-01-01",
    "12:00:00",
    "1e6",
    ".5",
    ".inf",
    "yes",
    "no",
    "on",
    "off",
    "~",
    "null",
    "true",
]


@pytest.mark.parametrize("text", SURPRISES)
def test_scalars_are_the_text_that_was_written(text: str) -> None:
    values, _ = read_yaml(f"{text}: [{text}, '{text}']", "a.yaml")
    assert values == {text: [text, text]}
    assert [type(item) for item in values[text]] == [Unquoted, str]


def test_every_key_and_item_has_its_line() -> None:
    _, origins = read_yaml("a:\n  b:\n  - 1\n  - {c: 2}\n", "a.yaml")
    assert origins == {
        (): "a.yaml:1", ("a",): "a.yaml:1", ("a", "b"): "a.yaml:2", ("a", "b", 0): "a.yaml:3", ("a", "b", 1): "a.yaml:4",
        ("a", "b", 1, "c"): "a.yaml:4",
    }  # fmt: skip


def test_merge_keys_add_what_a_mapping_does_not_have_itself_as_copies() -> None:
    text = "one: &one {a: 1, b: {c: 1}}\ntwo: &two {a: 2, d: 2}\nall: {<<: [*one, *two], d: 3}"
    values, origins = read_yaml(text, "a.yaml")
    assert values["all"] == {"a": "1", "b": {"c": "1"}, "d": "3"}
    assert values["all"]["b"] is not values["one"]["b"]
    assert (origins["all", "a"], origins["all", "d"]) == ("a.yaml:1", "a.yaml:3")


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}", r"a.yaml:2: b.c is given twice \(first at a.yaml:2\); remove one"),
        ("a:\n- b: 1\n  b: 2", r"a.yaml:3: a.0.b is given twice \(first at a.yaml:2\)"),
        ("a: 1\n'a': 1", r"a.yaml:2: a is given twice"),
        ("a: &x\n  b: *x", r"a.yaml:1: an alias that contains itself"),
        ("a: &x\n  <<: *x", r"an alias that contains itself"),
        (bomb(), r"a.yaml:\d: more than 200,000 values, with all aliases expanded"),
        ("a: 1\nb: !env HOME", r"a.yaml:2: the tag !env has no meaning here"),
        ("a: !!python/object:os.system x", r"the tag .* has no meaning here"),
        ("[a]: 1", r"a key must be text"),
        ("<<: 3", r"<< takes a mapping"),
        ("a:\n\tb: 1", r"a.yaml:2: not YAML: .*; indent with spaces and not with tabs"),
        ("a: {b: ${HOME}/c}", r"a.yaml:1: not YAML: .*; .* quote a value that has braces, such as \${NAME}"),
        ("a: @b", r"a.yaml:1: not YAML: .*; quote the value"),
        ("a: 1\n---\na: 2", r"a.yaml:2: a second document begins here; keep one"),
        ("[" * 5000, r"too many levels"),
        (b"a: 1\nb: \xe9", r"a.yaml:2: not a text file in UTF-8 \(byte 0xe9\); save it as UTF-8"),
        ('a: 1\nb: "x\\0y"', r"a.yaml:2: has the character U\+0000; remove it"),
        ('"x\\0y": 1', r"a.yaml:1: has the character U\+0000; remove it"),
        ('a: 1\nb: ["\\ud800"]', r"a.yaml:2: has half of a character, U\+D800; correct it"),
        (b"a: 1\r\nb: \0", r"a.yaml:2: not YAML: it has the control character U\+0000; remove it"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_line(content: str | bytes, message: str) -> None:
    with pytest.raises(YamlError, match=message):
        read_yaml(content, "a.yaml")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfa: \xc3\xa9\n",
        "a: é\r\n".encode(),
        "a: é\r".encode(),
        "a: é".encode("utf-16"),
        "a: !!str é".encode(),
    ],
)
def test_byte_order_marks_and_line_ends_do_not_matter(content: bytes) -> None:
    values: Any = read_yaml(content, "a.yaml")[0]
    assert values == {"a": "é"}


def test_bytes_of_names_that_are_not_utf_8_may_be_escaped() -> None:
    assert read_yaml(r'a: "\udce9"', "a.yaml")[0] == {"a": "\udce9"}

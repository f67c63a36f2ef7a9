"""YAML as people write it: scalars stay the text that they are, and the line of every key is known.

YAML 1.1, which PyYAML reads, takes `010` for 8, `12:00:00` for 43200, `2024_01` for 202401 and `no` for False. What a
scalar means depends on what is asked for, so whoever asks decides.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data.files.regular_file import read_regular
from data.limits import YAML_BYTES, YAML_VALUES

KeyPath = tuple[str | int, ...]

_TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class Unquoted(str):
    """A scalar without quotes, which may also mean a number, a truth value or null."""

    __slots__ = ()


class YamlError(ValueError):
    """What is wrong with a document: the message begins with its name and the line, `problem` does not."""

    def __init__(self, name: str, line: int, problem: str) -> None:
        super().__init__(f"{name}:{line}: {problem}")
        self.problem = problem


class _Bounded:
    """Of a loader: as many nodes as a document may have. One takes a kilobyte, and may be two bytes of text."""

    _count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._count += 1
        if self._count > YAML_VALUES:
            problem = f"more than {YAML_VALUES:,} values; write fewer"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)  # type: ignore[attr-defined]
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[misc]
        return node


class _TextLoader(_Bounded, yaml.BaseLoader):
    pass


class _PlainLoader(_Bounded, yaml.SafeLoader):
    pass


def yaml_file(path: Path) -> bytes:
    """The content of a YAML file.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than `YAML_BYTES` bytes.
    """
    return read_regular(path, YAML_BYTES)


def read_yaml(content: bytes | str, name: str) -> tuple[Any, dict[KeyPath, str]]:
    """The values of the YAML document `name`, and the origin of every key and item by its path, as `name:line`.

    Values are mappings with text as keys, lists, and text: `Unquoted`, or `str` if it is in quotes. Aliases and merge
    keys (`<<`) are expanded to copies. An empty document is None.

    Raises:
        YamlError: not text, not YAML, a repeated key, a tag, aliases that contain themselves or expand to too much, or
            text with U+0000 or half of a character.
    """
    text = _decoded(content, name) if isinstance(content, bytes) else content
    try:
        node = _TextLoader(text).get_single_node()
        if node is None:
            return None, {}
        reading = _Reading(name)
        return reading.value(node, (), ()), reading.origins
    except yaml.reader.ReaderError as error:
        character = f"U+{error.character:04X}" if isinstance(error.character, int) else repr(error.character)
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(name, line, f"not YAML: it has the control character {character}; remove it") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or error)
        line = mark.line + 1 if mark else 1
        if problem == "but found another document":
            raise YamlError(
                name, line, "a second document begins here; keep one, and give others a file each"
            ) from None
        raise YamlError(name, line, f"not YAML: {problem}{_fix(problem)}") from None
    except RecursionError:
        raise YamlError(name, 1, "not YAML that can be read: too many levels inside one another") from None


def load_plain_yaml(content: bytes, name: str) -> Any:
    """The value of the YAML document `name` that a program has written, with the types of YAML 1.1.

    Raises:
        YamlError: not text, not YAML, not a value of its tag, or aliases that expand to too much.
    """
    text = _decoded(content, name)
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        _check_size(node, name)
        return None if node is None else loader.construct_document(node)
    except YamlError:
        raise
    except RecursionError:
        raise YamlError(name, 1, "not YAML that can be read: too many levels inside one another") from None
    except Exception as error:  # the constructors raise anything for what is no value of their tag
        raise YamlError(name, 1, f"not YAML that can be read: {' '.join(str(error).split())}") from None


def _check_size(node: yaml.Node | None, name: str) -> None:
    """Refuse a document that is too large with all aliases expanded, also without end."""
    waiting, count = [] if node is None else [node], 0
    while waiting:
        found, count = waiting.pop(), count + 1
        if count > YAML_VALUES:
            problem = f"more than {YAML_VALUES:,} values, with all aliases expanded"
            raise YamlError(name, found.start_mark.line + 1, problem)
        if isinstance(found, yaml.MappingNode):
            waiting += [part for pair in found.value for part in pair]
        elif isinstance(found, yaml.SequenceNode):
            waiting += found.value


def _decoded(content: bytes, name: str) -> str:
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 if utf16 else content.count(b"\n", 0, error.start) + 1
        problem = f"not a text file in UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8"
        raise YamlError(name, line, problem) from None


def _fix(problem: str) -> str:
    if r"'\t'" in problem:
        return "; indent with spaces and not with tabs"
    if problem.startswith(("expected ',' or '}'", "expected ',' or ']'")) and problem.endswith("got '{'"):
        return "; between braces or brackets, quote a value that has braces, such as ${NAME}"
    if problem.endswith("cannot start any token"):
        return "; quote the value"
    return ""


class _Reading:
    """Values of nodes, and the origins of all keys so far."""

    def __init__(self, name: str) -> None:
        self.origins: dict[KeyPath, str] = {(): f"{name}:1"}
        self._name = name
        self._count = 0

    def value(self, node: yaml.Node, path: KeyPath, above: tuple[int, ...]) -> Any:
        """The value of `node` at `path`; `above` are the identities of the nodes that contain it."""
        if id(node) in above:
            raise self._error(node, "an alias that contains itself")
        self._count += 1
        if self._count > YAML_VALUES:
            raise self._error(node, f"more than {YAML_VALUES:,} values, with all aliases expanded; write fewer")
        if node.tag not in _TEXT_TAGS:
            raise self._error(node, f"the tag {node.tag} has no meaning here; remove it, or quote the value")
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for number, item in enumerate(node.value):
                self.origins[(*path, number)] = self._origin(item)
                items.append(self.value(item, (*path, number), above))
            return items
        text = self._text(node)
        return Unquoted(text) if isinstance(node, yaml.ScalarNode) and node.style is None else text

    def _text(self, node: yaml.Node) -> str:
        """Escapes in quotes may stand for what neither a file name nor an argument of a program can have."""
        text = str(node.value)
        try:
            if b"\0" in text.encode(errors="surrogateescape"):
                raise self._error(node, "has the character U+0000; remove it")
        except UnicodeEncodeError as error:
            raise self._error(node, f"has half of a character, U+{ord(text[error.start]):04X}; correct it") from None
        return text

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, above: tuple[int, ...]) -> dict[str, Any]:
        """The mapping with what its merge keys add: its own keys win, then those of earlier mappings."""
        merged: dict[str, Any] = {}
        for source in reversed([it for key, value in node.value if _is_merge(key) for it in self._sources(value)]):
            merged |= self.value(source, path, above)
        own: dict[str, tuple[yaml.Node, str]] = {}
        for key, value in node.value:
            if _is_merge(key):
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key must be text, and not a list or a mapping")
            name = self._text(key)
            if name in own:
                dotted = ".".join(map(str, (*path, name)))
                raise self._error(key, f"{dotted} is given twice (first at {own[name][1]}); remove one")
            own[name] = value, self._origin(key)
        for name, (value, origin) in own.items():
            self.origins[(*path, name)] = origin
            merged[name] = self.value(value, (*path, name), above)
        return merged

    def _sources(self, node: yaml.Node) -> Iterator[yaml.MappingNode]:
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                raise self._error(node, "<< takes a mapping or a list of mappings")
            yield source

    def _origin(self, node: yaml.Node) -> str:
        return f"{self._name}:{node.start_mark.line + 1}"

    def _error(self, node: yaml.Node, problem: str) -> YamlError:
        return YamlError(self._name, node.start_mark.line + 1, problem)


def _is_merge(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.style is None and key.value == "<<"

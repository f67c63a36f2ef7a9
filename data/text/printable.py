"""Text from outside, as it may be shown: on terminals, in logs, and wherever else a person or a program reads it.

Names of files, classes and samples, messages of libraries and logs of others may contain what a terminal obeys, what
changes the order of the text around it, or what nobody sees. And addresses may contain a signature or a login.
"""

import logging
import os
import re
import shlex
from typing import IO, Any, TextIO, cast

from data.remote.web_address import without_secrets

# Controls (Cc) but tab and line feed; separators of lines (Zl, Zp); surrogates (Cs), as which Python holds bytes that
# are not UTF-8; and what is invisible or reorders its surroundings: format characters (Cf) and fillers.
_HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff"
)
_UNPRINTABLE = re.compile(f"[{_HIDDEN}]")
_NOT_IN_LINES = re.compile(f"[{_HIDDEN}\t\n]")
_COLOUR = re.compile(r"(\x1b\[[\d;]*m)")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def printable(text: str) -> str:
    """`text` with visible escapes for what is no visible character, except for tabs and line feeds.

    An escape character becomes `\\x1b`, a byte that is not UTF-8 `\\xe9`, other characters `\\u202e`. In web addresses,
    signatures and logins are left out.
    """
    return _UNPRINTABLE.sub(_escaped, without_secrets(text))


def one_line(name: str) -> str:
    """A name as `printable` shows it, on one line: tabs and line feeds are escaped as well."""
    return _NOT_IN_LINES.sub(_escaped, without_secrets(name))


def printable_message(text: str) -> str:
    """A message as `printable` shows it, with all lines but the first indented.

    A line that a name contains does not look like one that the program has written.
    """
    return printable(text).replace("\n", "\n  ")


def shell_word(word: str) -> str:
    """`word` quoted for bash, so that `printable` changes none of its characters."""
    if not _UNPRINTABLE.search(word):
        return shlex.quote(word)
    plain = (character if character.isalnum() and character.isascii() else _bytes(character) for character in word)
    return f"$'{''.join(plain)}'"


class PrintableFormatter(logging.Formatter):
    """Log records with a time, as `printable_message` shows them."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return printable_message(super().format(record))


class PrintableStream:
    """A text stream that writes what `printable` returns to `unescaped`; on a terminal, colours are kept."""

    def __init__(self, unescaped: TextIO) -> None:
        self.unescaped = unescaped

    def write(self, text: str) -> int:
        """Returns the number of characters of `text`."""
        if self.unescaped.isatty():
            parts = _COLOUR.split(text)
            parts[::2] = map(printable, parts[::2])
            self.unescaped.write("".join(parts))
        else:
            self.unescaped.write(printable(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def printable_stream(stream: IO[str]) -> TextIO:
    """`stream`, so that whatever is written to it is printable."""
    return cast(TextIO, stream if isinstance(stream, PrintableStream) else PrintableStream(cast(TextIO, stream)))


def unescaped(stream: TextIO) -> TextIO:
    """The stream beneath a printable one, for writers that escape what they write themselves."""
    return cast(TextIO, getattr(stream, "unescaped", stream))


def _bytes(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, see PEP 383
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return _SHORT.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

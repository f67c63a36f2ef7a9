"""Output of names that the locale cannot encode, such as those of files written under another one."""

import codecs
import io
import sys

_HANDLER = "coatnet-escape"


def escape_output() -> None:
    """Let standard output and error take every string in every locale: what they cannot encode is escaped.

    A byte of a name that is not UTF-8 is printed as `\\xe9`, a character that the locale lacks as `\\u2026`.
    """
    codecs.register_error(_HANDLER, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    # Python holds bytes that are not UTF-8 as the code points U+DC80 to U+DCFF.
    escaped = (
        f"\\x{ord(character) - 0xDC00:02x}"
        if "\udc80" <= character <= "\udcff"
        else character.encode("ascii", "backslashreplace").decode()
        for character in error.object[error.start : error.end]
    )
    return "".join(escaped), error.end

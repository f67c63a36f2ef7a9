"""What of text from outside reaches a terminal or a log: no control, nothing invisible, no signature."""

import io
import logging
import os
import subprocess
import sys
import unicodedata

import pytest

from data.text.printable import PrintableFormatter, PrintableStream, one_line, printable, printable_message, shell_word


@pytest.mark.parametrize(
    ("text", "shown"),
    {
        "\x1b]0;title\x07": r"\x1b]0;title\x07",
        "\x1b[2J\x9b2J": r"\x1b[2J\u009b2J",
        "hidden\rshown": r"hidden\rshown",
        "caf\udce9": r"caf\xe9",
        "\ud800": r"\ud800",
        "gpj.\u202eexe": r"gpj.\u202eexe",
        "a\u200bb\ufeffc\xadd\u3164": r"a\u200bb\ufeffc\u00add\u3164",
        "a\u2028b\x85c": r"a\u2028b\u0085c",
        "\U000e0041": r"\U000e0041",
        "two\tcells\nlines": "two\tcells\nlines",
        "naïve 日本 مرحبا ❤\ufe0f e\u0301 😀 [/red]": "naïve 日本 مرحبا ❤\ufe0f e\u0301 😀 [/red]",
    }.items(),
)
def test_what_is_not_visible_is_escaped_and_all_else_kept(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_no_character_that_terminals_obey_or_that_separates_lines_remains() -> None:
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp"):
            assert printable(chr(code)).isascii()
            assert one_line(chr(code)).isprintable()
        elif unicodedata.bidirectional(chr(code)) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"):
            assert printable(chr(code)).isascii()
        elif chr(code).isprintable() and unicodedata.category(chr(code)) not in ("Lo", "Mn"):
            assert printable(chr(code)) == chr(code)


@pytest.mark.parametrize(
    ("text", "shown"),
    {
        "https://host/x.tar?X-Amz-Signature=SECRET: refused": "https://host/x.tar?...: refused",
        "(first http://host/x.tar?sv=1&sig=SECRET%3D), then": "(first http://host/x.tar?...), then",
        "url=URL('https://host/a%20b?token=SECRET')": "url=URL('https://host/a%20b?...')",
        '{"url": "https://host/x?SECRET"}': '{"url": "https://host/x?..."}',
        "train-0001.tar?SECRET: missing": "train-0001.tar?...: missing",
        "exceeded with url: /x.tarball?X-Amz-Signature=SECRET (": "exceeded with url: /x.tarball?X-Amz-Signature=... (",
        "HTTPS://HOST/x?SECRET": "HTTPS://HOST/x?...",
        "proxy http://me:SECRET@host:8080/": "proxy http://...@host:8080/",
        "s3://key:SECRET@bucket/x": "s3://...@bucket/x",
        "https://host/x.tar?... was meant? yes": "https://host/x.tar?... was meant? yes",
        "see https://host/page. Right?": "see https://host/page. Right?",
        "s3://bucket/a:b@c and key=value": "s3://bucket/a:b@c and key=value",
    }.items(),
)
def test_signatures_and_logins_in_addresses_are_left_out(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert one_line(shown) == shown


def test_a_name_cannot_pretend_to_be_a_line_of_its_own() -> None:
    forged = "2026-01-01 00:00:00 job 7: done"
    assert printable_message(f"missing: x\n{forged}") == f"missing: x\n  {forged}"
    assert one_line(f"x\n{forged}") == f"x\\n{forged}"


def test_lines_of_logs_begin_with_their_time_or_are_indented() -> None:
    try:
        raise ValueError("https://host/x?SECRET \x1b\nerror: forged")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x", 1, "%s", ("a\nerror: forged",), sys.exc_info())
    first, *others = PrintableFormatter().format(record).split("\n")
    assert first.endswith("ERROR a")
    assert all(line.startswith("  ") for line in others)
    assert others[-2].endswith(r"https://host/x?... \x1b")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_streams_keep_colours_on_terminals_alone(is_terminal: bool) -> None:
    below = io.StringIO()
    below.isatty = lambda: is_terminal  # type: ignore[method-assign]
    stream = PrintableStream(below)
    assert stream.write("\x1b[1;31mred\x1b[0m \x1b]0;x\x07\r\n") == 23
    colours = "\x1b[1;31mred\x1b[0m" if is_terminal else r"\x1b[1;31mred\x1b[0m"
    assert below.getvalue() == colours + " " + r"\x1b]0;x\x07\r" + "\n"


@pytest.mark.parametrize("word", ["plain", "two words", "a\nb", "it's \x1b[2J\\ \u202e\r$x", "caf\udce9-1é"])
def test_words_of_commands_stay_the_same_in_bash(word: str) -> None:
    line = shell_word(word)
    assert printable(line) == line
    assert subprocess.run(["bash", "-c", f"printf %s {line}"], capture_output=True).stdout == os.fsencode(word)

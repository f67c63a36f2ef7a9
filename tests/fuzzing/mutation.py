"""Damage to files: of their bytes, of JSON values, of tar headers with correct checksums, of safetensors headers."""

import json
import random
import tarfile
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

from data.files.digest import json_sha256

ODD_VALUES: tuple[Any, ...] = (
    -1, 0, 1, 2, 255, 2**31, 2**32 + 1, 2**63 - 1, 2**63, -(2**63), 2**70, 10**400, -(10**400), 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), -float("inf"), True, False, None, "", " ", "0", "-1", "1e999", "nan", "\0", "a\0b",
    "../x", "/etc/passwd", "a/../../b", "a/b", ".", "..", "~", "\ud800", "\udcff", "é", "\u202e", "\x1b[2J",
    "pipe:id", "s3://bucket/x", "http://user:secret@host/x", "file:///etc/passwd", "x" * 5000, "9" * 5000, "1_000",
    "٣", "²", "$HOME", "{0..999999999}", "*", [], [[]], [None], {}, {"": None}, [0] * 2000, {"a": {"a": {"a": []}}},
)  # fmt: skip
_TOKENS = (
    b"\0", b"\xff", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\t", b",", b'"', b"'", b"{", b"}", b"[", b"]",
    b":", b"#", b"&a ", b"*a", b"<<: *a\n", b"!!python/object/apply:os.system ", b"!!binary ", b"!!timestamp ", b"- ", b"? ",
    b"|\n", b"%YAML 9.9\n", b"---\n", b"...\n", b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"2001-99-99", b"0x10", b"1_0",
    b"9" * 5000, b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3", b"\x1b[31m", b"\xe2\x80\xa8", b"\x85", b"../", b"=", b"|", b";",
)  # fmt: skip
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
_LONGEST = 2**20
"""Bytes of an input, unless its seed is longer."""


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """`content` with up to a few random changes."""
    found, most = bytearray(content), max(_LONGEST, len(content))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        rng.choice(_CHANGES)(rng, found)
    return bytes(found[:most])


def _flip(rng: random.Random, content: bytearray) -> None:
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, content: bytearray) -> None:
    if content:
        content[rng.randrange(len(content))] = rng.randrange(256)


def _stretch(rng: random.Random, content: bytearray) -> None:
    start, length = rng.randrange(len(content) + 1), rng.choice((2, 8, 64, 600))
    content[start : start + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))


def _number(rng: random.Random, content: bytearray) -> None:
    length = rng.choice((1, 2, 4, 8))
    number = (rng.choice(_NUMBERS) & (2 ** (8 * length) - 1)).to_bytes(length, rng.choice(("big", "little")))
    start = rng.randrange(len(content) + 1)
    content[start : start + length] = number


def _token(rng: random.Random, content: bytearray) -> None:
    start = rng.randrange(len(content) + 1)
    content[start:start] = rng.choice(_TOKENS)


def _many_tokens(rng: random.Random, content: bytearray) -> None:
    start = rng.randrange(len(content) + 1)
    content[start:start] = rng.choice(_TOKENS) * rng.choice((10, 1000, 20_000))


def _cut(rng: random.Random, content: bytearray) -> None:
    del content[rng.randrange(len(content) + 1) :]


def _remove(rng: random.Random, content: bytearray) -> None:
    start = rng.randrange(len(content) + 1)
    del content[start : start + rng.choice((1, 1, 4, 64, 512))]


def _repeat(rng: random.Random, content: bytearray) -> None:
    start = rng.randrange(len(content) + 1)
    part = content[start : start + rng.choice((1, 8, 64, 512, 4096))]
    content[start:start] = part * rng.choice((1, 1, 2, 100))


def _move(rng: random.Random, content: bytearray) -> None:
    start, length = rng.randrange(len(content) + 1), rng.choice((1, 8, 64, 512))
    part = content[start : start + length]
    del content[start : start + length]
    there = rng.randrange(len(content) + 1)
    content[there:there] = part


_CHANGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _flip, _flip, _byte, _stretch, _number, _token, _token, _many_tokens, _cut, _remove, _repeat, _move,
)  # fmt: skip


def damaged_value(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with a few changes of its structure."""
    found = deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(_places(found))
        if not places:
            return rng.choice(ODD_VALUES)
        holder, key = rng.choice(places)
        change = rng.randrange(7)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[str(rng.choice(ODD_VALUES))] = holder.pop(key)
        elif change == 2:
            other, there = rng.choice(places)
            holder[key] = deepcopy(other[there])
        elif change == 3 and isinstance(holder[key], int | float):
            holder[key] += rng.choice((-1, 1, 512, -(2**40), 2**40))
        elif change == 4 and isinstance(holder, list):
            holder *= rng.choice((0, 2, 3))
        else:
            holder[key] = deepcopy(rng.choice(ODD_VALUES))
        found = found if isinstance(found, dict | list) else {}
    return found


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < 5000:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return found


def damaged_json(rng: random.Random, value: Any, sign: Callable[[Any], Any] = lambda value: value) -> bytes:
    """JSON of `value` with changes of its structure, in one of three of its bytes, or nested without end.

    `sign` recomputes the digests in it, as whoever writes such a file deliberately would.
    """
    kind = rng.randrange(12)
    if kind == 0:
        return nested(rng)
    if kind <= 4:
        return damaged_bytes(rng, json.dumps(value).encode())
    changed = damaged_value(rng, value)
    # Some are too far from the format to have a digest.
    with suppress(AttributeError, KeyError, TypeError, ValueError, OverflowError):
        changed = sign(changed)
    return json.dumps(changed).encode()


def nested(rng: random.Random) -> bytes:
    """JSON of so many levels that a recursive parser must give up."""
    begin, end = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"time":', b"}")))
    depth = rng.choice((500, 990, 5000, 100_000))
    return begin * depth + b"1" + end * depth


def signed(value: Any) -> Any:
    """A manifest with its own checksum."""
    content = {key: item for key, item in value.items() if key != "sha256"}
    return content | {"sha256": json_sha256(content)}


def damaged_tar(rng: random.Random, content: bytes) -> bytes:
    """A tar with damaged headers, whose checksums are then made correct nine times out of ten."""
    found = bytearray(content)
    headers = [at for at in range(0, len(found) - 511, 512) if found[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.choice(headers)
        kind = rng.randrange(9)
        if kind == 0:
            found[at + 156] = rng.choice(b"\x000123456789ADKLMNSVXxg")
        elif kind == 1:
            found[at + 124 : at + 136] = rng.choice(_SIZES)
        elif kind == 2:
            found[at : at + 100] = rng.choice(_NAMES).ljust(100, b"\0")[:100]
        elif kind == 3:
            found[at + 156 : at + 257] = rng.choice(b"12").to_bytes() + rng.choice(_NAMES).ljust(100, b"\0")[:100]
        elif kind == 4:
            start = at + rng.randrange(512)
            found[start : start + 4] = rng.randbytes(4)
        elif kind == 5:
            found[at:at] = _extended(rng)
            headers = [place + (1024 if place >= at else 0) for place in headers]
        elif kind == 6:
            found[at + 482] = 1
            found[at + 156] = ord("S")
        elif kind == 7:
            found[at:at] = bytes(rng.choice((512, 1024, 10240)))
            break
        else:
            other = rng.choice(headers)
            found[at : at + 512] = found[other : other + 512]
    if rng.randrange(10):
        with_checksums(found)
    return bytes(found[: rng.randrange(len(found))] if rng.randrange(10) == 0 else found)


_SIZES = (
    b"00000000000\0", b"77777777777\0", b"\x80" + bytes(10) + b"\x10", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0",
    b"            ", bytes(12), b"0x000000010\0", b"00000000001\0", b"00000002000\0", b"\x80" + bytes(11),
)  # fmt: skip
_NAMES = (
    b"", b"a", b"a.jpg", b"a.cls", b".jpg", b"../../a.jpg", b"/etc/passwd", b"a/b/c.jpg", b"a/", b"." * 100, b"/" * 100,
    b"\xff\xfe.jpg", b"a.b.c.jpg", b"._a.jpg", b"x" * 100, b"\n.jpg", b"\x1b[2J.jpg", b"a..jpg", b"a.JPG", b"a.seg.jpg",
)  # fmt: skip
_RECORDS = (
    b"12 path=a.j\n", b"13 size=9999\n", b"9 size=1\n", b"11 size=-1\n", b"0 a=b\n", b"5 a=\n" * 90, b"999 path=a\n",
    b"20 GNU.sparse.map=0\n", b"99999999999999999999 a=b\n", b"6 =ab\n", b"7 size\n", b"20 size=" + b"9" * 400, b"\xff\xfe",
    b"9" * 500 + b" a=b\n", b"18 linkpath=a.jpg\n", b"8 path=\n", b"\xb2 a=b\n", b"10 size=\xb2\n",
)  # fmt: skip


def _extended(rng: random.Random) -> bytes:
    """A header of pax records or a long name, with its content of one block."""
    content = rng.choice(_RECORDS)[:512]
    kind = rng.choice((b"x", b"g", b"X", b"L", b"K"))
    header = bytearray(b"pax".ljust(124, b"\0") + b"%011o\0" % len(content) + bytes(20) + kind + bytes(355))
    header[257:265] = b"ustar\x0000"
    return bytes(header) + content.ljust(512, b"\0")


def with_checksums(content: bytearray) -> None:
    """Make the checksums of all headers correct, in place."""
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + tarfile.BLOCKSIZE])


def damaged_tensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file whose header is damaged, with the length of the header recomputed most of the time."""
    length = int.from_bytes(content[:8], "little")
    if rng.randrange(4) == 0:
        return damaged_bytes(rng, content)
    header = damaged_json(rng, json.loads(content[8 : 8 + length]))
    stated = len(header) if rng.randrange(8) else rng.choice(_NUMBERS)
    return stated.to_bytes(8, "little") + header + content[8 + length :]

"""The position of an image in the global shuffle and its key in a shard: functions of its name only."""

import hashlib
import re

_UNSAFE = re.compile(r"[^\w\-+@=,() ]")  # in keys: a dot would end the key
_LONGEST = 80  # bytes of a key; with an extension it fits into a plain tar header


def encoded_name(name: str) -> bytes:
    """The name as bytes; a file name in another encoding than UTF-8 keeps its bytes."""
    return name.encode("utf-8", "surrogateescape")


def decoded_name(name: bytes) -> str:
    """The inverse of `encoded_name`."""
    return name.decode("utf-8", "surrogateescape")


def shuffle_rank(name: str, seed: int) -> int:
    """64 random bits of an image; a dataset is shuffled by sorting by (rank, name)."""
    return int.from_bytes(hashlib.blake2b(encoded_name(name), digest_size=8, key=b"%d" % seed).digest(), "little")


def sample_key(name: str) -> str:
    """A WebDataset key: folder/stem without further dots, short enough for a tar header. Not unique."""
    folder, _, file_name = name.rpartition("/")
    stem = file_name.rpartition(".")[0] or file_name
    key = "/".join(_UNSAFE.sub("_", part) for part in (folder, stem) if part)
    if len(key.encode()) > _LONGEST:
        key = hashlib.sha256(encoded_name(name)).hexdigest()[:32]
    return key


def key_hash(name: str) -> int:
    """64 bits that are equal if the keys are."""
    return int.from_bytes(hashlib.blake2b(sample_key(name).encode(), digest_size=8).digest(), "little")

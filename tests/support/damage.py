"""Damage to shards that only their sha256 shows."""

import os
from pathlib import Path

from data.tar import read_tar


def flip_a_pixel(shard: Path) -> None:
    """Flip one bit in the middle of the last image of a shard, keeping its size and the time of its last modification."""
    before = shard.stat()
    with open(shard, "rb") as file:
        images = [member for member in read_tar(file.fileno())[0] if member.name.endswith(".jpg")]
    place = images[-1].offset + images[-1].size // 2
    data = bytearray(shard.read_bytes())
    data[place] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)

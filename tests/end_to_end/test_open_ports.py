"""A run on one machine and a process of somebody else on it: where it can connect, and that this changes nothing."""

import os
import socket
from pathlib import Path

import psutil
import pytest

from tests.support.accounts import as_nameless
from tests.support.command import ended, ranks, start, wait_until
from tests.support.recipes import events, write_recipe

pytestmark = pytest.mark.slow(seconds=10)
STORES = Path("/dev/shm")  # noqa: S108


def test_nobody_else_can_connect_to_the_store_or_disturb_the_ranks_of_one_machine(shards: Path, tmp_path: Path) -> None:
    log = tmp_path / "runs/test/pretrain/logs/rank-00000.log"
    before = set(STORES.glob("coatnet-*"))
    process = start("train", write_recipe(tmp_path, shards), "pretrain")
    wait_until(lambda: log.exists() and "step 2/40" in log.read_text(), process)
    # A launcher or a rank, with what it has started.
    started = [psutil.Process(process.pid), *ranks(process)]
    started += [child for one in started[1:] for child in one.children(recursive=True)]
    listens = [one.laddr for each in started for one in each.net_connections() if one.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listens} == {"127.0.0.1"}  # Gloo's

    assert set(STORES.glob("coatnet-*/store"))

    def disturb() -> list[str]:
        for address in listens:
            for junk in (b"", b"\x01" + bytes(7), b"\x1b[2J" * 1000, b"\x09\x0d\x19\x3c\x00\x00\x00\x00"):
                with socket.socket() as connection:
                    connection.connect(address)
                    connection.sendall(junk)
        found = []
        for folder in set(STORES.glob("coatnet-*")) - before:
            try:
                found.append(f"{folder}: {os.listdir(folder)}")
            except (PermissionError, FileNotFoundError):
                continue
        return found

    if os.getuid() == 0:
        assert as_nameless(disturb) == []
    disturb()
    assert ended(process) == ""
    assert process.returncode == 0
    assert [event["event"] for event in events(tmp_path / "runs/test/pretrain")].count("begin") == 1

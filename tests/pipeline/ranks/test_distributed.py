"""The process group of a real rank, the store for its other threads, and the errors of lost ranks."""

import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import DeviceFailed, LostRank
from pipeline.ranks.distributed import name_lost_ranks
from tests.support.command import environment
from tests.support.ports import free_ports

RANK = """
import os
import torch, torch.distributed as dist
from pipeline.ranks.distributed import connect_store, join_ranks

ranks = join_ranks(1)
for group in (dist.group.WORLD, dist.new_group([0])):  # DeepSpeed makes its own
    print(group._get_backend(torch.device("cpu")).options._timeout.days)
store = connect_store("test")
stranger = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), wait_for_workers=False)
for key in ("test/0/key", "other/0/key", "default_pg/0//cpu//0/0", "ranks/0/0", "key"):
    stranger.set(key, "\033[2J")
print(store.check(["key"]))
store.set("key", "value")
print(stranger.delete_key("test/0/key"), stranger.delete_key("key"))
print(connect_store("test").get("key").decode())
print(connect_store("other").check(["key"]))
os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
print(connect_store("test").check(["key"]))
"""


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        # Without a GPU that could fail: the errors that torch and NCCL raise.
        (
            torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCompile with"),
            DeviceFailed,
            f"rank 3 on {socket.gethostname()}: its GPU failed (CUDA error: uncorrectable ECC error encountered)",
        ),
        (
            dist.DistBackendError("NCCL error: remote process exited"),
            LostRank,
            "rank 3 lost another rank, whose log has the reason (NCCL error: remote process exited)",
        ),
        (RuntimeError("mat1 and mat2 do not fit"), RuntimeError, "mat1 and mat2 do not fit"),
    ],
)
def test_errors_name_the_lost_rank_or_the_failed_device(
    error: RuntimeError, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(kind) as raised, name_lost_ranks():
        raise error
    assert (type(raised.value), str(raised.value)) == (kind, message)


@pytest.mark.slow
def test_no_timeout_precedes_the_watchdog_and_stores_are_separate_by_job_name_and_restart() -> None:
    port = str(free_ports(1)[0])
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    said = subprocess.run(
        [sys.executable, "-c", RANK],
        env=environment() | variables | {"COATNET_STORE_SECRET": "b6d1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.stdout.splitlines() == ["7", "7", "False", "True True", "value", "False", "False"], said.stderr

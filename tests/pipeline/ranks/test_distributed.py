"""The process group of a real rank, the store for its other threads, and the errors of lost ranks."""

import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import ConfigError, DeviceFailed, LostRank, NetworkFailed, RunFailed
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


RANK_3 = f"rank 3 on {socket.gethostname()}"


def nccl(what: str, last_error: str) -> dist.DistBackendError:
    """As torch 2.13 raises it."""
    return dist.DistBackendError(
        f"NCCL error in: ProcessGroupNCCL.cpp:3690, {what} (run with NCCL_DEBUG=INFO for details), NCCL version 2.29.3\n"
        f"ncclError: {what}\nLast error:\n{last_error}\n"
    )


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
        (
            nccl(
                "remote process exited or there was a network error", "socketProgress: Connection closed by remote peer"
            ),
            LostRank,
            "rank 3 lost another rank, whose log has the reason (socketProgress: Connection closed by remote peer)",
        ),
        (
            RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:2398"),
            LostRank,
            "rank 3 lost another rank, whose log has the reason "
            "([/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:2398)",
        ),
        (
            RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:144] no error"),
            LostRank,
            "rank 3 lost another rank, whose log has the reason ([/pytorch/gloo/transport/tcp/pair.cc:144] no error)",
        ),
        (
            dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server"),
            LostRank,
            "rank 3 lost another rank, whose log has the reason "
            "(Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server)",
        ),
        (
            nccl("unhandled system error", "Call to connect to 10.0.0.1<51423> failed : No route to host"),
            NetworkFailed,
            f"{RANK_3} could not communicate with the other ranks (Call to connect to 10.0.0.1<51423> failed : No route "
            "to host); look at the network between the machines, with NCCL_DEBUG=INFO on GPUs, and whether the variables "
            "of its interfaces name the right ones",
        ),
        (
            nccl("invalid usage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"),
            ConfigError,
            f"{RANK_3}: two ranks have the same GPU (Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000); "
            "start as many ranks on each machine as it has GPUs (resources.ranks, resources.nodes), and let every task "
            "see either all GPUs of its machine or one of its own",
        ),
        (
            nccl("internal error", "Bootstrap : no socket interface found"),
            ConfigError,
            f"{RANK_3}: NCCL finds no network interface (Bootstrap : no socket interface found); correct or unset "
            "NCCL_SOCKET_IFNAME; `ip -brief address` lists the interfaces of a machine",
        ),
        (
            nccl("unhandled cuda error", "Cuda failure 2 'out of memory'"),
            RunFailed,
            f"{RANK_3}: the memory of its GPU is full before NCCL has its buffers, which it allocates outside of torch "
            "(Cuda failure 2 'out of memory'); end other programs on that GPU (nvidia-smi lists them), or use less memory: "
            "activation_checkpointing, zero_stage, or in a new run batch.micro_size",
        ),
        (
            nccl(
                "unhandled system error",
                "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888), error: No space left on device (28)",
            ),
            ConfigError,
            f"{RANK_3}: the shared memory of its machine is full or too small for NCCL (Error while creating shared memory "
            "segment /dev/shm/nccl-x (size 9637888), error: No space left on device (28)); enlarge /dev/shm (in Docker: "
            "--shm-size=8g), or remove what is left there",
        ),
        (RuntimeError("mat1 and mat2 do not fit"), RuntimeError, "mat1 and mat2 do not fit"),
    ],
)
def test_errors_name_the_lost_rank_only_for_closed_connections_and_else_the_cause(
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

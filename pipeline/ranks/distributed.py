"""The ranks of a run: this process's rank and device, and the few collectives that the pipeline uses."""

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from pipeline.ranks.communication_errors import explain_error
from pipeline.ranks.device_settings import gpu_of_rank
from pipeline.ranks.rendezvous import (
    Rendezvous,
    allow_connections,
    check_reachable,
    keep_to_this_machine,
    listen_for_ranks,
    read_rendezvous,
)

_NEVER = timedelta(days=7)
"""How long a collective may take. The watchdog ends a run that hangs and names the rank that is late; a shorter timeout
of the process group would end it first, without the name."""
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_leader(self) -> bool:
        """True on the one rank that reports and publishes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Return when all ranks have called this."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, number: int) -> int:
        """The leader's `number`, on every rank."""
        if self.world_size == 1:
            return number
        value = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(value, 0)
        return int(value.item())

    def broadcast_text(self, rank: int, text: str) -> str:
        """The `text` of `rank`, on every rank."""
        letters = torch.tensor(list(text.encode()) if self.rank == rank else [], dtype=torch.uint8, device=self.device)
        size = self.sum(torch.tensor([len(letters)], dtype=torch.int64, device=self.device)).item()
        if self.rank != rank:
            letters = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        return bytes(self.sum(letters).tolist()).decode() if size else ""

    def broadcast_tensor(self, rank: int, tensor: Tensor) -> Tensor:
        """The `tensor` of `rank`, on every rank, in place; it has the same shape and dtype on all of them."""
        if self.world_size > 1:
            dist.broadcast(tensor, rank)
        return tensor

    def from_next(self, tensor: Tensor) -> Tensor:
        """The `tensor` of the next rank in the ring of all ranks, while this one's goes to the one before.

        It has the same shape and dtype on all of them.
        """
        if self.world_size == 1:
            return tensor
        received = torch.empty_like(tensor)
        before, after = (self.rank - 1) % self.world_size, (self.rank + 1) % self.world_size
        exchange = [dist.P2POp(dist.isend, tensor, before), dist.P2POp(dist.irecv, received, after)]
        for request in dist.batch_isend_irecv(exchange):
            request.wait()
        return received

    def gather_texts(self, text: str) -> list[str]:
        """The `text` of every rank, in their order, on every rank."""
        own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(own)
        ends = [0, *self.sum(sizes).cumsum(0).tolist()]
        letters = torch.zeros(ends[-1], dtype=torch.uint8, device=self.device)
        letters[ends[self.rank] : ends[self.rank + 1]] = own
        whole = bytes(self.sum(letters).tolist()) if ends[-1] else b""
        return [whole[start:stop].decode() for start, stop in itertools.pairwise(ends)]


class KeyValueStore(Protocol):
    """Keys and values that all ranks share: the interface of torch's stores."""

    def set(self, key: str, value: str) -> None:
        """Set the value of a key."""

    def get(self, key: str) -> bytes:
        """Wait until the key exists, and return its value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number that starts at 0, and return the sum."""

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        """Set the value if the key has the expected one, or does not exist and that is empty; return the new value."""


def join_ranks(threads: int, *, gpus: bool = True) -> Ranks:
    """Join the process group that the environment describes, see `read_rendezvous`; after `prepare_devices`.

    Without a GPU, or without `gpus`, this rank computes on CPUs with `threads` threads.

    Raises:
        ConfigError: these variables or those of network interfaces are wrong, there are more ranks than GPUs, or more
            than may connect to this one at a time.
        PortTaken: the port of a job is taken.
    """
    found = read_rendezvous(os.environ)
    if gpus and torch.cuda.is_available():
        number = gpu_of_rank(found.local_rank, torch.cuda.device_count(), os.environ, socket.gethostname())
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # Otherwise DeepSpeed infers the accelerator and warns about it.
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(threads)
    # For the process groups that DeepSpeed creates.
    dist.distributed_c10d.default_pg_timeout = _NEVER
    dist.distributed_c10d.default_pg_nccl_timeout = _NEVER  # type: ignore[attr-defined]
    if device.type == "cuda":
        _join(found, "nccl", device)
    else:
        _join(found, "gloo")
    return Ranks(found.rank, found.world_size, device)


def join_without_gpus() -> Ranks:
    """Join the same group for communication between CPUs, which needs neither GPUs nor NCCL.

    Raises:
        ConfigError: the environment variables of a rank or of network interfaces are wrong, or there are more ranks
            than may connect to this one at a time.
        PortTaken: the port of a job is taken.
    """
    found = read_rendezvous(os.environ)
    _join(found, "gloo")
    return Ranks(found.rank, found.world_size, torch.device("cpu"))


def with_gpus(ranks: Ranks, device: torch.device) -> Ranks:
    """The same ranks, which joined without GPUs, as ranks that communicate through NCCL; all of them call this.

    Raises:
        RuntimeError: NCCL does not start.
    """
    torch.cuda.set_device(device)
    return GroupRanks(
        ranks.rank, ranks.world_size, device, dist.new_group(backend="nccl", timeout=_NEVER, device_id=device)
    )


@dataclass(frozen=True, slots=True)
class GroupRanks(Ranks):
    """Ranks that communicate in another process group than the one they joined."""

    group: dist.ProcessGroup

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor


@contextmanager
def name_lost_ranks() -> Iterator[None]:
    """Turn the errors of torch about another rank that is gone, or a GPU that fails, into ones that name the cause.

    Raises:
        LostRank: a process group of gloo or NCCL, or its store, lost the connection to a rank.
        DeviceFailed: the GPU reports an error, such as a memory error.
        ConfigError, RunFailed, NetworkFailed: NCCL names another cause, or a connection fails that is not closed.
    """
    try:
        yield
    except RuntimeError as error:
        explained = explain_error(error, f"rank {os.environ['RANK']} on {socket.gethostname()}")
        if explained is None:
            raise
        raise explained from error


def connect_store(name: str) -> KeyValueStore:
    """A connection to the store of the process group, for a thread other than the training thread.

    Its keys are separate from those of other names, and from those of an earlier start if the store outlives it. Unless
    the store is a file, calls block while the process that holds it, the leader's or torchrun's, is stopped.

    Raises:
        RuntimeError: there is no store; calls on the result raise it too.
    """
    return _named(_open_store(read_rendezvous(os.environ), timedelta(seconds=_CONNECT_SECONDS)), name)


def _join(found: Rendezvous, backend: str, device: torch.device | None = None) -> None:
    check_reachable(found, backend)
    if found.is_local:
        keep_to_this_machine()
    # torchrun holds a store of its own at this address.
    holds = found.rank == 0 and found.folder is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    allow_connections(found, backend, holds_store=holds)
    store = _open_store(found, _NEVER, listen_for_ranks(found) if holds else None)
    # With its GPU, NCCL connects at once: what is wrong with it shows here, and no collective has to guess the device.
    dist.init_process_group(
        backend,
        timeout=_NEVER,
        store=_named(store, "ranks"),
        rank=found.rank,
        world_size=found.world_size,
        device_id=device,
    )


def _open_store(found: Rendezvous, timeout: timedelta, listener: socket.socket | None = None) -> Store:
    """The store where the ranks meet; with `listener`, this process holds it."""
    if found.folder is not None:
        file = FileStore(f"{found.folder}/store")
        file.set_timeout(timeout)
        return file
    store: Store = TCPStore(
        found.address,
        found.port,
        is_master=listener is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener else None,
    )
    return PrefixStore(found.secret, store) if found.secret else store


def _named(store: Store, name: str) -> Store:
    return PrefixStore(f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def leave_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()

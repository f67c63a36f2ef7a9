"""What an error of torch's process groups means: a rank that is gone, something to correct, or a network that fails.

Gloo and NCCL raise RuntimeErrors that differ in their text alone. A closed connection says that another rank is gone,
whose own log has the cause. Everything else is a cause itself.
"""

import re
from typing import NamedTuple

import torch
import torch.distributed as dist

from data.errors import CoatnetError
from pipeline.errors import ConfigError, DeviceFailed, LostRank, NetworkFailed, RunFailed

_CLOSED = re.compile(
    # Gloo and the store.
    r"closed by peer|reset by peer|broken pipe|connection refused|connection was likely closed|pair\.cc:\d+\] no error"
    # NCCL.
    r"|closed by remote peer|remote process exit|communicator was aborted",
    re.IGNORECASE,
)


class _Cause(NamedTuple):
    """What NCCL says, the error that it is, and the fix."""

    says: re.Pattern[str]
    kind: type[CoatnetError]
    what: str
    fix: str


_CAUSES = (
    _Cause(
        re.compile("duplicate gpu detected", re.IGNORECASE), ConfigError,
        "two ranks have the same GPU",
        "start as many ranks on each machine as it has GPUs (resources.ranks, resources.nodes), and let every task see "
        "either all GPUs of its machine or one of its own",
    ),
    _Cause(
        re.compile("no (socket )?interface found|no usable .*interface", re.IGNORECASE), ConfigError,
        "NCCL finds no network interface",
        "correct or unset NCCL_SOCKET_IFNAME; `ip -brief address` lists the interfaces of a machine",
    ),
    _Cause(
        re.compile("shared memory segment.*no space left", re.IGNORECASE | re.DOTALL), ConfigError,
        "the shared memory of its machine is full or too small for NCCL",
        "enlarge /dev/shm (in Docker: --shm-size=8g), or remove what is left there",
    ),
    _Cause(
        re.compile("out of memory|failed to cuda (calloc|malloc)", re.IGNORECASE), RunFailed,
        "the memory of its GPU is full before NCCL has its buffers, which it allocates outside of torch",
        "end other programs on that GPU (nvidia-smi lists them), or use less memory: activation_checkpointing, "
        "zero_stage, or in a new run batch.micro_size",
    ),
)  # fmt: skip


def explain_error(error: RuntimeError, who: str) -> CoatnetError | None:
    """The error that `error` of rank `who` means to a person; None if it is neither of communication nor of a GPU."""
    text, reason = str(error), short_reason(error)
    if isinstance(error, torch.AcceleratorError):
        return DeviceFailed(f"{who}: its GPU failed ({reason})")
    is_nccl = isinstance(error, dist.DistBackendError) or "NCCL error" in text
    if not (is_nccl or isinstance(error, dist.DistError) or "gloo/transport" in text):  # gloo raises no subclass
        return None
    if is_nccl:
        for cause in _CAUSES:
            if cause.says.search(text):
                return cause.kind(f"{who}: {cause.what} ({reason}); {cause.fix}")
    if _CLOSED.search(text):
        return LostRank(f"{who.partition(' on ')[0]} lost another rank, whose log has the reason ({reason})")
    return NetworkFailed(
        f"{who} could not communicate with the other ranks ({reason}); look at the network between the machines, with "
        "NCCL_DEBUG=INFO on GPUs, and whether the variables of its interfaces name the right ones"
    )


def short_reason(error: BaseException) -> str:
    """The line of an error's text that says most: what NCCL calls its last error, or else the first line."""
    text = str(error).strip()
    last = text.partition("Last error:")[2].strip().partition("\n")[0].strip()
    return last or text.partition("\n")[0].partition(". This is typically")[0]

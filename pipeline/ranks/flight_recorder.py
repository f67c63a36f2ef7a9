"""NCCL's flight recorder: the last collectives of a rank with sizes, states and stacks, saved when a run hangs."""

import logging
import threading
from pathlib import Path

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

PREFIX = "nccl_trace_rank_"
"""How the files begin, as `torchfrtrace --prefix` takes it; the number of the rank follows."""
_SECONDS = 5.0
"""For the dump: it takes a lock that a thread in a hanging call into CUDA may hold."""


def save_flight_record(folder: Path, rank: int) -> Path | None:
    """Write what the recorder of this process has to `folder`; returns the file, None without NCCL or if that fails."""
    if not dist.is_available() or not dist.is_initialized() or "nccl" not in dist.get_backend():
        return None
    file, written = folder / f"{PREFIX}{rank}", threading.Event()

    def save() -> None:
        try:
            file.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]
            written.set()
        except Exception:
            log.exception("the flight record of NCCL cannot be saved")

    thread = threading.Thread(target=save, name="flight recorder", daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return file if written.is_set() else None

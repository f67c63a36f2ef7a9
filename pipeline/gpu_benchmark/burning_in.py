"""Equal bits from every GPU that this process may use: one micro-batch computed again and again on each in turn."""

import socket
from dataclasses import replace

import torch

from pipeline.burn_in.repetitions import burn_in
from pipeline.gpu_benchmark.record import BurnIn
from pipeline.gpu_benchmark.subject import MeasuredStage, join

_SECONDS = 5.0
"""Of each GPU."""


def measure_burn_in(subject: MeasuredStage) -> BurnIn:
    """The bits of each GPU with deterministic algorithms, whatever the stage has; without a GPU, those of the CPU."""
    plan = replace(subject, changes={**subject.changes, "deterministic": True}).plan()
    if join(plan).device.type != "cuda":
        cpu = torch.device("cpu")
        return BurnIn((burn_in(plan, cpu, where="this machine", node=socket.gethostname(), seconds=0.0),))
    found = []
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        found.append(burn_in(plan, device, where=f"GPU {number}", node=socket.gethostname(), seconds=_SECONDS))
    return BurnIn(tuple(found))

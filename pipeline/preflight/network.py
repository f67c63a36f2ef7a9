"""Whether this machine has the network interface that its environment tells the ranks to use."""

from collections.abc import Iterable

import torch

from pipeline.preflight.finding import Findings
from pipeline.ranks.rendezvous import check_interface
from pipeline.recipe.schema import Stage


def assess_interface(stages: Iterable[Stage]) -> Findings:
    """The interface of NCCL_SOCKET_IFNAME if ranks of `stages` use GPUs, and of GLOO_SOCKET_IFNAME if some use none;
    nothing if there is no problem."""
    found, gpus = Findings(""), torch.cuda.is_available()
    backends = {"nccl" if gpus and stage.resources.gpus_per_rank else "gloo" for stage in stages}
    for backend in sorted(backends):
        with found.capture():
            check_interface(backend)
    return found

"""Whether this machine has the network interface that its environment tells the ranks to use."""

import torch

from pipeline.preflight.finding import Findings
from pipeline.ranks.rendezvous import check_interface


def assess_interface() -> Findings:
    """The interface of NCCL_SOCKET_IFNAME, or of GLOO_SOCKET_IFNAME without a GPU; nothing if there is no problem."""
    found = Findings("")
    with found.capture():
        check_interface("nccl" if torch.cuda.is_available() else "gloo")
    return found

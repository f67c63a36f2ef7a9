"""Whether torch.export records a model."""

import torch


def exporting() -> bool:
    """Whether a forward runs in `torch.export`, in its default form without Dynamo, and not in `torch.compile`.

    Dynamo of torch 2.11 takes `torch.compiler.is_exporting()` for true in `torch.compile` as well.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()

"""Ranks that compute wrong values: in a command whose variable `TEST_IMPORTS` has the name of this module, or by `strike`.

What a broken GPU does, done to the values where they are computed; everything after that is the real code. The variable
`TEST_WRONG_VALUES` has faults as `RANK:KIND:FIRST:LAST`, separated by spaces: in these computations of micro-batches of
that rank, from 0, for itself and for others. KIND is `loss`, `statistics`, `hang`, or a parameter of whose gradient one
bit flips.
"""

import os
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pipeline.cross_check.computation
import pipeline.train
import pipeline.training.step
from models.norm import BatchNorm

FOREVER = 10**9


class Fault(NamedTuple):
    rank: int
    kind: str
    first: int
    last: int = FOREVER

    @property
    def written(self) -> str:
        return ":".join(map(str, self))


_faults: list[Fault] = []
_computed = 0
_build, _loss, _record = pipeline.train.build_engine, pipeline.training.step.classification_loss, BatchNorm.record  # type: ignore[attr-defined]


def strike(*faults: Fault) -> None:
    """From now on, these faults alone."""
    global _computed
    pipeline.train.build_engine = _engine  # type: ignore[attr-defined, assignment]
    pipeline.training.step.classification_loss = _losses  # type: ignore[attr-defined, assignment]
    pipeline.cross_check.computation.classification_loss = _losses  # type: ignore[attr-defined, assignment]
    BatchNorm.record = _recorded  # type: ignore[method-assign, assignment]
    _faults[:] = faults
    _computed = 0


def _strikes(kind: str, computation: int) -> bool:
    rank = int(os.environ["RANK"])
    return any(fault[:2] == (rank, kind) and fault.first <= computation <= fault.last for fault in _faults)


def _engine(*arguments: Any) -> Any:
    engine = _build(*arguments)
    for name, parameter in engine.module.named_parameters():

        def flip(gradient: Tensor, name: str = name) -> Tensor:
            if not _strikes(name, _computed - 1):
                return gradient
            wrong = gradient.clone(memory_format=torch.contiguous_format)
            wrong.view(-1).view(torch.uint8)[0] ^= 1
            return wrong

        if any(fault.kind == name for fault in _faults):
            parameter.register_hook(flip)  # type: ignore[no-untyped-call]
    return engine


def _losses(*arguments: Any) -> Tensor:
    global _computed
    _computed += 1
    if _strikes("hang", _computed - 1):
        threading.Event().wait()
    losses = _loss(*arguments)
    return losses + 0.01 if _strikes("loss", _computed - 1) else losses


def _recorded(norm: BatchNorm, statistics: Tensor) -> None:
    _record(norm, statistics * 1.01 if _strikes("statistics", _computed) else statistics)


if written := os.environ.get("TEST_WRONG_VALUES"):
    parts = [fault.split(":") for fault in written.split()]
    strike(*(Fault(int(rank), kind, int(first), int(last)) for rank, kind, first, last in parts))

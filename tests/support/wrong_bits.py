"""A rank that computes wrong values in a burn-in; the variable `TEST_IMPORTS` of its command has the name of this module.

The loss of some of its repetitions is a little too large, as by a flipped bit; what follows from it is the real code.
"""

import os
from typing import Any

from torch import Tensor

import pipeline.burn_in.repetitions as repetitions

RANK, REPETITIONS = "TEST_WRONG_RANK", "TEST_WRONG_REPETITIONS"
"""Variables with the rank, and with the numbers of its wrong repetitions, from 0, or `all`."""

_loss, _count = repetitions.classification_loss, [0]  # type: ignore[attr-defined]


def _wrong(*arguments: Any) -> Tensor:
    loss, number, which = _loss(*arguments), str(_count[0]), os.environ[REPETITIONS]
    _count[0] += 1
    is_wrong = os.environ["RANK"] == os.environ[RANK] and (which == "all" or number in which.split())
    return loss * (1 + 2**-23) if is_wrong else loss


repetitions.classification_loss = _wrong  # type: ignore[attr-defined, assignment]

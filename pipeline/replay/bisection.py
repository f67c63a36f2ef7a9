"""The smallest set of samples that makes a micro-batch not finite, by delta debugging."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.stream import MicroBatch, SampleOrigin
from pipeline.replay.not_finite import NotFinite
from pipeline.replay.observation import ObservedModel

_GREY = 128  # normalized nearly 0
_CONTRAST = 48  # levels to either side


@dataclass(frozen=True, slots=True)
class Cause:
    """What makes a micro-batch not finite."""

    kind: Literal["samples", "weights", "any_samples", "nothing"]
    """These samples; weights or buffers that are not finite themselves; finite weights, with whatever samples; or
    nothing, as it is finite."""
    positions: tuple[int, ...]
    """In the micro-batch, ascending: without any one of them the others leave it finite. Empty unless `samples`."""
    origins: tuple[SampleOrigin, ...]
    """Of these samples."""
    not_finite: NotFinite | None
    """Where it begins with these samples alone; for `any_samples`, with none of them."""
    trials: int
    """Computations of the micro-batch."""


def smallest_cause(model: ObservedModel, batch: MicroBatch, step: int, number: int) -> Cause:
    """The smallest set of samples with which micro-batch `number` of step `step`, both from 0, is not finite.

    All other samples are replaced by a neutral image that is finite by itself: so the size of the micro-batch, the
    partners of MixUp and what stochastic depth draws stay what they are. Labels stay too. The set is minimal in that
    no sample of it can be left out; there may be others.
    """
    found = model.observe(batch, step, number).not_finite
    if found is None or found.kind == "weight":
        return Cause("weights" if found else "nothing", (), (), found, trials=1)
    trials = 1

    def fails(kept: Sequence[int], neutral: NDArray[np.uint8]) -> bool:
        nonlocal trials
        trials += 1
        return not model.is_finite(_with_only(batch, kept, neutral), step, number)

    neutral = next((images for images in _neutral_images(batch) if not fails((), images)), None)
    if neutral is None:
        alone = model.observe(_with_only(batch, (), next(_neutral_images(batch))), step, number)
        return Cause("any_samples", (), (), alone.not_finite, trials + 1)
    positions = minimal(range(len(batch.images)), lambda kept: fails(kept, neutral))
    alone = model.observe(_with_only(batch, positions, neutral), step, number)
    origins = tuple(batch.origins[position] for position in positions)
    return Cause("samples", positions, origins, alone.not_finite, trials + 1)


def minimal(candidates: Sequence[int], fails: Callable[[tuple[int, ...]], bool]) -> tuple[int, ...]:
    """A subset of `candidates`, in their order, that fails and of which no element can be left out.

    `ddmin` of Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (2002): of n candidates, at
    most n^2 + 3n subsets are tried, and about 2 log2(n) if one alone fails.

    Args:
        candidates: at least one; all of them together fail.
        fails: of a subset; the empty one, which is never tried, does not fail.
    """
    left, parts = tuple(candidates), 2
    while len(left) > 1:
        bounds = [len(left) * number // parts for number in range(parts + 1)]
        chunks = [left[start:stop] for start, stop in itertools.pairwise(bounds)]
        # Of two parts, each is what the other one leaves.
        rests = [left[:start] + left[stop:] for start, stop in itertools.pairwise(bounds) if parts > 2]
        if (part := next(filter(fails, chunks), None)) is not None:
            left, parts = part, 2
        elif (rest := next(filter(fails, rests), None)) is not None:
            left, parts = rest, max(parts - 1, 2)
        elif parts < len(left):
            parts = min(2 * parts, len(left))
        else:
            break
    return left


def _neutral_images(batch: MicroBatch) -> Iterator[NDArray[np.uint8]]:
    """Images without content, (m, S, S, 3) each: first grey ones, then noise.

    BatchNorm and LayerNorm may see no variance in grey ones, and then amplify gradients more than for any photograph.
    """
    yield np.full_like(batch.images, _GREY)
    draws = np.random.default_rng(0)
    yield draws.integers(_GREY - _CONTRAST, _GREY + _CONTRAST, batch.images.shape, np.uint8)


def _with_only(batch: MicroBatch, kept: Sequence[int], neutral: NDArray[np.uint8]) -> MicroBatch:
    """The micro-batch with `neutral` images in place of all but the `kept` samples, and nothing erased in these."""
    images = neutral.copy()
    images[list(kept)] = batch.images[list(kept)]
    return replace(batch, images=images, erased=[one for one in batch.erased if one[0] in kept])

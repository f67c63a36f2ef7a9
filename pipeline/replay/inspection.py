"""What is inside a step: every sample, every block, what is not finite and why; put together from all ranks."""

import json
import math
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data.files.json_records import parse_json, to_json, to_record
from data.stream import MicroBatch
from pipeline.monitoring.norms import block_names
from pipeline.plan import TrainPlan
from pipeline.ranks.distributed import Ranks
from pipeline.replay.bisection import Cause, smallest_cause
from pipeline.replay.not_finite import NotFinite
from pipeline.replay.observation import Observation, ObservedModel
from pipeline.replay.pictures import SeenSample, sample_sheet
from pipeline.replay.report import CauseRow, NotFiniteRow, SampleRow, number
from pipeline.runs.stage_result import distinct_names
from pipeline.training.images import viewable
from pipeline.training.inputs import mixing_settings

SHOWN = 8
"""Samples with the highest losses, and as many with the lowest ones, that a picture shows."""

Row = TypeVar("Row", SampleRow, NotFiniteRow, CauseRow)

_EXPLANATIONS = {
    "samples": "not finite because of these samples, none of which can be left out",
    "weights": "weights or buffers are not finite themselves, whatever the samples",
    "any_samples": "not finite whatever the samples, with finite weights",
    "nothing": "finite",
}


@dataclass(frozen=True, slots=True)
class Inspection:
    """The inside of one step."""

    loss: float
    """Of the step: the mean over the global batch, with the bits of the step's own; see `Observation.loss`."""
    samples: tuple[SampleRow, ...]
    """Of the whole global batch, by position."""
    outputs: tuple[float, ...]
    """Norm of each block's output over all samples."""
    output_gradients: tuple[float, ...] | None
    """Norm of the gradients that arrive there; None without a backward."""
    not_finite: tuple[NotFiniteRow, ...]
    causes: tuple[CauseRow, ...]
    picture: NDArray[np.uint8]
    """(H, W, 3), the samples with the highest and the lowest losses."""


def inspect_step(
    model: ObservedModel,
    plan: TrainPlan,
    ranks: Ranks,
    step: int,
    batches: Sequence[MicroBatch],
    *,
    backward: bool = True,
    bisect: bool = False,
) -> Inspection | None:
    """Look into step `step`, from 0, on all ranks together; the leader gets the result.

    Args:
        model: with the weights from before the step.
        plan: of the step.
        ranks: all of them.
        step: for the randomness of the step.
        batches: the micro-batches of this rank.
        backward: whether gradients are computed.
        bisect: whether the smallest cause is looked for in micro-batches that are not finite.
    """
    names, micro = distinct_names(plan.classes), plan.stage.batch.micro_size
    first = ranks.rank * len(batches)
    rows, extremes, means = list[SampleRow](), _Extremes(), list[float]()
    not_finite, causes = list[NotFiniteRow](), list[CauseRow]()
    squares = torch.zeros(2, len(block_names(plan.stage.model.variant)), dtype=torch.float64, device=ranks.device)
    for turn, batch in enumerate(batches):
        number_ = first + turn
        seen = model.observe(batch, step, number_, backward=backward)
        mixing = mixing_settings(plan.stage).mixing(plan.stage.resolution, seed=plan.seed, step=step, number=number_)
        rows += _rows(seen, batch, number_, micro, names, mixing.weight if mixing else None)
        extremes.add(seen, number_ * micro)
        means.append(seen.loss)
        norms = [[block.output, block.output_gradient or 0.0] for block in seen.blocks]
        squares += torch.tensor(norms, dtype=torch.float64, device=ranks.device).T.square()
        if seen.not_finite:
            not_finite.append(_not_finite_row(seen.not_finite, batch, number_))
            if bisect:
                causes.append(_cause_row(smallest_cause(model, batch, step, number_), number_))
    outputs, gradients = ranks.sum(squares).sqrt().tolist()
    loss_sum = ranks.sum(torch.tensor(means, dtype=torch.float32, device=ranks.device).sum()).item()
    samples = _gathered(ranks, rows, SampleRow)
    found = _gathered(ranks, not_finite, NotFiniteRow), _gathered(ranks, causes, CauseRow)
    worst, best = _chosen(samples)
    pixels = _gathered_pixels(ranks, extremes.pixels, [*worst, *best])
    if not ranks.is_leader:
        return None
    pictures = {
        heading: [_seen(samples[position], pixels[position]) for position in positions]
        for heading, positions in (("highest losses", worst), ("lowest losses", best))
    }
    return Inspection(
        loss=loss_sum / plan.stage.batch.micro_batches,
        samples=tuple(samples),
        outputs=tuple(outputs),
        output_gradients=tuple(gradients) if backward else None,
        not_finite=tuple(found[0]),
        causes=tuple(found[1]),
        picture=sample_sheet(pictures),
    )


class _Extremes:
    """Pictures of the samples of this rank with the highest and the lowest losses, which may be among all ranks'."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, int, NDArray[np.uint8]]] = []

    def add(self, seen: Observation, first: int) -> None:
        """Add a micro-batch, whose samples have the positions from `first` on."""
        losses = [_sortable(loss) for loss in seen.losses.tolist()]
        order = sorted(range(len(losses)), key=lambda place: losses[place])
        for place in dict.fromkeys([*order[:SHOWN], *order[-SHOWN:]]):
            pixels = viewable(torch.nan_to_num(seen.images[place : place + 1]))[0]
            self._kept.append((losses[place], first + place, pixels))
        self._kept.sort(key=lambda one: (one[0], -one[1]))
        if len(self._kept) > 2 * SHOWN:
            self._kept = [*self._kept[:SHOWN], *self._kept[-SHOWN:]]

    @property
    def pixels(self) -> dict[int, NDArray[np.uint8]]:
        """(S, S, 3) by position."""
        return {position: pixels for _, position, pixels in self._kept}


def _chosen(samples: Sequence[SampleRow]) -> tuple[list[int], list[int]]:
    """The positions of the samples to show: those with the highest losses, and the others with the lowest ones."""
    order = sorted(samples, key=lambda row: (-_sortable(float(row.loss)), row.position))
    worst = [row.position for row in order[:SHOWN]]
    return worst, [row.position for row in reversed(order) if row.position not in worst][:SHOWN]


def _sortable(loss: float) -> float:
    """What is not finite is worst."""
    return loss if math.isfinite(loss) else math.inf


def _rows(
    seen: Observation, batch: MicroBatch, number_: int, micro: int, names: Sequence[str], weight: float | None
) -> list[SampleRow]:
    """`weight` is that of each sample against its partner, the one at the mirrored place; None without mixing."""
    gradients = [None] * len(batch.origins) if seen.sample_gradients is None else seen.sample_gradients.tolist()
    columns = (seen.losses, seen.predicted, seen.probabilities, seen.label_probabilities)
    return [
        SampleRow(
            position=number_ * micro + place,
            micro_batch=number_,
            shard=origin.shard,
            key=origin.key,
            labels=tuple(names[label] for label in labels if label >= 0),
            loss=number(loss),
            prediction=names[predicted],
            probability=number(probability),
            label_probability=number(of_label),
            gradient=None if gradient is None else number(gradient),
            mixed_with=None if weight is None or partner == place else _name(batch, partner),
            weight=None if partner == place else weight,
        )
        for place, (origin, labels, gradient, loss, predicted, probability, of_label) in enumerate(
            zip(batch.origins, batch.labels.tolist(), gradients, *(column.tolist() for column in columns), strict=True)
        )
        for partner in [len(batch.origins) - 1 - place]
    ]


def _not_finite_row(found: NotFinite, batch: MicroBatch, number_: int) -> NotFiniteRow:
    samples = tuple(_name(batch, position) for position in found.samples)
    return NotFiniteRow(number_, found.kind, found.name, found.count, found.size, samples)


def _cause_row(found: Cause, number_: int) -> CauseRow:
    return CauseRow(
        micro_batch=number_,
        explanation=_EXPLANATIONS[found.kind],
        samples=tuple(f"{origin.shard}/{origin.key}" for origin in found.origins),
        module=None if found.not_finite is None else f"{found.not_finite.kind} of {found.not_finite.name}",
        trials=found.trials,
    )


def _name(batch: MicroBatch, position: int) -> str:
    origin = batch.origins[position]
    return f"{origin.shard}/{origin.key}"


def _seen(row: SampleRow, pixels: NDArray[np.uint8]) -> SeenSample:
    return SeenSample(
        key=row.key,
        label=next(iter(row.labels), "no label"),
        predicted=row.prediction,
        probability=float(row.probability),
        loss=float(row.loss),
        pixels=pixels,
    )


def _gathered(ranks: Ranks, rows: Iterable[Row], kind: type[Row]) -> list[Row]:
    """The rows of all ranks, in their order."""
    texts = ranks.gather_texts(json.dumps([to_json(row) for row in rows]))
    return [to_record(kind, row) for text in texts for row in parse_json(list[Any], text)]


def _gathered_pixels(
    ranks: Ranks, own: dict[int, NDArray[np.uint8]], positions: Sequence[int]
) -> dict[int, NDArray[np.uint8]]:
    """The pixels (S, S, 3) of the samples at `positions`, each of which one rank has."""
    sent = {
        str(position): [own[position].shape[0], b64encode(own[position].tobytes()).decode()]
        for position in positions
        if position in own
    }
    found = {}
    for text in ranks.gather_texts(json.dumps(sent)):
        for position, (size, content) in parse_json(dict[str, Any], text).items():
            found[int(position)] = np.frombuffer(b64decode(content), np.uint8).reshape(size, size, 3)
    return found

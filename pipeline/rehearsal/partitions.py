"""How DeepSpeed partitions a model over ranks, as arithmetic: which elements of which parameter each rank holds.

DeepSpeed 0.19.8. ZeRO 1 and 2 flatten the parameters of each group of the optimizer, one after the other, pad the whole
to a multiple of 2 x ranks (`nccl_start_alignment_factor`), and give each rank one contiguous part of equal size
(`runtime/zero/stage_1_and_2.py`, and `runtime/bf16_optimizer.py` for bf16 with ZeRO 1). ZeRO 3 pads every parameter to
a multiple of the ranks, and gives each rank one part of it (`runtime/zero/partition_parameters.py`). With ZeRO 0 every
rank holds everything, and the ranks take turns in saving it (`pipeline/zero/fragments.py`).
"""

import bisect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from models.coatnet import CoAtNet
from pipeline.errors import RunFailed
from pipeline.recipe.schema import Precision

_ALIGNMENT = 2
"""DeepSpeed's `nccl_start_alignment_factor`: elements for each rank to whose multiple a group is padded."""
_FLOAT32 = 4
_BFLOAT16 = 2


@dataclass(frozen=True, slots=True)
class ElementRange:
    """Elements `start` .. `stop` of the flattened `parameter`, which a rank optimizes."""

    parameter: str
    start: int
    stop: int
    saved_here: bool
    """Whether this rank writes them to checkpoints."""

    @property
    def elements(self) -> int:
        """Their number."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank holds of one kind of state."""

    elements: int
    """Of parameters; each of the two moments counts."""
    padding: int
    """Elements that belong to no parameter."""
    bytes: int
    """Of both."""


@dataclass(frozen=True, slots=True)
class PartitionSizes:
    """What one rank holds during the whole of training."""

    zero_stage: int
    rank: int
    weights: Share
    """Those that forwards use. Without those that ZeRO 3 has gathered."""
    gradients: Share
    """Sums in float32, as they are between the micro-batches of a step."""
    masters: Share
    """Float32 weights that AdamW updates; empty where they are the weights themselves."""
    moments: Share
    """AdamW's two, in float32."""
    average: Share | None
    """The moving average of the weights; None without one."""

    @property
    def bytes(self) -> int:
        """Of all kinds."""
        average = self.average.bytes if self.average else 0
        return self.weights.bytes + self.gradients.bytes + self.masters.bytes + self.moments.bytes + average


@dataclass(frozen=True, slots=True)
class ModelParameters:
    """The parameters of a model."""

    shapes: Mapping[str, tuple[int, ...]]
    """By name, in the order of `named_parameters`."""
    undecayed: frozenset[str]
    """Names of those without weight decay, which are a group of their own in the optimizer."""

    @classmethod
    def of(cls, model: CoAtNet) -> "ModelParameters":
        """Those of `model`, which may be on the meta device."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return cls(shapes, frozenset(model.no_weight_decay()))

    @property
    def sizes(self) -> dict[str, int]:
        """Elements by name."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}


@dataclass(frozen=True)
class Partitioning:
    """The parameters of a model over `ranks` ranks with one ZeRO stage."""

    parameters: ModelParameters
    zero_stage: int
    ranks: int
    _sizes: dict[str, int] = field(init=False, repr=False)
    _groups: list["_FlatGroup"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes, undecayed = self.parameters.sizes, self.parameters.undecayed
        # The order of `build_adamw`.
        groups = ([name for name in sizes if name not in undecayed], [name for name in sizes if name in undecayed])
        object.__setattr__(self, "_sizes", sizes)
        object.__setattr__(self, "_groups", [_FlatGroup.of(group, sizes, self.ranks) for group in groups if group])

    @property
    def elements(self) -> int:
        """Of the model."""
        return sum(self._sizes.values())

    def ranges(self, rank: int) -> list[ElementRange]:
        """What `rank` optimizes, in parameter order: the `pipeline.zero.fragments.Fragment`s of its engine."""
        if self.zero_stage == 0:
            names = enumerate(self._sizes.items())
            return [ElementRange(name, 0, size, number % self.ranks == rank) for number, (name, size) in names]
        if self.zero_stage == 3:
            return list(self._ranges_of_each(rank))
        found = {part.parameter: part for group in self._groups for part in group.ranges(rank)}
        return [found[name] for name in self._sizes if name in found]

    def masters(self, rank: int, *, in_use: bool = False) -> tuple[int, int]:
        """Elements of parameters in what AdamW updates on `rank`, and the padding there.

        With `in_use`, without the tensors that are nothing but padding, as the last ranks of a large world have them
        for a small group: `ZeroEngine.masters` and the moving average leave these out.
        """
        names = {part.parameter: part.elements for part in self.ranges(rank)}
        used = sum(names.values())
        if self.zero_stage == 0:
            return used, 0
        held = 0
        for group in self._groups:
            if in_use and names.keys().isdisjoint(group.names):
                continue
            if self.zero_stage == 3:
                held += sum(-(-self._sizes[name] // self.ranks) for name in group.names)
            else:
                held += group.partition
        return used, held - used

    def sizes(self, rank: int, precision: Precision, *, moving_average: bool) -> PartitionSizes:
        """What `rank` holds.

        The gradients are those of docs/planner.md: at ZeRO 1 and below they are whole on every rank.
        """
        used, padding = self.masters(rank)
        own = Share(used, padding, _FLOAT32 * (used + padding))
        in_use = sum(self.masters(rank, in_use=True))
        average = Share(used, in_use - used, _FLOAT32 * in_use)
        whole, flat_padding = self.elements, 0
        if self.zero_stage in (1, 2):
            flat_padding = sum(group.padded for group in self._groups) - whole
        element = _BFLOAT16 if precision == "bf16" else _FLOAT32
        if self.zero_stage == 3:
            weights = Share(used, padding, element * (used + padding))
        else:
            weights = Share(whole, flat_padding, element * (whole + flat_padding))
        if self.zero_stage >= 2:
            gradients = own
        else:
            # BF16_Optimizer adds them up in one flat tensor, the others in the parameters' own.
            padded = flat_padding if self.zero_stage == 1 and precision == "bf16" else 0
            gradients = Share(whole, padded, _FLOAT32 * (whole + padded))
        return PartitionSizes(
            self.zero_stage,
            rank,
            weights,
            gradients,
            Share(0, 0, 0) if self.zero_stage == 0 else own,
            Share(2 * used, 2 * padding, 2 * own.bytes),
            average if moving_average else None,
        )

    def check_owned_once(self) -> int:
        """Check over all ranks that every element is saved by exactly one, and optimized by that one.

        Returns:
            The elements that were checked.

        Raises:
            RunFailed: one is not.
        """
        ends = dict.fromkeys(self._sizes, 0)
        for rank in range(self.ranks):
            for part in self.ranges(rank):
                if not part.saved_here:
                    continue
                # Ranks come in the order of the elements.
                if part.start != ends[part.parameter] or part.stop <= part.start:
                    raise RunFailed(
                        f"rehearsal: ZeRO {self.zero_stage} on {self.ranks} ranks: {part.parameter}: rank {rank} owns "
                        f"elements {part.start:,} to {part.stop:,}, and those before it end at "
                        f"{ends[part.parameter]:,}; the rehearsal is wrong, please report it"
                    )
                ends[part.parameter] = part.stop
        missing = next((name for name, size in self._sizes.items() if ends[name] != size), None)
        if missing is not None:
            raise RunFailed(
                f"rehearsal: ZeRO {self.zero_stage} on {self.ranks} ranks: {missing}: no rank owns elements from "
                f"{ends[missing]:,} of {self._sizes[missing]:,}; the rehearsal is wrong, please report it"
            )
        return sum(ends.values())

    def _ranges_of_each(self, rank: int) -> Iterator[ElementRange]:
        for name, size in self._sizes.items():
            share = -(-size // self.ranks)
            start = min(rank * share, size)
            stop = min(start + share, size)
            if start < stop:
                yield ElementRange(name, start, stop, True)


@dataclass(frozen=True, slots=True)
class _FlatGroup:
    """The parameters of one group of the optimizer in one flat tensor, of which each rank has a part."""

    names: tuple[str, ...]
    starts: tuple[int, ...]
    """Of the parameters in the flat tensor; last, where they end."""
    padded: int
    """Elements of the flat tensor."""
    partition: int
    """Elements of each rank."""

    @classmethod
    def of(cls, names: list[str], sizes: Mapping[str, int], ranks: int) -> "_FlatGroup":
        starts = tuple(accumulate((sizes[name] for name in names), initial=0))
        alignment = _ALIGNMENT * ranks
        padded = -(-starts[-1] // alignment) * alignment
        return cls(tuple(names), starts, padded, padded // ranks)

    def ranges(self, rank: int) -> Iterator[ElementRange]:
        begin, end = rank * self.partition, (rank + 1) * self.partition
        number = max(0, bisect.bisect_right(self.starts, begin) - 1)
        while number < len(self.names) and self.starts[number] < end:
            first, last = self.starts[number], self.starts[number + 1]
            if max(begin, first) < min(end, last):
                yield ElementRange(self.names[number], max(begin, first) - first, min(end, last) - first, True)
            number += 1

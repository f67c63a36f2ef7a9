"""What distinguishes two architectures, and which settings of a recipe would match."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from models.variants import VARIANTS, BlockStage, Variant

_NO_PART = ("stages", "stem_width", "batch_norm_momentum", "weight_std")
"""Fields of a variant that are compared together, or that decide how it trains and not what it computes."""


@dataclass(frozen=True, slots=True)
class ArchitectureDifference:
    """A part of the model that the weights have in another form than the variant."""

    part: str
    theirs: str
    ours: str
    option: str | None
    """The setting of a recipe that would match, such as `model.pool: average`; None where there is none."""

    def __str__(self) -> str:
        return f"{self.part}: {self.theirs} there, {self.ours} here{'' if self.option else ', without an option'}"


def layout_text(stem: int, stages: Iterable[BlockStage]) -> str:
    """As in the table of `coatnet models`, with the strides that are not 2."""
    blocks = (
        f"{'C' if stage.kind == 'mbconv' else 'T'}{stage.depth}x{stage.width}"
        f"{'' if stage.stride == 2 else f' (stride {stage.stride})'}"
        for stage in stages
    )
    return " ".join([str(stem), *blocks])


def matching_blocks(theirs: str, variant: Variant) -> str | None:
    for name, other in VARIANTS.items():
        if layout_text(other.stem_width, other.stages) == theirs:
            return f"model.name: {name}"
    words = theirs.split()
    if re.fullmatch(r"\d+( [CT]\d+x\d+)+", theirs) is None:
        return None
    kinds = ["mbconv" if word[0] == "C" else "transformer" for word in words[1:]]
    sizes = [tuple(map(int, word[1:].split("x"))) for word in words[1:]]
    depths, widths = [depth for depth, _ in sizes], [int(words[0]), *(width for _, width in sizes)]
    fits = [
        n for n, v in VARIANTS.items() if [s.kind for s in v.stages] == kinds and {s.stride for s in v.stages} == {2}
    ]
    same = [s.kind for s in variant.stages] == kinds and {s.stride for s in variant.stages} == {2}
    if not fits or variant.stem != "convolutions":
        return None
    settings = f"model.depths: {depths} and model.widths: {widths}"
    return settings if same else f"model.name: {fits[0]} with {settings}"


def variant_differences(theirs: Variant, ours: Variant) -> list[ArchitectureDifference]:
    """Every part in which a trained model of the variant `theirs` differs from `ours`."""
    found = []
    blocks = [layout_text(variant.stem_width, variant.stages) for variant in (theirs, ours)]
    if blocks[0] != blocks[1]:
        found.append(ArchitectureDifference("blocks", blocks[0], blocks[1], matching_blocks(blocks[0], ours)))
    for name in (field.name for field in fields(Variant) if field.name not in _NO_PART):
        there, here = getattr(theirs, name), getattr(ours, name)
        if there != here:
            setting = (
                None if name == "stem" else f"model.{name}: {str(there).lower() if there in (True, False) else there}"
            )
            found.append(ArchitectureDifference(name, str(there), str(here), setting))
    return found


def differences_text(differences: Sequence[ArchitectureDifference], model: str) -> str:
    """A line for each difference from the `model` of a recipe, and which settings match those weights, if all can."""
    lines = "\n  ".join(map(str, differences))
    options = [difference.option for difference in differences]
    settings = list(dict.fromkeys(option for option in options if option))
    names = [setting.partition(":")[0] for setting in settings]
    matched = None not in options and len(set(names)) == len(names)
    what = f"set {', '.join(settings)}" if matched else "no setting matches all of it; start from other weights"
    return f"these weights are of another architecture than {model} of the recipe:\n  {lines}\n{what}"

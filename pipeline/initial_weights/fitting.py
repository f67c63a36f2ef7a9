"""Weights that a stage starts from, fitted to its model: what is taken, resized, begun anew, left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from data.text.counted import counted
from models.adaptation import CLASSIFIER, adapt_parameters
from models.coatnet import CoAtNet
from pipeline.errors import ConfigError
from pipeline.initial_weights.source import WeightSource
from pipeline.runs.announcements import EarlierClasses, StartingWeights, TableRow, classifier_announcement
from pipeline.weights import copy_tensors, persistent_buffers

_NAMED = 4  # tensors in a row of the table


@dataclass(frozen=True, slots=True)
class Fitted:
    """Parameters of a source by the model's names, those that begin anew left out, and BatchNorm's statistics."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    beginning: StartingWeights

    def fill_buffers(self, model: CoAtNet) -> None:
        """Copy the statistics into `model`."""
        copy_tensors(self.buffers, persistent_buffers(model))

    def fill(self, model: CoAtNet) -> None:
        """Copy everything into `model`, to evaluate it.

        Raises:
            ConfigError: its classifier would begin anew.
        """
        missing = sorted(dict(model.named_parameters()).keys() - self.parameters.keys())
        if missing:
            raise ConfigError(
                f"{self.beginning.checkpoint}: trained for other classes than the {model.num_classes} of the data "
                f"({', '.join(missing)}); evaluate it on data of its own classes"
            )
        copy_tensors(self.parameters, dict(model.named_parameters()))
        self.fill_buffers(model)


def fit(source: WeightSource, model: CoAtNet, classes: Sequence[str], location: str) -> Fitted:
    """Fit `source` to `model`, whose outputs are `classes`; the tensors of both may be without values.

    Args:
        source: the weights.
        model: gives the shapes and is not changed.
        classes: names of its outputs.
        location: of the source, as results have it.

    Raises:
        ConfigError: they are another model's.
    """
    known = EarlierClasses(source.num_classes, source.classes, source.classes_digest)
    keeps, sentence = classifier_announcement(classes, source.origin, known)
    parameters = adapted(source, model)
    if not keeps:
        parameters = {name: tensor for name, tensor in parameters.items() if not name.startswith(CLASSIFIER)}
    buffers = dict(source.buffers)
    wanted = {name: tuple(buffer.shape) for name, buffer in persistent_buffers(model).items()}
    if {name: tuple(buffer.shape) for name, buffer in buffers.items()} != wanted:
        raise ConfigError(f"{source.location}: its BatchNorm statistics are another model's; restore it from a copy")
    resized = resized_tables(source.parameters, parameters)
    beginning = StartingWeights(
        checkpoint=location,
        origin=source.origin,
        step=source.step,
        weights=source.weights,
        keeps_classifier=keeps,
        classifier=sentence,
        table=_table(source, parameters, model, resized),
        resized=resized,
        precision=source.precision,
        remarks=source.remarks,
    )
    return Fitted(parameters, buffers, beginning)


def adapted(source: WeightSource, model: CoAtNet) -> dict[str, Tensor]:
    """The parameters of `source` adapted to `model`, see `adapt_parameters`.

    Raises:
        ConfigError: they are another model's.
    """
    try:
        return adapt_parameters(dict(source.parameters), model)
    except ValueError as error:
        raise ConfigError(f"{source.location}: {error}; start from weights of the same model") from None


def resized_tables(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, int]:
    """How many relative position tables have other shapes after than before, by these, such as `13 x 13 to 23 x 23`."""
    counts: Counter[str] = Counter()
    for name, tensor in after.items():
        if tensor.shape != before[name].shape:
            sizes = (" x ".join(map(str, shape[1:])) for shape in (before[name].shape, tensor.shape))
            counts[" to ".join(sizes)] += 1
    return dict(counts)


def _table(
    source: WeightSource, parameters: Mapping[str, Tensor], model: CoAtNet, resized: Mapping[str, int]
) -> tuple[TableRow, ...]:
    anew = [name for name, _ in model.named_parameters() if name not in parameters]
    left_out = {name: 1 for name in source.parameters if name not in parameters} | dict(source.left_out)
    tables, zeros = sum(resized.values()), source.zeros
    taken = len(parameters) - tables - len(zeros)
    sizes = ", ".join(f"{count} from {sizes}" for sizes, count in resized.items())
    height, width = model.image_size
    pixels = str(height) if height == width else f"{height} x {width}"
    statistics = f" and {counted(len(source.buffers), 'statistic')} of BatchNorm" if source.buffers else ""
    rows = [
        TableRow("taken", taken + len(source.buffers), f"{counted(taken, 'parameter')}{statistics}"),
        TableRow("resized", tables, f"relative position tables are resized for {pixels} pixels: {sizes}"),
        TableRow("zero", len(zeros), f"{_some(zeros)}: {source.origin} has none, and computes the same with zeros"),
        TableRow("begun anew", len(anew), _some(anew)),
        TableRow("left out", sum(left_out.values()), _some(list(left_out))),
    ]
    return tuple(row for row in rows if row.tensors)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")

"""Adapts trained parameters to a model for another image size or other classes."""

from torch import Tensor

from models.coatnet import CoAtNet
from models.relative_bias import RelativeBias, resize_relative_bias

CLASSIFIER = "head.classifier."
"""What the names of the classifier's parameters begin with."""


def adapt_parameters(parameters: dict[str, Tensor], model: CoAtNet) -> dict[str, Tensor]:
    """Trained parameters adapted to `model`: relative tables are resized, a classifier of other classes is dropped.

    Returns a dictionary by the model's names, without a classifier that was trained for another number of classes, or
    where there is none, so that the model's own keeps its initialization.

    Raises:
        ValueError: the parameters are those of another architecture; names the first that differ, with both shapes.
    """
    wanted = dict(model.named_parameters())
    grids = {f"{name}.table": m.grid for name, m in model.named_modules() if isinstance(m, RelativeBias)}
    fitted = {}
    for name, tensor in parameters.items():
        if name not in wanted:
            continue
        if name in grids and tensor.ndim == 3 and tensor.shape[0] == wanted[name].shape[0]:
            tensor = resize_relative_bias(tensor, grids[name])
        if tensor.shape == wanted[name].shape:
            fitted[name] = tensor
        elif not name.startswith(CLASSIFIER):
            raise ValueError(
                f"the parameters are another model's: {name} is {tuple(tensor.shape)} in the checkpoint "
                f"and {tuple(wanted[name].shape)} in this model"
            )
    missing = sorted(name for name in wanted.keys() - parameters.keys() if not name.startswith(CLASSIFIER))
    unknown = sorted(parameters.keys() - wanted.keys())
    if missing or unknown:
        parts = [f"lacks {missing[0]} and {len(missing) - 1} more"] if missing else []
        parts += [f"has {unknown[0]} and {len(unknown) - 1} more that this model does not"] if unknown else []
        raise ValueError("the parameters are another model's: the checkpoint " + ", and ".join(parts))
    return fitted

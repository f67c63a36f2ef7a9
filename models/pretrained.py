"""Exported models: one safetensors file with the config in its metadata, or a folder with `config.json` beside it.

Reading one needs torch and safetensors alone, and unpickles nothing. docs/formats.md describes the format.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.adaptation import adapt_parameters
from models.coatnet import CoAtNet
from models.model_facts import ModelFacts, ModelSource, Preprocessing
from models.registry import create_model

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_KEY = "config"
"""Of the config in the metadata of a single file."""
CITATION = (
    "Zihang Dai, Hanxiao Liu, Quoc V. Le, Mingxing Tan: CoAtNet: Marrying Convolution and Attention for All Data "
    "Sizes. Advances in Neural Information Processing Systems 34 (2021), arXiv 2106.04803"
)
_FORMAT = {"format": "coatnet-model", "version": 1}
_CONFIG_BYTES = 2**28  # a million classes with two long names take a fraction of it
_TRAINING = ("weights", "step", "samples", "run_id", "stage", "recipe_digest", "classes_digest")


@dataclass(frozen=True, slots=True)
class PretrainedFile:
    """An exported model whose config and tensors fit each other; the tensors are not read yet."""

    facts: ModelFacts
    path: Path
    """The safetensors file."""
    model: CoAtNet
    """On the meta device."""

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers, float32 on the CPU, by the model's names."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def load_pretrained(path: str | Path, *, image_size: int | None = None, device: torch.device | str = "cpu") -> CoAtNet:
    """The model that `coatnet export` wrote to `path`, float32 in evaluation mode; its `facts` has class names and
    preprocessing.

    Args:
        path: the safetensors file, or the folder with `model.safetensors` and `config.json`.
        image_size: side of the square images that it will see; the relative tables are resized if it is not the
            trained one.
        device: where it is built.

    Raises:
        ValueError: not an exported model, a damaged one, or an image size that it does not support.
        OSError: the file cannot be read.
    """
    file = open_pretrained(path)
    return build_trained(file.facts, file.tensors(), device, image_size)


def open_pretrained(path: str | Path) -> PretrainedFile:
    """The exported model at `path`, as for `load_pretrained`; everything but the values is checked.

    Raises:
        ValueError, OSError: as for `load_pretrained`.
    """
    given, path = str(path), Path(path)
    if path.is_dir():
        config, path = _read_config(path / CONFIG_FILE), path / WEIGHTS_FILE
    else:
        config = None
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file" if not path.exists() else f"{path}: not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {name: _described(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error})") from None
    try:
        facts = facts_of_config(_config_in(metadata) if config is None else config, ModelSource(given, str(path)))
        model = model_without_values(facts.arguments, len(found))
        expected = {name: f"F32 {list(tensor.shape)}" for name, tensor in model.state_dict().items()}
        for name in sorted(expected.keys() | found.keys()):
            there, here = found.get(name, "absent"), expected.get(name, "absent")
            if there != here:
                raise ValueError(f"{name[:80]} is {there} there and {here} in the model that its config describes")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; export it again") from None
    return PretrainedFile(facts, path, model)


def build_trained(
    facts: ModelFacts, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu", image_size: int | None = None
) -> CoAtNet:
    """The model that `facts` describe on `device`, float32 in evaluation mode, with the values of `tensors`.

    For another `image_size` than the trained one its relative tables are resized.

    Raises:
        ValueError: an image size that the model does not support.
    """
    arguments = dict(facts.arguments) | ({} if image_size is None else {"image_size": image_size})
    model = create_model(**arguments, device=device)
    parameters = dict(model.named_parameters())
    fitted = adapt_parameters({name: tensors[name] for name in parameters}, model)
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            value.copy_(fitted.get(name, tensors[name]))
    model.facts = facts
    return model.eval()


def model_without_values(arguments: Mapping[str, Any], tensors: int) -> CoAtNet:
    """The model of these `arguments` on the meta device; `tensors` is how many its files have, at least.

    Raises:
        ValueError: there is no such model.
    """
    try:
        if sum(arguments.get("depths") or ()) > tensors:
            raise ValueError(f"depths {str(arguments['depths'])[:80]} are more blocks than there are parameters")
        return create_model(**arguments, device="meta")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no model can be made of its arguments ({reason})") from None


def config_of(facts: ModelFacts) -> dict[str, Any]:
    """The content of `config.json` for a model."""
    names = {"classes": facts.classes, "display_names": facts.display_names}
    training = {name: getattr(facts, name) for name in _TRAINING} | {"source": facts.source.resolved}
    return {
        **_FORMAT,
        "model": dict(facts.arguments),
        **{key: list(value) for key, value in names.items() if value is not None},
        "preprocessing": asdict(facts.preprocessing),
        "loss": facts.loss,
        "training": {key: value for key, value in training.items() if value is not None},
        "citation": CITATION,
    }


def facts_of_config(config: Mapping[str, Any], source: ModelSource) -> ModelFacts:
    """What the `config` of an exported model says.

    Raises:
        ValueError: it says what is missing, or is of another kind.
    """
    found = {key: config.get(key) for key in _FORMAT}
    if "architecture" in config and "pretrained_cfg" in config:
        raise ValueError("its config is timm's, and here the one of --format safetensors is needed")
    if found != _FORMAT:
        raise ValueError(
            f"its config has the format {str(found['format'])[:40]!r}, version {str(found['version'])[:40]}"
        )
    arguments, training = _object(config, "model"), _object(config, "training")
    count = arguments.get("num_classes")
    if type(count) is not int or not isinstance(arguments.get("name"), str):
        raise ValueError("its config has no name or no num_classes of the model")
    classes, display_names = (_names(config, key, count) for key in ("classes", "display_names"))
    digest = _optional(training, "classes_digest", str)
    if classes is not None and digest not in (None, hashlib.sha256(json.dumps(classes).encode()).hexdigest()):
        raise ValueError("its classes are not those of its classes_digest")
    loss: Any = config.get("loss")
    weights: Any = training.get("weights")
    if loss not in ("softmax", "sigmoid") or weights not in ("raw", "ema"):
        raise ValueError("its config has no loss of softmax or sigmoid, or no weights of raw or ema")
    preprocessing = _preprocessing(_object(config, "preprocessing"))
    if preprocessing.image_size != arguments.get("image_size"):
        raise ValueError("its preprocessing has another image_size than the model")
    step = training.get("step")
    if type(step) is not int:
        raise ValueError("its config has no step")
    return ModelFacts(
        arguments=arguments,
        classes=classes,
        display_names=display_names,
        preprocessing=preprocessing,
        loss=loss,
        weights=weights,
        step=step,
        samples=_optional(training, "samples", int),
        run_id=_optional(training, "run_id", str),
        stage=_optional(training, "stage", str),
        recipe_digest=_optional(training, "recipe_digest", str),
        classes_digest=digest,
        source=source,
        remarks=() if classes else ("the exported model has no class names: what it was exported from had none",),
    )


def _preprocessing(content: Mapping[str, Any]) -> Preprocessing:
    size, crop, interpolation = (content.get(key) for key in ("image_size", "crop", "interpolation"))
    if type(size) is not int or crop not in ("center", "whole") or interpolation != "bilinear":
        raise ValueError("its preprocessing has no image_size, no crop of center or whole, or is not bilinear")
    return Preprocessing(size, crop, _numbers(content, "mean"), _numbers(content, "std"))


def _numbers(content: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = content.get(key)
    if not isinstance(value, list) or any(type(number) not in (int, float) for number in value):
        raise ValueError(f"{key}: must be a list of numbers")
    try:
        return tuple(map(float, value))
    except OverflowError:
        raise ValueError(f"{key}: must be a list of numbers of at most 1.8e308") from None


def _names(config: Mapping[str, Any], key: str, count: int) -> tuple[str, ...] | None:
    names: Sequence[Any] | None = config.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key}: must be a list of {count:,} names")
    return tuple(names)


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"its config has no object {key}")
    return value


def _optional(content: Mapping[str, Any], key: str, kind: type) -> Any:
    value = content.get(key)
    if value is not None and type(value) is not kind:
        raise ValueError(f"{key}: must be {kind.__name__}, not {str(value)[:40]!r}")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():  # never wait for a pipe
        raise FileNotFoundError(
            f"{path}: no such file; an exported folder has one" if not path.exists() else f"{path}: not a regular file"
        )
    if path.stat().st_size > _CONFIG_BYTES:
        raise ValueError(f"{path}: more than {_CONFIG_BYTES:,} bytes")
    try:
        return _parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    if CONFIG_KEY not in metadata:
        raise ValueError("a safetensors file without the metadata of an exported model")
    return _parse(metadata[CONFIG_KEY])


def _parse(content: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("its config is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"its config is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("its config is not a JSON object")
    return value


def _described(tensor: Any) -> str:
    return f"{tensor.get_dtype()} {tensor.get_shape()}"

"""Starting from a file of weights: an exported model, timm's CoAtNet, or tensors with our names."""

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from data.errors import StorageRefused, raise_if_passing
from data.files.digest import json_sha256
from data.remote.storage import Storage, join, parent, read_bytes
from models.differences import differences_text
from models.model_facts import ModelSource
from models.pretrained import CONFIG_KEY, facts_of_config
from models.timm_differences import TimmWeights
from models.timm_layout import STEM_BIASES, from_timm, timm_name
from pipeline.errors import ConfigError
from pipeline.initial_weights.source import Request, WeightSource, refuse_other_variant
from pipeline.initial_weights.weight_file import WeightFile, read_weight_file
from pipeline.training.images import imagenet_preprocessing
from pipeline.weights import persistent_buffers

_LARGEST_CONFIG = 10_000_000  # bytes; 21,841 names of classes with descriptions have 2 MB
_COUNTERS = "num_batches_tracked"


def open_file_source(request: Request, location: str, *, values: bool) -> WeightSource:
    """As `open_source`, for the file at `location`."""
    file = read_weight_file(location, request.storage, values=values)
    config = _config(location, request.storage)
    if CONFIG_KEY in file.metadata:
        return _exported(request, location, file, _own_config(location, file.metadata[CONFIG_KEY]))
    if "architecture" not in config and isinstance(config.get("model"), dict):
        return _exported(request, location, file, config)
    chosen, tensors = _chosen(file, request, location)
    if any(name.startswith("stages.") for name in tensors):
        return _timm(request, location, file, config, tensors, chosen)
    if any(name.startswith("blocks.") for name in tensors):
        return _ours(request, location, file, tensors, chosen)
    first = f" (the first is {next(iter(tensors))[:80]})" if tensors else ""
    raise ConfigError(
        f"{location}: its tensors have neither our names nor those of timm's CoAtNet{first}; give weights of a CoAtNet"
    )


def _chosen(file: WeightFile, request: Request, location: str) -> tuple[Literal["raw", "ema"], Mapping[str, Tensor]]:
    if request.which == "ema" and file.averaged is None:
        raise ConfigError(f"{location}: holds no moving average; use the raw weights, or auto")
    if file.averaged is not None and request.which != "raw":
        return "ema", file.averaged
    return "raw", file.raw


def _exported(request: Request, location: str, file: WeightFile, config: Mapping[str, Any]) -> WeightSource:
    """A file that `coatnet export` has written, with its config."""
    try:
        facts = facts_of_config(config, ModelSource(request.location, location))
    except ValueError as error:
        raise ConfigError(f"{location}: {error}; export the model again") from None
    if request.which not in ("auto", facts.weights):
        have = "the raw weights" if facts.weights == "raw" else "their moving average"
        raise ConfigError(f"{location}: holds {have} alone; use auto, or export the others")
    refuse_other_variant(request, location, facts.arguments)
    parameters, buffers, others = _sorted(request, location, file.raw)
    return WeightSource(
        location=location,
        origin="the exported model",
        weights=facts.weights,
        step=facts.step,
        num_classes=int(facts.arguments["num_classes"]),
        classes=facts.classes,
        classes_digest=facts.classes_digest,
        precision=None,
        parameters=parameters,
        buffers=buffers,
        left_out=dict.fromkeys(others, 1),
    )


def _ours(
    request: Request, location: str, file: WeightFile, tensors: Mapping[str, Tensor], chosen: Literal["raw", "ema"]
) -> WeightSource:
    """Tensors with our names, which do not say what model they are of beyond their shapes."""
    parameters, buffers, others = _sorted(request, location, tensors)
    classifier = parameters.get("head.classifier.weight")
    return WeightSource(
        location=location,
        origin="the file",
        weights=chosen,
        step=None,
        num_classes=0 if classifier is None else classifier.shape[0],
        classes=None,
        classes_digest=None,
        precision=None,
        parameters=parameters,
        buffers=buffers,
        left_out=dict.fromkeys((*others, *file.others), 1),
        remarks=(
            "the file does not say of which model its tensors are; options that leave no trace in their shapes (pool, "
            "stride_in, gelu, epsilons) are taken for those of the recipe",
        ),
    )


def _sorted(
    request: Request, location: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Parameters and buffers by our names, and the names of other tensors."""
    wanted, buffers = dict(request.model.named_parameters()), persistent_buffers(request.model)
    if lacking := [name for name in buffers if name not in tensors]:
        raise ConfigError(
            f"{location}: lacks {lacking[0]} and {len(lacking) - 1} more of BatchNorm's statistics; give a whole "
            "state_dict"
        )
    known = {name: tensor.float() for name, tensor in tensors.items() if name in wanted}
    strange = [name for name in tensors if name not in wanted and name not in buffers]
    # Parameters of another architecture are for the comparison of names that follows.
    known |= {name: tensors[name] for name in strange if name.startswith("blocks.")}
    others = [name for name in strange if name not in known]
    return known, {name: tensors[name].float() for name in buffers}, others


def _timm(
    request: Request,
    location: str,
    file: WeightFile,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    chosen: Literal["raw", "ema"],
) -> WeightSource:
    """Weights with timm's names, matched with the requested model or refused."""
    architecture = config.get("architecture", file.architecture)
    arguments = config.get("model_args", file.arguments) or {}
    if not isinstance(architecture, str | None) or not isinstance(arguments, dict):
        raise ConfigError(f"{location}: architecture or model_args in its config.json are none of timm's; restore it")
    variant = request.model.variant
    try:
        weights = TimmWeights({name: tuple(tensor.shape) for name, tensor in tensors.items()}, architecture, arguments)
        if differences := weights.differences(variant):
            raise ConfigError(f"{location}: {differences_text(differences, request.model_name)}")
        if unknown := weights.unknown():
            raise ConfigError(
                f"{location}: tensors do not show {', '.join(unknown)}, and these are not of timm's own coatnet_0 to "
                'coatnet_5; put a config.json beside the file with {"architecture": NAME, "model_args": {...}}, as '
                "timm.models.save_for_hf writes it"
            )
        wanted, buffers = list(dict(request.model.named_parameters())), list(persistent_buffers(request.model))
        found = from_timm(tensors, [*wanted, *buffers], variant)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{location}: {error}; give weights of a CoAtNet") from None
    zeros = [name for name in STEM_BIASES if name in wanted and name not in found]
    found |= {name: torch.zeros_like(found[name.replace("bias", "weight")][:, 0, 0, 0]) for name in zeros}
    if lacking := [name for name in buffers if name not in found]:
        raise ConfigError(f"{location}: lacks {timm_name(lacking[0], variant)}; give a whole state_dict")
    used = {timm_name(name, variant) for name in (*wanted, *buffers)}
    others = [name for name in tensors if name not in used]
    counters = sum(name.endswith(_COUNTERS) for name in others)
    left_out = {name: 1 for name in (*others, *file.others) if not name.endswith(_COUNTERS)}
    classifier = tensors.get("head.fc.weight")
    classes = _label_names(config)
    return WeightSource(
        location=location,
        origin=f"timm's {architecture or 'CoAtNet'}",
        weights=chosen,
        step=None,
        num_classes=0 if classifier is None else classifier.shape[0],
        classes=classes,
        classes_digest=json_sha256(classes) if classes else None,
        precision=None,
        parameters={name: found[name] for name in wanted if name in found},
        buffers={name: found[name] for name in buffers},
        zeros=tuple(zeros),
        left_out=left_out | ({f"BatchNorm's counters ({_COUNTERS})": counters} if counters else {}),
        remarks=tuple(_remarks(weights, config, request)),
    )


def _own_config(location: str, text: str) -> Mapping[str, Any]:
    """The config in the metadata of an exported file."""
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{location}: its config is damaged ({error}); export the model again") from None
    return config


def _config(location: str, storage: Storage) -> dict[str, Any]:
    """The content of the `config.json` beside a file; empty without one."""
    place = join(parent(location), "config.json")
    try:
        content = json.loads(read_bytes(place, storage)[:_LARGEST_CONFIG])
    except FileNotFoundError:
        return {}
    except StorageRefused:  # a server may refuse what it does not have
        return {}
    except (OSError, RecursionError, ValueError) as error:
        raise_if_passing(error)
        raise ConfigError(f"{place}: cannot be read ({error}); restore it, or remove it") from None
    return content if isinstance(content, dict) else {}


def _label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of classes, which timm has in one of two places."""
    for place in (config, config.get("pretrained_cfg")):
        names = place.get("label_names") if isinstance(place, dict) else None
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def _remarks(weights: TimmWeights, config: Mapping[str, Any], request: Request) -> list[str]:
    remarks = []
    if assumed := weights.assumptions():
        remarks.append(
            "there is no config.json that would say what tensors do not show; it is taken as timm's coatnet_0 to "
            f"coatnet_5 have it: {', '.join(assumed)}"
        )
    pixels = config.get("pretrained_cfg")
    ours = imagenet_preprocessing(request.model.image_size[0], "center")
    for key, own in (("mean", ours.mean), ("std", ours.std)):
        value = pixels.get(key) if isinstance(pixels, dict) else None
        if value is not None and value != list(own):
            remarks.append(f"its images were normalized with the {key} {str(value)[:80]}, and here it is {list(own)}")
    return remarks

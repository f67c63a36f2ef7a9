"""Writing a trained model in each format; what is written is compared with the model where that is possible."""

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.coatnet import CoAtNet
from models.model_facts import ModelFacts
from models.pretrained import CITATION, CONFIG_FILE, CONFIG_KEY, WEIGHTS_FILE, config_of
from models.timm_layout import timm_arguments, to_timm, why_not_timm
from models.variants import Variant
from pipeline.errors import ConfigError, RunFailed

TOLERANCE = 1e-5
"""Greatest difference of a logit, absolute for logits up to 1 and relative to the greatest one above."""
_PROTOBUF_BYTES = 2**31 - 2**24
"""Weights in an ONNX file beyond which they are beside it: a protobuf message has less than 2 GiB."""
_PUBLISHED_BY_TIMM = [f"coatnet_{number}" for number in range(6)]


def save_safetensors(tensors: dict[str, Tensor], facts: ModelFacts, folder: Path, file: str | None) -> None:
    """The weights with the config in the metadata as one `file`, or with a config file beside them.

    Raises:
        OSError: they cannot be written.
    """
    config = config_of(facts)
    if file is None:
        _save(tensors, folder / WEIGHTS_FILE, {})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
    else:
        _save(tensors, folder / file, {CONFIG_KEY: json.dumps(config)})


def refuse_without_timm_equivalent(variant: Variant, name: str) -> None:
    """
    Raises:
        ConfigError: timm cannot express the variant; it says why.
    """
    reason = why_not_timm(variant)
    if reason is not None:
        raise ConfigError(f"--format timm: timm cannot express {name}: {reason}; use safetensors, onnx or torch")


def save_timm(tensors: dict[str, Tensor], facts: ModelFacts, variant: Variant, folder: Path) -> None:
    """The weights by timm's names with timm's `config.json`, for `timm.create_model("local-dir:FOLDER")`.

    Raises:
        OSError: they cannot be written.
    """
    _save(to_timm(tensors, variant), folder / WEIGHTS_FILE, {})
    name = facts.arguments["name"].removesuffix("_dw")
    size, count = facts.preprocessing.image_size, facts.arguments["num_classes"]
    center = facts.preprocessing.crop == "center"
    config: dict[str, Any] = {
        "architecture": f"{name if name in _PUBLISHED_BY_TIMM else 'coatnet_0'}_224",
        "num_classes": count,
        "num_features": variant.stages[-1].width,
        "global_pool": "avg",
        "model_args": timm_arguments(variant) | {"img_size": size},
        "pretrained_cfg": {
            "tag": "coatnet_pretraining",
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": facts.preprocessing.interpolation,
            "crop_pct": size / (size + 32) if center else 1.0,
            "crop_mode": "center" if center else "squash",
            "mean": list(facts.preprocessing.mean),
            "std": list(facts.preprocessing.std),
            "num_classes": count,
            "pool_size": [size // variant.stride, size // variant.stride],
            "first_conv": "stem.conv1",
            "classifier": "head.fc",
            "paper_ids": "arXiv:2106.04803",
        },
        "training": config_of(facts)["training"] | {"loss": facts.loss},
        "citation": CITATION,
    }
    if facts.classes is not None:
        config["label_names"] = list(facts.classes)
        if facts.display_names is not None:
            config["label_descriptions"] = dict(zip(facts.classes, facts.display_names, strict=True))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")


def save_torch(model: CoAtNet, facts: ModelFacts, path: Path) -> float:
    """`model` by torch.export with a dynamic batch, and the config in the extra file `config.json`.

    Returns the greatest difference of a logit between it, loaded again, and the model.

    Raises:
        RunFailed: the difference is above the tolerance.
        OSError: it cannot be written.
    """
    images = _images(model, 2)
    with _quiet():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        try:
            with open(path, "wb") as file:
                torch.export.save(program, file, extra_files={CONFIG_FILE: json.dumps(config_of(facts))})
        except RuntimeError as error:  # torch's own for a file that cannot be written
            raise OSError(str(error)) from None
        loaded = torch.export.load(str(path)).module()
    return _greatest_difference(model, loaded, "torch.export.load")


def refuse_without_onnx() -> None:
    """
    Raises:
        ConfigError: a package that torch's exporter needs is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format onnx: needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed: "
            f"pip install onnx onnxscript, and onnxruntime to check the result"
        )


def save_onnx(model: CoAtNet, facts: ModelFacts, path: Path) -> float | None:
    """`model` as ONNX with a dynamic batch: `images` (batch, S, S, 3), normalized, to `logits` (batch, classes).

    Weights of 2 GiB and more are in `<name>.data` beside it. The config is in its metadata.

    Returns the greatest difference of a logit between onnxruntime and the model; None if onnxruntime is not installed.

    Raises:
        RunFailed: the difference is above the tolerance.
        OSError: it cannot be written.
    """
    with _quiet():
        program = torch.onnx.export(
            model,
            (_images(model, 2),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props[CONFIG_KEY] = json.dumps(config_of(facts))
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        program.save(path, external_data=size > _PROTOBUF_BYTES)
    del program
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return _greatest_difference(model, run, "onnxruntime")


@torch.no_grad()
def _greatest_difference(model: CoAtNet, other: Any, program: str) -> float:
    """Between the logits of two programs for batches of one and of three images."""
    greatest = 0.0
    for batch in (1, 3):
        images = _images(model, batch)
        logits = model(images)
        difference = float((other(images) - logits).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(logits.abs().max())):
            raise RunFailed(
                f"{program}: its logits of {batch} images differ by up to {difference:.1e} from the model's, more than "
                f"{TOLERANCE:g}; nothing was written"
            )
        greatest = max(greatest, difference)
    return greatest


def _images(model: CoAtNet, batch: int) -> Tensor:
    """Random normalized images (batch, height, width, 3)."""
    return torch.randn(batch, *model.image_size, 3, generator=torch.Generator().manual_seed(batch))


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, {"format": "pt", **metadata})  # by which other programs recognize tensors of PyTorch
    except SafetensorError as error:
        raise OSError(str(error)) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch's exporters do not write about their own internals; their errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

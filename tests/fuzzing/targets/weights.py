"""Files of weights that a stage starts from: safetensors, torch files, and the `config.json` beside them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data.remote.storage import Storage
from models.coatnet import CoAtNet
from models.registry import create_model
from models.timm_layout import to_timm
from pipeline.initial_weights.fitting import fit
from pipeline.initial_weights.opening import open_source
from pipeline.initial_weights.source import Request
from tests.fuzzing.campaign import Fuzz, SilentAcceptance, Target
from tests.fuzzing.mutation import damaged_bytes, damaged_json, damaged_tensors
from tests.pipeline.checkpoints.small import ALONE

_CLASSES = ("a", "b", "c")


def _model() -> CoAtNet:
    shape: dict[str, Any] = {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 16, 16], "head_size": 8}
    return create_model("coatnet_0", num_classes=3, image_size=32, **shape)


def _start(path: Path) -> None:
    """What is done with a file: from its header, and with its values."""
    model = _model()
    request = Request(str(path), "auto", Storage(), model, "coatnet_0")
    for ranks in (None, ALONE):
        fitted = fit(open_source(request, ranks), model, _CLASSES, str(path))
        wanted = model.state_dict()
        if any(tensor.shape != wanted[name].shape for name, tensor in fitted.parameters.items()):
            raise SilentAcceptance("a tensor of another shape")


def _safetensors(folder: Path) -> Fuzz:
    path = folder / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in _model().state_dict().items()}, path)
    seed = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        _start(path)

    return Fuzz(lambda rng: damaged_tensors(rng, seed), read)


def _torch_file(folder: Path) -> Fuzz:
    path = folder / "weights.pth"
    torch.save({"state_dict": _model().state_dict(), "epoch": 3}, path)
    seed = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        _start(path)

    return Fuzz(lambda rng: damaged_bytes(rng, seed), read)


def _timm_config(folder: Path) -> Fuzz:
    model = _model()
    save_file(to_timm(model.state_dict(), model.variant), folder / "model.safetensors")
    seed = {
        "architecture": "coatnet_0_224",
        "model_args": {
            "conv_stride_mode": "1x1", "conv_pool_type": "max2", "transformer_pool_type": "max2",
            "conv_act_layer": "gelu_tanh", "transformer_act_layer": "gelu_tanh", "conv_norm_eps": 1e-3,
            "transformer_norm_eps": 1e-5,
        },
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "label_names": list(_CLASSES)},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(seed))
    _start(folder)

    def mutate(rng: random.Random) -> bytes:
        return damaged_json(rng, seed)

    def read(content: bytes) -> None:
        (folder / "config.json").write_bytes(content)
        _start(folder)

    return Fuzz(mutate, read)


TARGETS = [
    Target("safetensors-weights", _safetensors),
    Target("torch-weights", _torch_file),
    Target("timm-config", _timm_config),
]

"""Tensors in a file of weights, safetensors or torch's, local or at a URL: their shapes alone, or their values.

torch files are read by `weights_only=True` alone: they are never unpickled otherwise, as that can run any code.
"""

import argparse
import json
import pickle
import re
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import raise_if_passing
from data.files.regular_file import open_regular
from data.remote.storage import Storage, file_size, is_remote, pieces, read_bytes
from data.remote.web_address import without_signature
from pipeline.errors import ConfigError
from pipeline.initial_weights.content import READABLE, SAFETENSORS, TORCH_FILES

_LARGEST_HEADER = 100_000_000  # bytes, as in safetensors' own code
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_RAW = ("state_dict", "model", "model_state_dict")
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict")
_BROKEN = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError,
    ValueError, struct.error,
)  # fmt: skip
"""What torch raises for files that are damaged."""
_ZIP = b"PK\x03\x04"
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """What is in a file; tensors without values are on the meta device."""

    raw: Mapping[str, Tensor]
    averaged: Mapping[str, Tensor] | None
    """Their moving average, in files that have one."""
    metadata: Mapping[str, str]
    """Of a safetensors file."""
    others: tuple[str, ...]
    """What a torch file has besides tensors of weights, such as the state of an optimizer."""
    architecture: str | None = None
    """timm's name of the model, which its training script records."""
    arguments: Mapping[str, Any] | None = None
    """Those of `timm.create_model` that its training script records."""


def read_weight_file(location: str, storage: Storage, *, values: bool) -> WeightFile:
    """The tensors in the file at the path or URL `location`; without `values` no more of it is read than needed.

    Raises:
        ConfigError: it cannot be read: there is none, it is damaged, or it holds more than tensors and plain values.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    name = location.partition("?")[0]
    try:
        if name.endswith(SAFETENSORS):
            if is_remote(location) and not values:
                return _remote_header(location, storage)
            with local_file(location, storage) as path:
                return _safetensors(path, values)
        if not name.endswith(TORCH_FILES):
            raise ConfigError(f"{_shown(location)}: not a file of weights that can be read ({', '.join(READABLE)})")
        with local_file(location, storage) as path:
            return _torch_file(path, location, values)
    except FileNotFoundError:
        raise ConfigError(f"{_shown(location)}: there is no such file; correct the path") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise_if_passing(error)
        raise ConfigError(f"{_shown(location)}: cannot be read ({error}); restore it from a copy") from None


@contextmanager
def local_file(location: str, storage: Storage) -> Iterator[Path]:
    """The file at `location` on this machine, downloaded to a temporary place if it is remote."""
    if not is_remote(location):
        open_regular(location).close()  # torch and safetensors would wait for a pipe
        yield Path(location)
        return
    folder = Path(tempfile.mkdtemp(prefix="coatnet-weights-"))
    try:
        path = folder / location.partition("?")[0].rpartition("/")[2]
        with open(path, "wb") as file:
            for piece in pieces(location, file_size(location, storage), storage):
                file.write(piece)
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shown(location: str) -> str:
    return without_signature(location) if is_remote(location) else location


def _safetensors(path: Path, values: bool) -> WeightFile:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if values:
            tensors = {name: file.get_tensor(name) for name in names}
        else:
            slices = {name: file.get_slice(name) for name in names}
            tensors = {name: _without_values(part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        return WeightFile(tensors, None, file.metadata() or {}, ())


def _remote_header(location: str, storage: Storage) -> WeightFile:
    length = int.from_bytes(read_bytes(location, storage, 0, 8), "little")
    if length > _LARGEST_HEADER:
        raise ValueError(f"its header would be {length:,} bytes long")
    header = json.loads(read_bytes(location, storage, 8, 8 + length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    metadata = header.pop("__metadata__", {})
    try:
        tensors = {name: _without_values(entry["shape"], entry["dtype"]) for name, entry in header.items()}
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"its header is no list of tensors: {error}") from None
    return WeightFile(tensors, None, metadata, ())


def _without_values(shape: list[int], dtype: str) -> Tensor:
    return torch.empty(shape, dtype=_DTYPES.get(dtype, torch.float32), device="meta")


def _torch_file(path: Path, location: str, values: bool) -> WeightFile:
    content = _loaded(path, location, values)
    if not isinstance(content, dict):
        raise ConfigError(f"{_shown(location)}: holds a {type(content).__name__}; a dictionary of tensors is needed")
    inner, averaged = (_nested(content, keys) for keys in (_RAW, _AVERAGED))
    raw, mixed = _tensors(content if inner is None else inner)
    if not raw:
        raise ConfigError(f"{_shown(location)}: has no tensors under names; a dictionary of tensors is needed")
    if inner is not None:
        mixed += [str(key) for key, value in content.items() if value is not inner and value is not averaged]
    script = content.get("args") if inner is not None else None
    arguments = getattr(script, "model_kwargs", None)
    architecture = content.get("arch") if inner is not None else None
    return WeightFile(
        raw,
        _tensors(averaged)[0] if averaged is not None else None,
        {},
        tuple(mixed),
        architecture if isinstance(architecture, str) else None,
        arguments if isinstance(arguments, dict) else None,
    )


def _nested(content: Mapping[Any, Any], keys: tuple[str, ...]) -> dict[Any, Any] | None:
    return next((content[key] for key in keys if isinstance(content.get(key), dict)), None)


def _loaded(path: Path, location: str, values: bool) -> Any:
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            # The older format states sizes that nothing bounds.
            raise ConfigError(f"{_shown(location)}: no torch file, or of a version before 1.6; save its tensors again")
    # timm's training script stores its options in a Namespace, which holds plain values and runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about files of other versions, which are read or refused all the same
        try:
            return torch.load(path, map_location="cpu" if values else "meta", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            reason = " ".join(str(error).split())
            named = re.search(r"GLOBAL (\S+)", reason)
            reason = named[1] if named else reason.partition(". ")[0]
            raise ConfigError(
                f"{_shown(location)}: holds more than tensors and plain values ({reason[:120]}), and is not unpickled, "
                "since that can run any code; where you trust it, save its state_dict alone as a safetensors file"
            ) from None
        except _BROKEN as error:
            reason = " ".join(str(error).split())[:120]
            raise ConfigError(f"{_shown(location)}: cannot be read ({reason}); restore it from a copy") from None


def _tensors(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by their names without those of wrappers, and the keys of everything else."""
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for wrapper in _WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors, [str(key) for key, value in content.items() if not isinstance(value, Tensor)]

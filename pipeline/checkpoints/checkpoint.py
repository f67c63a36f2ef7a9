"""A published checkpoint, open for reading at any world size and ZeRO stage, without DeepSpeed or a process group."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import raise_if_passing
from data.files.digest import json_sha256
from data.files.json_records import parse_json
from data.files.regular_file import read_regular
from data.limits import CLASS_LIST_BYTES
from data.remote.storage import Storage, is_remote, join, pieces
from pipeline.checkpoints.manifest import BUFFERS, CLASSES, ClassNames, Manifest, read_manifest
from pipeline.checkpoints.verification import checksum_differs, damaged_file, wrong_tensors
from pipeline.errors import ConfigError
from pipeline.zero.fragments import Fragment

AVERAGED = "ema."
"""What the names of averaged buffers begin with in their file."""


class Checkpoint:
    """A published checkpoint; files of a remote one are downloaded as needed, verified, and kept until `close`.

    Args:
        location: its folder or URL.
        manifest: its manifest.
        storage: how a URL is reached.
        scratch: folder for downloads, emptied first; by default a temporary one.
    """

    def __init__(
        self, location: str, manifest: Manifest, storage: Storage | None = None, scratch: Path | None = None
    ) -> None:
        self.location = location
        self.manifest = manifest
        self._storage = storage or Storage()
        self._folder = Path(location)
        self._remote = is_remote(location)
        if self._remote:
            self._temporary = tempfile.TemporaryDirectory(prefix="coatnet-checkpoint-") if scratch is None else None
            self._folder = scratch or Path(self._temporary.name)  # type: ignore[union-attr]
            self.close()
        self._ranges: dict[str, list[tuple[int, int, str]]] = {}
        for entry in manifest.fragments:
            self._ranges.setdefault(entry.parameter, []).append((entry.start, entry.stop, entry.file))
        self._fragments = manifest.fragments_by_file()
        self._checked: set[str] = set()

    @property
    def name(self) -> str:
        """`step-...`."""
        return self.location.rpartition("/")[2]

    @property
    def step(self) -> int:
        """Steps taken when it was saved."""
        return self.manifest.facts.step

    @property
    def has_average(self) -> bool:
        """Whether it holds a moving average of weights and buffers."""
        return self.manifest.facts.ema_updates is not None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter names and shapes."""
        return self.manifest.parameters

    def read(self, parameter: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements `start` .. `stop` of one flattened tensor of state; (stop - start,) float32 on the CPU."""
        parts = []
        for first, last, file in sorted(self._ranges[parameter]):
            if first < stop and last > start:
                with self._opened(file) as tensors:
                    piece = tensors.get_slice(f"{kind}.{parameter}")
                    parts.append(piece[max(start, first) - first : min(stop, last) - first])
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def parameters(self, which: Literal["raw", "ema"] = "raw") -> dict[str, Tensor]:
        """All weights or their moving averages, in full, float32 on the CPU."""
        kind = "ema" if which == "ema" else "master"
        # Every element is written below: a `Manifest` covers them all, and `_local` compares the files with it.
        whole = {name: torch.empty(shape) for name, shape in self.shapes.items()}
        for file, entries in sorted(self._fragments.items()):
            with self._opened(file) as tensors:
                for entry in entries:
                    tensor = tensors.get_tensor(f"{kind}.{entry.parameter}")
                    whole[entry.parameter].view(-1)[entry.start : entry.stop] = tensor
        return whole

    def buffers(self, which: Literal["raw", "ema"] = "raw") -> dict[str, Tensor]:
        """All buffers or their moving averages by name, on the CPU."""
        with self._opened(BUFFERS) as tensors:
            everything = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        averaged = which == "ema"
        return {
            name.removeprefix(AVERAGED): t for name, t in everything.items() if name.startswith(AVERAGED) == averaged
        }

    def classes(self) -> tuple[str, ...] | None:
        """Names of the model's outputs, in their order; None in checkpoints from before they were stored.

        Raises:
            ConfigError: they are damaged, or not those that the manifest describes.
        """
        if CLASSES not in self.manifest.files:
            return None
        facts = self.manifest.facts.run
        try:
            names = parse_json(ClassNames, read_regular(self._local(CLASSES), CLASS_LIST_BYTES)).classes
            if len(names) != facts.model["num_classes"] or json_sha256(names) != facts.digests.classes_digest:
                raise ValueError("not the classes of the manifest")
        except (OSError, ValueError) as error:
            raise_if_passing(error)
            raise ConfigError(f"{self.location}: {CLASSES} is damaged ({error}); restore it from a copy") from None
        return names

    def damage(self, share: int = 0, shares: int = 1) -> str | None:
        """What is wrong with the files, or None; see `damaged_file`. Remote files that were hashed need no download."""
        return damaged_file(
            self.location,
            self.manifest,
            self._storage,
            share=share,
            shares=shares,
            sha256_of=self._download if self._remote else None,
            local=self._folder,
        )

    def close(self) -> None:
        """Remove what was downloaded."""
        if self._remote:
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """The tensors in the file `name`.

        Raises:
            ConfigError: it is damaged, or as for `_local`.
        """
        try:
            with safe_open(self._local(name), framework="pt") as tensors:
                yield tensors
        except SafetensorError as error:
            raise ConfigError(f"{self.location}: {name} is damaged ({error}); restore it from a copy") from None

    def _local(self, name: str) -> Path:
        """The file `name` on this machine, downloaded and verified if necessary, with the tensors of the manifest.

        Raises:
            ConfigError: the download does not have the checksum of the manifest, or the file has other tensors.
        """
        path, problem = self._folder / name, None
        if self._remote and not path.exists() and self._download(name) != self.manifest.files[name].sha256:
            problem = checksum_differs(name)
        elif name != CLASSES and name not in self._checked:
            problem = wrong_tensors(path, self.manifest.kinds, self._fragments.get(name, ()))
        if problem is not None:
            raise ConfigError(f"{self.location}: {problem}; restore it from a copy")
        self._checked.add(name)
        return path

    def _download(self, name: str) -> str:
        """Download the file `name`, keep it if its checksum is right, and return its sha256."""
        entry, digest = self.manifest.files[name], hashlib.sha256()
        unfinished = self._folder / f".{name}.part"
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            for piece in pieces(join(self.location, name), entry.bytes, self._storage):
                file.write(piece)
                digest.update(piece)
        if digest.hexdigest() == entry.sha256:
            unfinished.replace(self._folder / name)
        return digest.hexdigest()


def open_checkpoint(location: str | Path, storage: Storage | None = None, scratch: Path | None = None) -> Checkpoint:
    """The checkpoint in the folder or at the URL `location`; its manifest is verified, its other files are not.

    Raises:
        ConfigError: not a checkpoint, or a damaged manifest.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    location = str(location).rstrip("/")
    return Checkpoint(location, read_manifest(location, storage or Storage()), storage, scratch)


def load_state(checkpoint: Checkpoint, state: Iterable[Fragment], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Copy the ranges that this rank holds into the live state.

    Raises:
        ConfigError: the checkpoint is another model's.
    """
    if dict(checkpoint.shapes) != dict(shapes):
        differing = sorted(
            name for name in checkpoint.shapes.keys() | shapes.keys() if checkpoint.shapes.get(name) != shapes.get(name)
        )
        name = differing[0]
        raise ConfigError(
            f"{checkpoint.location}: a checkpoint of another model: {name} is {checkpoint.shapes.get(name, 'absent')} "
            f"there and {shapes.get(name, 'absent')} in this model ({len(differing)} parameters differ); "
            "give the recipe another name, or remove the run folder"
        )
    for fragment in state:
        for kind, live in fragment.tensors.items():
            live.copy_(checkpoint.read(fragment.parameter, kind, fragment.start, fragment.stop))

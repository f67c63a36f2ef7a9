"""What lies at a path or URL that a stage starts from, and what identifies its content. Needs no torch."""

import hashlib
from pathlib import Path

from data.errors import StorageRefused
from data.files.digest import file_sha256, json_sha256
from data.remote.storage import Storage, file_size, is_remote, join, parent, pieces, read_bytes
from data.remote.web_address import without_signature
from pipeline.checkpoints.lost import continues_alone
from pipeline.checkpoints.manifest import manifest_bytes, weights_digest
from pipeline.errors import ConfigError
from pipeline.model_location import find_model_checkpoint
from pipeline.recipe.schema import Recipe
from pipeline.runs.run_folder import run_folder

TORCH_FILES = (".pth", ".pt", ".ckpt", ".tar", ".bin")
SAFETENSORS = ".safetensors"
READABLE = (SAFETENSORS, *TORCH_FILES)
"""Endings of the files that can be read."""

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights in a folder with a `config.json`, as exports and timm have them."""


def weight_file_at(location: str, storage: Storage) -> str | None:
    """The file of weights that `location` means: itself, or that of a folder with a `config.json`; None for others."""
    if location.partition("?")[0].endswith(READABLE) or (not is_remote(location) and Path(location).is_file()):
        return location
    for name in FOLDER_FILES:
        if all(_exists(join(location, part), storage) for part in ("config.json", name)):
            return join(location, name)
    return None


def content_digest(location: str, storage: Storage) -> str:
    """What identifies the weights at a path or URL: of a checkpoint its manifest, of a file all that is in it.

    Raises:
        ConfigError: there are none.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    file = weight_file_at(location, storage)
    if file is None:
        found = find_model_checkpoint(location)
        try:
            reached = storage if is_remote(location) else found.storage
            return weights_digest(manifest_bytes(found.location, reached))
        except FileNotFoundError:
            raise ConfigError(
                f"{without_signature(location)}: no checkpoint and no exported model there; correct the location"
            ) from None
    try:
        own = _sha256(file, storage)
    except FileNotFoundError:
        raise ConfigError(f"{without_signature(file)}: there is no such file; correct the path") from None
    config = join(parent(file), "config.json")
    return json_sha256([own, _sha256(config, storage) if _exists(config, storage) else None])


def source_digest(recipe: Recipe, stage: str, source: str, *, to_compare: bool) -> str | None:
    """`content_digest` of what a stage starts from, as long as it needs that; later what its first start recorded.

    None `to_compare` where nothing was recorded.

    Raises:
        ConfigError, StorageDown, StorageRefused: as for `content_digest`.
    """
    recorded = run_folder(recipe, stage).frozen()
    if recorded is None and to_compare:
        return None
    if recorded is not None and continues_alone(recipe, stage):
        return recorded.start_digest
    return content_digest(source, Storage(**recipe.stages[stage].data.storage.model_dump()))


def _sha256(location: str, storage: Storage) -> str:
    if not is_remote(location):
        return file_sha256(location)
    digest = hashlib.sha256()
    for piece in pieces(location, file_size(location, storage), storage):
        digest.update(piece)
    return digest.hexdigest()


def _exists(location: str, storage: Storage) -> bool:
    if not is_remote(location):
        return Path(location).is_file()
    try:
        return bool(read_bytes(location, storage, 0, 1))
    except (FileNotFoundError, StorageRefused):  # some servers refuse what they do not have
        return False

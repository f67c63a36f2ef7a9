"""Whether a checkpoint is intact: its manifest, the sizes of its files and their checksums. Needs no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from data.errors import raise_if_passing
from data.files.digest import location_sha256
from data.files.regular_file import open_regular
from data.remote.storage import Storage, is_remote, join, list_files
from pipeline.checkpoints.manifest import CLASSES, FragmentEntry, Manifest, read_manifest, writer_of
from pipeline.errors import ConfigError


def find_damage(location: str, storage: Storage) -> str | None:
    """What is wrong with the checkpoint at `location`, every file read and hashed; None if it is intact.

    Raises:
        OSError: a file system that fails for a while, see `may_pass`.
        StorageDown, StorageRefused: a remote store that cannot be read.
    """
    try:
        return damaged_file(location, read_manifest(location, storage), storage)
    except (ConfigError, OSError) as error:
        raise_if_passing(error)
        return reason_at(location, error)


def damaged_file(
    location: str,
    manifest: Manifest,
    storage: Storage,
    *,
    share: int = 0,
    shares: int = 1,
    sha256_of: Callable[[str], str] | None = None,
    local: Path | None = None,
) -> str | None:
    """What is wrong with the files that `manifest` names, or None.

    Share 0 of `shares` sees whether all of them are there, for all ranks; each hashes the files that the same rank
    wrote: those it will read. It also checks which tensors are in these, unless they are remote and not downloaded.

    Args:
        location, storage: where the files are.
        manifest: names them.
        share, shares: which of them are hashed.
        sha256_of: computes the checksum of a file by name; by default the file is read where it is stored.
        local: the folder on this machine that has a remote file once `sha256_of` has returned its checksum.
    """
    fragments = manifest.fragments_by_file()
    if not is_remote(location):
        local = Path(location)
    if share == 0 and (problem := manifest.missing_or_cut(list_files(location, storage))):
        return problem
    for name, expected in sorted(manifest.files.items()):
        if writer_of(name) % shares == share:
            found = sha256_of(name) if sha256_of else location_sha256(join(location, name), expected.bytes, storage)
            if found != expected.sha256:
                return checksum_differs(name)
            if (
                local
                and name != CLASSES
                and (problem := wrong_tensors(local / name, manifest.kinds, fragments.get(name, ())))
            ):
                return problem
    return None


def wrong_tensors(path: Path, kinds: Sequence[str], fragments: Sequence[FragmentEntry]) -> str | None:
    """What is wrong with the tensors in the file at `path`, of which only the header is read, or None.

    Args:
        path: a safetensors file; what it has beyond the fragments does not matter.
        kinds: of state that it must have for each fragment, (stop - start,) float32.
        fragments: that the manifest says are in it.
    """
    from safetensors import SafetensorError, safe_open

    open_regular(path).close()  # safe_open would wait for a pipe
    try:
        with safe_open(path, framework="numpy") as tensors:
            for entry in fragments:
                for kind in kinds:
                    found = tensors.get_slice(f"{kind}.{entry.parameter}")
                    if found.get_dtype() != "F32" or found.get_shape() != [entry.stop - entry.start]:
                        return (
                            f"{path.name}: {kind}.{entry.parameter} is {found.get_dtype()} {found.get_shape()}, and "
                            f"the manifest has {entry.stop - entry.start:,} float32 elements there"
                        )
    except (SafetensorError, ValueError) as error:
        return f"{path.name}: {error}"
    return None


def checksum_differs(name: str) -> str:
    """What is wrong with the file `name`."""
    return f"{name} does not have the checksum of the manifest"


def reason_at(location: str, error: Exception) -> str:
    """The message of an error about `location`, for where that is shown already."""
    return str(error).removeprefix(f"{location}: ")

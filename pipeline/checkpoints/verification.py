"""Whether a checkpoint is intact: its manifest, the sizes of its files and their checksums. Needs no torch."""

from collections.abc import Callable

from data.digest import location_sha256
from data.errors import raise_if_passing
from data.remote.storage import Storage, join, list_files
from pipeline.checkpoints.manifest import Manifest, read_manifest, writer_of
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
) -> str | None:
    """What is wrong with the files that `manifest` names, or None.

    Rank `share` of `shares` looks for all of them, and hashes the files that the same rank wrote: those it will read.
    `sha256_of` computes the checksum of a file by name; by default the file is read where it is stored.
    """
    problem = manifest.missing_or_cut(list_files(location, storage))
    if problem is not None:
        return problem
    for name, expected in sorted(manifest.files.items()):
        if writer_of(name) % shares == share:
            found = sha256_of(name) if sha256_of else location_sha256(join(location, name), expected.bytes, storage)
            if found != expected.sha256:
                return checksum_differs(name)
    return None


def checksum_differs(name: str) -> str:
    """What is wrong with the file `name`."""
    return f"{name} does not have the checksum of the manifest"


def reason_at(location: str, error: Exception) -> str:
    """The message of an error about `location`, for where that is shown already."""
    return str(error).removeprefix(f"{location}: ")

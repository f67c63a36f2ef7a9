"""To which run a place outside of run folders belongs: two runs of one name must not share one. Needs no torch.

A run claims the place at its first start there by a file in it, which no other run can create again.
"""

import json
import os
from dataclasses import dataclass

from data.files.json_records import parse_json, to_json
from data.remote.exclusive_file import create_file
from data.remote.storage import join, read_bytes, write_bytes
from pipeline.checkpoints.manifest import read_manifest
from pipeline.checkpoints.store import CheckpointStore, is_own
from pipeline.errors import ConfigError
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.run_identity import check_run_id, establish_identity, identity_of

CLAIM = ".claim.json"


@dataclass(frozen=True, slots=True)
class Claim:
    """The content of the file."""

    run: str
    """Id of the run."""
    folder: str
    """Its run folder, for a person."""

    def __post_init__(self) -> None:
        check_run_id(self.run)


def read_claim(store: CheckpointStore) -> Claim | None:
    """The claim on a place; None if nobody has claimed it.

    Raises:
        ConfigError: it is damaged.
        OSError, StorageDown, StorageRefused: it cannot be read.
    """
    try:
        return parse_json(Claim, read_bytes(join(store.location, CLAIM), store.storage))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{join(store.location, CLAIM)}: damaged ({error}), so it is not known whose checkpoints these are; "
            "restore it from a copy, or set another checkpoint.folder"
        ) from None


def claim_place(store: CheckpointStore, folder: RunFolder) -> None:
    """Make the place the one of the run in `folder`, at every start; a place in the run folder needs no claim.

    Raises:
        ConfigError: it belongs to another run, or cannot be written.
        StorageDown, StorageRefused: a remote store.
    """
    if is_own(store, folder):
        return
    identity = establish_identity(folder.path)
    own = Claim(identity.id, identity.folder)
    content, location = (json.dumps(to_json(own)) + "\n").encode(), join(store.location, CLAIM)
    try:
        if read_claim(store) is None:
            _refuse_unclaimed(store, folder, identity.ids)
            store.create()
            create_file(location, content, store.storage)
        claim = read_claim(store)
        if claim is None or claim.run != identity.id:
            raise _foreign(store, claim, folder)
        if claim != own:  # the run folder was moved
            write_bytes(location, content, store.storage)
    except (OSError, NotImplementedError) as error:
        raise store.cannot_be_written(error) from None


def refuse_foreign_place(store: CheckpointStore, folder: RunFolder) -> None:
    """What `claim_place` would refuse, before anything runs and without writing.

    Raises:
        ConfigError, StorageDown, StorageRefused: as there.
    """
    if is_own(store, folder):
        return
    identity = identity_of(folder.path)
    try:
        claim = read_claim(store)
    except OSError as error:
        raise store.cannot_be_written(error) from None
    if claim is not None and (identity is None or claim.run != identity.id):
        raise _foreign(store, claim, folder)


def _refuse_unclaimed(store: CheckpointStore, folder: RunFolder, ids: frozenset[str]) -> None:
    """Refuse checkpoints of another run whose claim was lost, for example by a copy without hidden files."""
    for step in store.contents().steps[:1]:
        run = read_manifest(store.at(step), store.storage).facts.run.run_id
        if run is not None and run not in ids:
            raise _foreign(store, Claim(run, f"with the id {run}"), folder)


def _foreign(store: CheckpointStore, claim: Claim | None, folder: RunFolder) -> ConfigError:
    whose, fix = f"another run, {claim.folder}," if claim else "another run", ""
    if claim and claim.folder == os.path.realpath(folder.path):
        whose = f"an earlier run in the same folder, {claim.folder},"
        fix = f"; to continue from one of them, copy it into {folder.checkpoints}"
    return ConfigError(
        f"checkpoint.folder: {store.location} is where {whose} has its checkpoints; set another checkpoint.folder, or "
        f"give the recipe another name{fix}"
    )

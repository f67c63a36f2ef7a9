"""Places outside of run folders belong to the run that was first there."""

import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from data.remote.storage import Storage, read_bytes, remove, write_bytes
from pipeline.checkpoints.claim import CLAIM, claim_place, read_claim, refuse_foreign_place
from pipeline.checkpoints.locations import CheckpointLocations, known_stores
from pipeline.checkpoints.store import CheckpointStore
from pipeline.errors import ConfigError
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.runs.run_folder import RunFolder
from pipeline.runs.run_identity import establish_identity


def started(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    establish_identity(path)
    return folder


@pytest.fixture
def alice(tmp_path: Path) -> RunFolder:
    return started(tmp_path / "alice" / "pretrain")


@pytest.fixture
def bob(tmp_path: Path) -> RunFolder:
    return started(tmp_path / "bob" / "pretrain")


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    location = str(tmp_path / "team" / "test" / "pretrain")
    if request.param == "s3":
        request.getfixturevalue("s3")
        location = f"s3://test/{uuid.uuid4().hex}"
    return CheckpointStore(location, Storage(give_up_after=20), tmp_path / "scratch")


def test_the_first_run_keeps_a_place_and_another_is_refused(
    place: CheckpointStore, alice: RunFolder, bob: RunFolder
) -> None:
    refuse_foreign_place(place, alice)
    claim_place(place, alice)
    claim_place(place, alice)
    for check in (claim_place, refuse_foreign_place):
        with pytest.raises(ConfigError) as refused:
            check(place, bob)
        assert str(refused.value) == (
            f"checkpoint.folder: {place.location} is where another run, {alice.path}, has its checkpoints; set another "
            "checkpoint.folder, or give the recipe another name"
        )
    assert [store.location for store in known_stores(bob, place)] == [str(bob.checkpoints)]
    assert [store.location for store in known_stores(alice, place)] == [place.location, str(alice.checkpoints)]


def test_a_moved_run_keeps_its_place_and_a_copy_does_not_get_it(
    place: CheckpointStore, alice: RunFolder, tmp_path: Path
) -> None:
    settings = CheckpointSettings()
    claim_place(place, alice)
    CheckpointLocations.save(alice, place, settings)
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(alice.path, copy.path)
    notes: list[str] = []
    elsewhere = replace(place, location=str(copy.checkpoints))
    assert known_stores(copy, elsewhere, notes.append) == [elsewhere]
    assert notes == [
        f"{place.location}: passed over, since the run that this folder was copied from has its checkpoints there"
    ]
    with pytest.raises(ConfigError, match="another run"):
        claim_place(place, copy)
    moved = RunFolder(tmp_path / "moved")
    alice.path.rename(moved.path)
    claim_place(place, moved)
    claim = read_claim(place)
    assert claim is not None
    assert claim.folder == str(moved.path)
    now = replace(place, location=str(moved.checkpoints))
    assert [store.location for store in known_stores(moved, now)] == [now.location, place.location]


def test_a_run_whose_folder_was_lost_says_how_to_continue_from_its_checkpoints(
    place: CheckpointStore, alice: RunFolder
) -> None:
    claim_place(place, alice)
    shutil.rmtree(alice.path)
    again = started(alice.path)
    with pytest.raises(ConfigError) as refused:
        claim_place(place, again)
    assert str(refused.value) == (
        f"checkpoint.folder: {place.location} is where an earlier run in the same folder, {alice.path}, has its "
        "checkpoints; set another checkpoint.folder, or give the recipe another name; to continue from one of them, "
        f"copy it into {again.checkpoints}"
    )


def test_a_place_in_the_run_folder_needs_no_claim(alice: RunFolder) -> None:
    own = CheckpointStore(str(alice.checkpoints), Storage(), alice.checkpoints)
    claim_place(own, alice)
    assert list(alice.checkpoints.iterdir()) == []


def test_a_damaged_claim_gives_the_place_to_nobody(place: CheckpointStore, alice: RunFolder) -> None:
    claim_place(place, alice)
    claim = f"{place.location}/{CLAIM}"
    whole = read_bytes(claim, place.storage)
    write_bytes(claim, whole[:9], place.storage)
    with pytest.raises(ConfigError, match="damaged .*so it is not known whose checkpoints these are; restore it"):
        claim_place(place, alice)
    remove(claim, place.storage)
    claim_place(place, alice)
    assert read_bytes(claim, place.storage) == whole


def test_a_foreign_place_that_cannot_be_read_is_passed_over(tmp_path: Path, bob: RunFolder) -> None:
    place = CheckpointStore(str(tmp_path / "team"), Storage(), tmp_path)
    (tmp_path / "team" / CLAIM).mkdir(parents=True)
    notes: list[str] = []
    assert [store.location for store in known_stores(bob, place, notes.append)] == [str(bob.checkpoints)]
    assert [note.partition(" (")[0] for note in notes] == [f"{place.location}: passed over, since it cannot be read"]

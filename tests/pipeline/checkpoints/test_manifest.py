"""The manifest: its bytes, and what is refused in its place."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.remote.storage import Storage
from pipeline.checkpoints.listing import checkpointed_stage, list_checkpoints
from pipeline.checkpoints.locations import CheckpointLocations
from pipeline.checkpoints.manifest import (
    CheckpointFacts,
    FileEntry,
    FragmentEntry,
    Manifest,
    NonFiniteRecord,
    RankRecord,
    RollBack,
    RunDigests,
    RunFacts,
    read_manifest,
    signed,
)
from pipeline.checkpoints.verification import find_damage
from pipeline.errors import ConfigError
from pipeline.recipe.intervals import CheckpointSettings
from pipeline.runs.run_folder import RunFolder
from tests.pipeline.checkpoints.small import freeze, local, save

MODEL = {"name": "coatnet_debug", "num_classes": 3, "image_size": 32}
FACTS = CheckpointFacts(RunFacts("pretrain", "fp32", MODEL, RunDigests("recipe", "index", "classes")), 7, 84, 2, 6, 2)
RECORDS = [
    RankRecord(
        {"buffers.safetensors": FileEntry(3, 64 * "b"), "rank-00000.safetensors": FileEntry(64, 64 * "0")},
        (FragmentEntry("a", 0, 4, "rank-00000.safetensors"),),
    ),
    RankRecord(
        {"rank-00001.safetensors": FileEntry(32, 64 * "1")}, (FragmentEntry("a", 4, 6, "rank-00001.safetensors"),)
    ),
]


@pytest.mark.parametrize(
    ("ema_updates", "sha256"),
    [
        (None, "cbe03ac90807c949e1bdf395643afd586058151ea4d2aefd7e6ad4b44223ad10"),
        (5, "6be7702e957234918c0152950a86dc321793d2b48444e2c5baf98f9720e21c79"),
    ],
)
def test_the_same_state_always_gives_these_bytes(ema_updates: int | None, sha256: str) -> None:
    manifest = Manifest.of(replace(FACTS, ema_updates=ema_updates), {"a": (2, 3)}, RECORDS)
    assert hashlib.sha256(json.dumps(manifest.as_json(), indent=1).encode()).hexdigest() == sha256


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    manifest = Manifest.of(FACTS, {"a": (2, 3)}, RECORDS)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.as_json()))
    assert read_manifest(str(tmp_path), Storage()) == manifest
    assert manifest.total_bytes == 99


def test_a_manifest_from_before_the_record_of_non_finite_steps_has_an_empty_one(tmp_path: Path) -> None:
    facts = replace(FACTS, non_finite=NonFiniteRecord(5, 2, (RollBack(3, 6),)), for_stop=True)
    content = Manifest.of(facts, {"a": (2, 3)}, RECORDS).as_json()
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert read_manifest(str(tmp_path), Storage()).facts == facts
    for key in ("steps_not_applied", "not_applied_in_a_row", "roll_backs", "for_stop"):
        content.pop(key)
    (tmp_path / "manifest.json").write_text(json.dumps(signed(content)))
    assert read_manifest(str(tmp_path), Storage()).facts == FACTS


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(key)


def having(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.update(changes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("step"), r"not a checkpoint \(manifest.json: step is missing\)"),
        (without("index_digest"), r"not a checkpoint \(manifest.json: index_digest is missing\)"),
        (without("files"), r"not a checkpoint \(manifest.json: files is missing\)"),
        (having(step="7"), r"\(manifest.json: step: must be an integer, not '7'\)"),
        (having(step=True), r"\(manifest.json: step: must be an integer, not True\)"),
        (having(ema_updates=1.5), r"\(manifest.json: ema_updates: must be an integer, not 1.5\)"),
        (having(model=[]), r"\(manifest.json: model: must be an object, not \[\]\)"),
        (having(parameters={"a": 6}), r"\(manifest.json: parameters: a: must be a list, not 6\)"),
        (
            having(fragments=[{"parameter": "a", "start": 0, "file": "x"}]),
            r"\(manifest.json: fragments: \[0\]: stop is missing\)",
        ),
        (
            having(files={"x": {"bytes": 1, "sha256": None}}),
            r"\(manifest.json: files: x: sha256: must be a string, not None\)",
        ),
    ],
)
def test_a_key_that_is_missing_or_mistyped_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    content = Manifest.of(FACTS, {"a": (2, 3)}, RECORDS).as_json()
    change(content)
    (tmp_path / "manifest.json").write_text(json.dumps(signed(content)))
    with pytest.raises(ConfigError, match=f"{tmp_path}: .*{reason}"):
        read_manifest(str(tmp_path), Storage())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "manifest.json: it is empty"),
        (b'{"step": 7', "manifest.json is not JSON"),
        (b"[1]", "manifest.json: it is not a JSON object"),
        (b"\x80abc", "not a checkpoint"),
        (b'{"step": 7}', "manifest.json does not have its own checksum"),
    ],
)
def test_a_manifest_that_is_torn_empty_or_something_else_is_reported(tmp_path: Path, text: bytes, reason: str) -> None:
    save(tmp_path, 3)
    location = local(tmp_path).at(3)
    (Path(location) / "manifest.json").write_bytes(text)
    with pytest.raises(ConfigError, match=f"step-00000003: .*{reason}"):
        read_manifest(location, Storage())
    assert reason in str(find_damage(location, Storage()))
    freeze(tmp_path)
    stage = checkpointed_stage(RunFolder(tmp_path))
    assert stage is not None
    (listed,) = list_checkpoints(stage)
    assert reason in str(listed.problem)
    assert (listed.step, listed.samples, listed.kept) == (3, None, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ('{"locations": ["a"', "Expecting"),
        ("[]", r"must be an object, not \[\]"),
        ("{}", "locations is missing"),
        ('{"locations": "a", "storage": {}, "keep_last": 1, "keep_every": null, "keep_best": 0}', "must be a list"),
        (
            '{"locations": [], "storage": {}, "keep_last": "1", "keep_every": null, "keep_best": 0}',
            "keep_last: must be an integer",
        ),
    ],
)
def test_a_damaged_record_of_locations_is_reported_with_the_fix(tmp_path: Path, text: str, reason: str) -> None:
    save(tmp_path, 3)
    freeze(tmp_path)
    (tmp_path / ".checkpoints.json").write_text(text)
    with pytest.raises(
        ConfigError, match=rf"\.checkpoints\.json: damaged \(.*{reason}.*\); restore it from a copy, or"
    ):
        checkpointed_stage(RunFolder(tmp_path))


def test_every_start_adds_its_location_once(tmp_path: Path) -> None:
    run, store = RunFolder(tmp_path), local(tmp_path)
    assert CheckpointLocations.load(run) is None
    for location in ("one", "two", "one"):
        CheckpointLocations.save(run, replace(store, location=location), CheckpointSettings(keep_last=5, keep_every=7))
    assert CheckpointLocations.load(run) == CheckpointLocations(("one", "two"), store.storage, 5, 7, 0)


def test_the_settings_of_the_last_start_decide_what_is_kept(tmp_path: Path) -> None:
    freeze(tmp_path)
    stage = checkpointed_stage(RunFolder(tmp_path))
    assert stage is not None
    assert stage.settings == CheckpointSettings()
    storage = Storage(endpoint="http://here", give_up_after=5.0)
    CheckpointLocations.save(
        RunFolder(tmp_path), replace(local(tmp_path), storage=storage), CheckpointSettings(keep_last=5, keep_best=3)
    )
    stage = checkpointed_stage(RunFolder(tmp_path))
    assert stage is not None
    assert stage.settings == CheckpointSettings(keep_last=5, keep_best=3)
    assert [store.storage for store in stage.stores] == [storage]

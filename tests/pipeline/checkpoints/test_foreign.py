"""Checkpoints and run folders that somebody else gives away: what is wrong with one is named, and nothing is made of it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import EXIT_CONFIG, CoatnetError
from data.files.digest import file_sha256
from data.remote.storage import Storage
from pipeline.checkpoints.checkpoint import load_state, open_checkpoint
from pipeline.checkpoints.claim import read_claim
from pipeline.checkpoints.locations import CheckpointLocations
from pipeline.checkpoints.lost import check_final_checkpoint
from pipeline.checkpoints.manifest import read_manifest, signed, step_of
from pipeline.checkpoints.resume import open_verified
from pipeline.checkpoints.verification import find_damage
from pipeline.errors import ConfigError
from pipeline.exports.export import export
from pipeline.recipe.loader import load_recipe
from pipeline.runs.run_folder import RunFolder, run_folder
from pipeline.runs.run_identity import establish_identity, identity_of
from tests.pipeline.checkpoints.small import ALONE, SHAPES, live, local, save
from tests.pipeline.exports.test_export import save as save_model
from tests.support.recipes import write_recipe
from tests.support.records import stage_result

RANK, BUFFERS = "rank-00000.safetensors", "buffers.safetensors"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    save(folder, 3)
    return Path(local(folder).at(3))


@pytest.fixture
def given(original: Path, tmp_path: Path) -> Path:
    """A copy of a small checkpoint."""
    return Path(shutil.copytree(original, tmp_path / "given"))


def rewrite(checkpoint: Path, change: Change) -> None:
    """Change its manifest, whose own checksum is right afterwards."""
    manifest = checkpoint / "manifest.json"
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(signed(content)))


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file and its entry in the manifest."""
    (checkpoint / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": file_sha256(checkpoint / name)}
    rewrite(checkpoint, lambda manifest: manifest["files"].update({name: entry}))


def renamed(name: str) -> Change:
    """The rank's file has another name, in its entry and in the fragments."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(RANK)
        for fragment in manifest["fragments"]:
            fragment["file"] = name

    return change


def fragment(number: int, **values: Any) -> Change:
    return lambda manifest: manifest["fragments"][number].update(values)


def top(**values: Any) -> Change:
    return lambda manifest: manifest.update(values)


def entry(**values: Any) -> Change:
    return lambda manifest: manifest["files"][RANK].update(values)


def shape(size: Any) -> Change:
    return lambda manifest: manifest["parameters"].update(b=size)


def model(**values: Any) -> Change:
    return lambda manifest: manifest["model"].update(values)


MANIFESTS: dict[str, tuple[Change, str]] = {
    "no fragments": (top(fragments=[]), "a: elements from 0 are missing"),
    "a gap": (fragment(0, start=1), "a: elements 0 to 1 are missing or written twice"),
    "cut": (fragment(1, stop=49), "b: elements from 49 are missing"),
    "too long": (fragment(1, stop=51), "b: has 50 elements, and a fragment ends at 51"),
    "twice": (lambda m: m["fragments"].append(m["fragments"][0]), "a: elements 1200 to 0 are missing or written twice"),
    "backwards": (fragment(1, start=9, stop=0), r"fragments: \[1\]: stop: must be at least 9, not 0"),
    "negative": (fragment(1, start=-1), r"fragments: \[1\]: start: must be at least 0, not -1"),
    "a boolean": (fragment(1, stop=True), "stop: must be an integer, not True"),
    "unknown parameter": (fragment(1, parameter="z"), "fragments: z is not one of the parameters"),
    "unknown file": (fragment(1, file="rank-00001.safetensors"), "'rank-00001.safetensors' is not one of the files"),
    "negative shape": (shape([-50, -1]), "b: a shape must be at most 8 positive sizes"),
    "huge shape": (shape([2**60]), "b: a shape must be at most 8 positive sizes"),
    "many dimensions": (shape([1] * 4000 + [50]), "b: a shape must be at most 8 positive sizes"),
    "infinite shape": (shape([float("inf")]), r"parameters: b: \[0\]: must be an integer, not inf"),
    "another shape": (shape([5, 11]), "b: elements from 50 are missing"),
    "absolute name": (
        renamed("/etc/passwd"),
        "files: '/etc/passwd' must be classes.json, buffers.safetensors or rank-NNNNN",
    ),
    "name above": (renamed("../other/" + RANK), "files: '../other/rank-00000.safetensors' must be"),
    "name of the manifest": (renamed("manifest.json"), "files: 'manifest.json' must be"),
    "hidden name": (renamed("." + RANK), "must be"),
    "name with a line break": (renamed(RANK + "\n"), "must be"),
    "no buffers": (lambda m: m["files"].pop(BUFFERS), "files: buffers.safetensors is missing"),
    "negative bytes": (entry(bytes=-1), "files: rank-00000.safetensors: bytes: must be at least 0, not -1"),
    "too few bytes": (entry(bytes=99), "rank-00000.safetensors: its fragments take 15,072 bytes, and it has 99"),
    "no digest": (entry(sha256="../x"), "sha256: must be 64 hexadecimal digits, not '../x'"),
    "another format": (top(format="other"), "has the format 'other', version 1; .* use the one that wrote it"),
    "no format": (lambda m: m.pop("format"), "has the format 'None'"),
    "a version that is true": (top(version=True), "has the format 'coatnet-checkpoint', version True"),
    "another version": (top(version=2), "has the format 'coatnet-checkpoint', version 2"),
    "negative step": (top(step=-3), "step: must be at least 0, not -3"),
    "no ranks": (top(world_size=0), "world_size: must be at least 1, not 0"),
    "model without classes": (
        lambda m: m["model"].pop("num_classes"),
        "model.*num_classes is missing|num_classes is miss",
    ),
    "classes": (model(num_classes="3"), "num_classes: must be an integer"),
    "run": (top(run_id="../../x"), "the id of a run must be 32 hexadecimal digits, not '../../x'"),
}


@pytest.mark.parametrize("attack", MANIFESTS)
def test_what_is_wrong_with_a_manifest_is_named_before_any_file_is_read(given: Path, attack: str) -> None:
    change, reason = MANIFESTS[attack]
    rewrite(given, change)
    for file in (RANK, BUFFERS):
        (given / file).unlink()
    for use in (
        lambda: read_manifest(str(given), Storage()),
        lambda: open_checkpoint(given).parameters(),
        lambda: export(str(given), given / "out"),
    ):
        with pytest.raises(ConfigError, match=f"given: .*manifest.json.*{reason}") as refused:
            use()
        assert refused.value.exit_code == EXIT_CONFIG
    assert find_damage(str(given), Storage())


@pytest.mark.parametrize(
    ("text", "reason"), [(b"[" * 100_000, "nested too deeply"), (b"9" * 5000, "integer string conversion")]
)
def test_a_manifest_that_json_cannot_read_is_refused(given: Path, text: bytes, reason: str) -> None:
    (given / "manifest.json").write_bytes(text)
    with pytest.raises(ConfigError, match=f"given: .*manifest.json.*{reason}"):
        read_manifest(str(given), Storage())


def without_moment(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["exp_avg_sq.b"]


def one_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["master.b"] = torch.ones(1)  # would be broadcast


def folded(tensors: dict[str, torch.Tensor]) -> None:
    tensors["master.b"] = tensors["master.b"].view(5, 10)


def of_half_precision(tensors: dict[str, torch.Tensor]) -> None:
    tensors["master.b"] = tensors["master.b"].half()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_moment, "exp_avg_sq.b"),
        (one_value, r"master.b is F32 \[1\], and the manifest has 50 float32 elements there"),
        (folded, r"master.b is F32 \[5, 10\], and"),
        (of_half_precision, r"master.b is F16 \[50\], and"),
    ],
)
def test_tensors_that_are_not_those_of_the_manifest_are_named(
    given: Path, change: Callable[[dict[str, torch.Tensor]], None], reason: str
) -> None:
    tensors = load_file(given / RANK)
    change(tensors)
    tensors["more"] = torch.zeros(100)  # so that the size is no reason
    save_file(tensors, given / "new")
    replace_file(given, RANK, (given / "new").read_bytes())
    for use in (
        lambda: open_verified(given, ALONE),
        lambda: open_checkpoint(given).parameters(),
        lambda: load_state(open_checkpoint(given), live(3).fragments, SHAPES),
        lambda: export(str(given), given / "out"),
    ):
        with pytest.raises(ConfigError, match=f"given: .*{RANK}: .*{reason}.*; restore it from a copy"):
            use()
    assert RANK in str(find_damage(str(given), Storage()))


@pytest.mark.parametrize("file", [RANK, BUFFERS])
@pytest.mark.parametrize(
    "header", [(2**63 - 1).to_bytes(8, "little"), (10**9).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"]
)
def test_a_file_with_a_false_header_is_named(given: Path, file: str, header: bytes) -> None:
    replace_file(given, file, header.ljust(20_000, b" "))
    with pytest.raises(ConfigError, match=f"given: damaged: {file}: .*; restore it from a copy"):
        open_verified(given, ALONE)
    with pytest.raises(ConfigError, match=f"given: {file}: .*; restore it from a copy"):
        open_checkpoint(given).buffers() if file == BUFFERS else open_checkpoint(given).parameters()


@pytest.mark.parametrize("file", ["manifest.json", RANK, BUFFERS])
@pytest.mark.parametrize("kind", ["pipe", "link to a device", "link to nothing", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(given: Path, file: str, kind: str) -> None:
    """Opening a pipe would wait without end, and reading /dev/zero as well."""
    path = given / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "link to a device" else "nowhere")
    for use in (lambda: open_verified(given, ALONE), lambda: export(str(given), given / "out")):
        with pytest.raises(ConfigError, match=f"given: damaged: .*{file}"):
            use()
    assert file in str(find_damage(str(given), Storage()))


def test_files_may_be_links_to_regular_ones(given: Path) -> None:
    (given / RANK).rename(given.parent / "elsewhere")
    (given / RANK).symlink_to(given.parent / "elsewhere")
    assert set(open_verified(given, ALONE).parameters()) == set(SHAPES)


def test_a_record_that_is_larger_than_any_is_not_read(given: Path) -> None:
    with open(given / "manifest.json", "r+b") as manifest:
        manifest.truncate(2**40)  # takes no room
    with pytest.raises(ConfigError, match=r"given: .*manifest\.json: more than 1,073,741,824 bytes"):
        read_manifest(str(given), Storage())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"name": "coatnet_99"}, "no model can be made .*unknown model coatnet_99"),
        ({"depths": [10**9] * 4}, "no model can be made .*more blocks than there are parameters"),
        ({"depths": "many"}, "no model can be made"),
        ({"head_size": "x"}, "no model can be made"),
        ({"device": "cuda"}, "no model can be made"),
        ({"image_size": 33}, "no model can be made"),
        ({"widths": [10**30] * 5}, "no model can be made"),
        ({"num_classes": 4}, r"head.classifier.* \(3.* there and .*\(4.* in the model"),
        ({"depths": [1, 1, 1, 1]}, "stages.* there and absent in the model|absent"),
    ],
)
def test_a_checkpoint_that_is_not_of_the_model_in_its_manifest_is_not_exported(
    tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    checkpoint = save_model(tmp_path, 5, averaged=False)
    rewrite(checkpoint, model(**arguments))
    rewrite(checkpoint, lambda manifest: manifest.pop("preprocessing"))  # which has an image size, too
    with pytest.raises(ConfigError, match=f"step-00000005: {reason}.*; restore it"):
        export(str(checkpoint), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["step-000000003", "step-00000003\n", "step-٠٠٠٠٠٠٠٣", "step-3"])
def test_a_step_has_one_name(name: str) -> None:
    assert step_of("step-00000003") == 3
    assert step_of(name) is None


RECORDS: dict[str, Callable[[RunFolder], object]] = {
    "result.json": RunFolder.result,
    "recipe.yaml": RunFolder.frozen,
    ".run.json": lambda folder: identity_of(folder.path),
    ".checkpoints.json": CheckpointLocations.load,
    "checkpoints/.claim.json": lambda folder: read_claim(local(folder.path)),
    "events.jsonl": lambda folder: folder.events.entries(),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_a_run_folder_that_is_a_pipe_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises((CoatnetError, OSError), match=rf"{name}.*not a regular file|not a regular file: .*{name}"):
        RECORDS[name](RunFolder(tmp_path))


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
RESULT = json.dumps(
    {
        "stage": "pretrain", "steps": 4, "images_per_second": 1.0, "checkpoint": "pretrain/checkpoints/step-00000004",
        "weights": "raw", "classes": {}, "validation": {"top1": 0.5, "top5": 0.5, "loss": 1.0, "samples": 4, "skipped": 0},
    }
)  # fmt: skip
IDENTITY = '{"id": "0123456789abcdef0123456789abcdef", "folder": "/runs/a", "inode": 3}'


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("result.json", RESULT.replace("pretrain/ch", "../../ch"), "checkpoint: must be a location without `..`"),
        ("result.json", RESULT.replace('"steps": 4', '"steps": -4'), "steps: must be at least 0, not -4"),
        ("result.json", RESULT.replace('"top1": 0.5', '"top1": NaN'), "top1: must be from 0 to 1, not nan"),
        ("result.json", "[" * 100_000, "nested too deeply"),
        ("recipe.yaml", "[" * 100_000, "too many levels inside one another"),
        ("recipe.yaml", BOMB, "expand"),
        (".run.json", IDENTITY.replace("0123", "../x"), "the id of a run must be 32 hexadecimal digits"),
        (".run.json", IDENTITY.replace("/runs", "/ru\\u0000ns"), "folder: must be an absolute path"),
        ("checkpoints/.claim.json", '{"run": "..", "folder": "/"}', "the id of a run must be 32 hexadecimal digits"),
        (
            ".checkpoints.json",
            '{"locations": [], "storage": {}, "keep_last": -1, "keep_every": null, "keep_best": 0}',
            "keep_last: must be at least 0, not -1",
        ),
    ],
)
def test_a_record_with_values_that_no_run_writes_is_damaged(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{name}: damaged \(.*{reason}.*restore it from a copy"):
        RECORDS[name](RunFolder(tmp_path))


def test_records_as_runs_write_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(RESULT)
    result = RunFolder(tmp_path).result()
    assert result is not None
    assert result.steps == 4
    assert establish_identity(tmp_path) == identity_of(tmp_path)


def test_a_pipe_in_place_of_a_final_manifest_is_not_taken_for_a_lost_checkpoint(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards))
    run = run_folder(recipe, "pretrain")
    save(run.path, 4)
    run.finish(stage_result("pretrain/checkpoints/step-00000004"))
    manifest = run.checkpoints / "step-00000004/manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    assert check_final_checkpoint(recipe, "pretrain") == ""

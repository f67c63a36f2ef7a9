"""Findings about a recipe on one machine: every mistake at once, each with its fix."""

import shutil
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from shutil import copytree

import pytest

from data.building.build import build_shards
from data.index import read_index
from data.order import SampleOrder
from jobs.preflight import assess_recipe
from pipeline.errors import ConfigError
from pipeline.plan import plan_stage
from pipeline.preflight.finding import Finding
from pipeline.preflight.versions import unmet
from pipeline.recipe.loader import load_recipe
from pipeline.runs.announcements import class_list
from pipeline.runs.run_folder import run_folder
from tests.conftest import with_broken_member
from tests.jobs.findings import STAGES, found, the_finding, wrong
from tests.servers.s3 import S3Server
from tests.support.recipes import write_recipe
from tests.support.records import stage_result
from tests.support.trained import save_trained


def test_a_valid_recipe_has_no_findings_but_a_line_for_each_check(shards: Path, tmp_path: Path) -> None:
    findings = found(tmp_path, shards, stages=STAGES)
    assert wrong(findings) == []
    sizes = [f"{read_index(shards / part).bytes / 1e6:,.1f} MB" for part in ("train", "validation")]
    assert [finding.what for finding in findings if finding.where == "pretrain"] == [
        "model: coatnet_debug at 32 pixels, fp32",
        "evaluation: whole images, resized to 32 x 32 pixels",
        "batch: 12 images as 4 micro-batches of 3 on 1 x 2 ranks, 2 each",
        f"data.train: 45 samples of 3 classes in 7 shards, {sizes[0]}",
        f"data.validation: 15 samples of 3 classes in 3 shards, {sizes[1]}",
        "data.lanes: 4 lanes; a batch of 12 has on average 3.0 classes (3.0 if all samples were shuffled), and a micro-batch "
        "of 3 has 2.2 (2.1)",
        "evaluation.every_steps: 1000000 is longer than the stage's 40 steps, so it evaluates only at its end",
        class_list(("bright", "dark", "striped")),
        the_finding(findings, "memory of this machine: 2 ranks need 0.9 of its 1000.0 GB by estimate; each: process 0.5 GB",
             "pretrain").what,
    ]  # fmt: skip
    assert [finding.where for finding in findings if finding.what.startswith("data.validation")] == STAGES
    for beginning in ("checkpoints: at most pretrain 4 of ", "clock: the file server of ", "versions: Python 3."):
        assert the_finding(findings, beginning).where == ""
    assert not (tmp_path / "runs").exists()


def test_the_decoder_of_jpegs_is_named_and_a_library_that_cannot_be_used_is_an_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COATNET_LIBTURBOJPEG", "")
    assert the_finding(found(tmp_path, shards), "JPEGs of training: ").what == (
        "JPEGs of training: decoded by simplejpeg, down to the end of the crop"
    )
    monkeypatch.setenv("COATNET_LIBTURBOJPEG", "/nowhere.so")
    refused = the_finding(found(tmp_path, shards), "COATNET_LIBTURBOJPEG=/nowhere.so: it cannot be loaded")
    assert (refused.level, refused.fix) == (
        "error", "name a libturbojpeg.so of version 3 or later, or unset the variable"
    )  # fmt: skip


def test_images_that_no_index_has_decoded_are_remarked_on(shards: Path, tmp_path: Path) -> None:
    folder = copytree(shards, tmp_path / "shards")
    replace(read_index(folder / "train"), images_decode=False).write()
    finding = the_finding(found(tmp_path, folder), "data.train: its images were not decoded when it was indexed")
    assert (finding.level, finding.where) == ("ok", "pretrain")
    assert finding.fix.startswith(f"to have it faster: coatnet shards index {folder / 'train'} --decode --overwrite")


def test_a_centre_crop_says_what_it_cuts_away_and_is_doubtful_at_small_sizes(shards: Path, tmp_path: Path) -> None:
    crop = "data.evaluation_crop=center"
    (small,) = wrong(found(tmp_path, shards, crop))
    assert (small.level, small.fix) == ("warning", "set data.evaluation_crop=whole, the default at this size")
    assert small.what.startswith("evaluation: the central 25% of a square picture and less of others, so 75% or more")
    large = the_finding(found(tmp_path, shards, crop, "pretrain.resolution=224"), "evaluation: ")
    assert large.level == "ok"
    assert large.what.startswith("evaluation: the central 77% of a square picture")


def test_other_classes_than_those_of_the_earlier_stage_are_reported(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("rename: {bright: Bright}\n")
    maps = [f"finetune.data.{key}=map.yaml" for key in ("label_map", "validation_label_map")]
    findings = found(tmp_path, shards, *maps, stages=STAGES)
    assert the_finding(findings, "3 classes", "finetune").what == (
        f"{class_list(('Bright', 'dark', 'striped'))}, others than those of stage pretrain: it starts with a new classifier"
    )
    (refused,) = wrong(findings)
    assert (refused.level, refused.where) == ("error", "evaluate")
    assert refused.what == (
        "data.validation has other classes than stage finetune, which it evaluates (3 and 3; class 0 is bright in one "
        "and Bright in the other)"
    )


def test_a_stage_that_is_done_and_whose_checkpoint_is_gone_is_an_error(shards: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards))
    folder = run_folder(recipe, "pretrain")
    folder.create()
    folder.freeze(plan_stage(recipe, "pretrain"), None)
    folder.finish(stage_result("pretrain/checkpoints/step-00000040"))
    (lost,) = wrong(found(tmp_path, shards))
    assert (lost.level, lost.fix) == ("error", f"restore it, or remove {folder.path} to train the stage again")
    assert lost.what.endswith("step-00000040 no longer exists, and there is no other intact one")


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("resources.ranks=3", "3 ranks do not divide the 4 micro-batches of a step (global_size 12 / micro_size 3)", "change resources.ranks or batch"),
        ("data.lanes=5", "data.lanes: 5 lanes do not divide the global batch of 12", "4 would"),
        ("batch.global_size=48 data.lanes=48", "data.lanes: 48 lanes for 45 samples: a lane needs at least one", "use fewer lanes"),
        ("model.name=coatnet_8", "model: unknown model coatnet_8", "did you mean coatnet_7 or coatnet_6 or coatnet_5?"),
        ("pretrain.resolution=50", "resolution: 50 is no multiple of 16, as coatnet_debug needs", "48 is"),
        ("optimizer.warmup_steps=40", "optimizer: the warm-up of 40 steps fills the stage's 40", "shorten it"),
        ("data.train=nowhere", "{folder}/nowhere: no index.json there", "build shards with: coatnet shards build SOURCE {folder}/nowhere, or index existing ones with: coatnet shards index"),
        ("runs=/proc/nowhere", "checkpoints: /proc cannot be written (No such file or directory)", "set runs or checkpoint.folder to a folder that you can write"),
        ("pretrain.checkpoint.folder=/proc/sys", "checkpoints: /proc/sys cannot be written (No such file or directory)", "set runs or checkpoint.folder to a folder that you can write"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_once_with_its_fix(
    shards: Path, tmp_path: Path, override: str, what: str, fix: str
) -> None:
    expected = Finding("error", "pretrain", what.format(folder=tmp_path), fix.format(folder=tmp_path))
    assert wrong(found(tmp_path, shards, *override.split())) == [expected]


def test_all_mistakes_are_reported_at_once(shards: Path, tmp_path: Path) -> None:
    overrides = ["resources.ranks=3", "data.lanes=5", "finetune.resolution=50", "data.validation=nowhere"]
    findings = wrong(found(tmp_path, shards, *overrides, stages=STAGES))
    assert [(finding.where, finding.what.split()[0]) for finding in findings] == [
        ("pretrain", "3"), ("pretrain", "data.lanes:"), ("pretrain", f"{tmp_path}/nowhere:"),
        ("finetune", "resolution:"), ("finetune", "3"), ("finetune", "data.lanes:"), ("finetune", f"{tmp_path}/nowhere:"),
        ("evaluate", f"{tmp_path}/nowhere:"),
    ]  # fmt: skip


def test_a_machine_without_slurm_is_reported_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = list(assess_recipe(load_recipe(write_recipe(tmp_path, shards)), ["pretrain", "evaluate"], slurm=True))
    assert wrong(findings) == [
        Finding("error", "", "Slurm is not on this machine", "use a machine that has its commands, or put them on PATH")
    ]


def test_an_unknown_stage_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="recipe test has no stage pretran; its stages are pretrain, finetune, evaluate"
    ):
        found(tmp_path, shards, stages=["pretran"])


def test_fewer_processors_than_reader_threads_are_a_warning(shards: Path, tmp_path: Path) -> None:
    few = ["data.workers=4", "resources.cpus_per_rank=3"]
    assert wrong(found(tmp_path, shards, *few)) == [
        Finding(
            "warning", "pretrain", "resources.cpus_per_rank: 3 processors for 4 reader threads",
            "set it to 4, or data.workers to 3",
        )
    ]  # fmt: skip
    assert wrong(found(tmp_path, shards, "data.workers=3", "resources.cpus_per_rank=3")) == []


def test_a_container_image_missing_here_is_a_warning(shards: Path, tmp_path: Path) -> None:
    (finding,) = wrong(found(tmp_path, shards, f"resources.container={tmp_path}/image.sqsh"))
    assert finding.what == f"resources.container: {tmp_path}/image.sqsh is not on this machine"
    (tmp_path / "image.sqsh").touch()
    assert wrong(found(tmp_path, shards, f"resources.container={tmp_path}/image.sqsh")) == []
    assert wrong(found(tmp_path, shards, "resources.container=registry.example/coatnet:1")) == []


def test_a_network_interface_is_required_only_if_the_stage_runs_here(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("GLOO", "NCCL"):
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "=none0")
    (finding,) = wrong(found(tmp_path, shards))
    assert finding.level == "error"
    assert "_SOCKET_IFNAME==none0: there is no " in finding.what
    elsewhere = assess_recipe(load_recipe(tmp_path / "recipe.yaml"), ["pretrain"], slurm=True)
    assert not [finding for finding in elsewhere if "IFNAME" in finding.what]


def test_shards_that_are_missing_truncated_or_not_tars_are_reported(shards: Path, tmp_path: Path) -> None:
    copy = copytree(shards, tmp_path / "copy")
    last = copy / "train" / read_index(copy / "train").shards[-1].name
    size = last.stat().st_size
    last.write_bytes(b"?" * size)
    (finding,) = wrong(found(tmp_path, copy))
    assert (finding.level, finding.fix) == ("error", "copy it again or fix its rights")
    assert finding.what.startswith(f"shard {last}: cannot be read (")
    last.write_bytes(b"?" * 10)
    (finding,) = wrong(found(tmp_path, copy))
    assert finding.what == f"{copy}/train: shard {last.name} has 10 bytes and {size:,} in the index"
    last.unlink()
    (finding,) = wrong(found(tmp_path, copy))
    assert finding.what == f"{copy}/train: shard {last.name} is missing"


def test_shards_that_are_sorted_by_class_are_a_warning_with_settings_that_would_do(
    sorted_shards: Path, tmp_path: Path
) -> None:
    data = [f"data.train={sorted_shards}", f"data.validation={sorted_shards}"]
    batch = [*data, "batch.global_size=40", "batch.micro_size=20", "data.lanes=null", "data.shuffle_window=10"]
    (finding,) = wrong(found(tmp_path, sorted_shards, *batch, "data.lanes=1"))
    assert finding.what == (
        "data.train: the samples are sorted: with 1 lane, a batch of 40 has on average 2.0 classes (8.0 if all "
        "samples were shuffled), and a micro-batch of 20 has 1.3 (7.4)"
    )
    assert finding.fix == (
        f"set data.shuffle_window to 240, or shuffle them once with: coatnet shards build {sorted_shards} NEW_FOLDER"
    )
    (derived,) = wrong(found(tmp_path, sorted_shards, *batch))
    assert "with 40 lanes (derived from the batch), a batch of 40 has on average 8.0 classes (8.0" in derived.what


def test_a_first_image_that_does_not_decode_is_a_warning(shards: Path, tmp_path: Path) -> None:
    """Broken samples are skipped by rule, but a shard that begins with one may hold more."""
    with_broken_member(shards, tmp_path / "broken", broken=0)
    index = read_index(tmp_path / "broken")
    swapped = replace(index, shards=(index.shards[1], index.shards[0], *index.shards[2:]))
    swapped.write()
    train = f"data.train={tmp_path / 'broken'}"
    (finding,) = wrong(found(tmp_path, shards, train))
    assert finding.level == "warning"
    assert finding.what.startswith(
        f"data.train: shard {tmp_path}/broken/{index.shards[1].name}: its first image, striped/"
    )
    assert finding.fix == f"check the rest with: coatnet shards verify {tmp_path}/broken --decode"


def test_shards_that_several_stages_share_are_read_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr("pipeline.preflight.shards.unreadable", lambda index, storage: read.append(index.folder))
    found(tmp_path, shards, stages=STAGES)
    assert read == [str(shards / "train"), str(shards / "validation")]


def test_differing_classes_are_reported(pictures: Path, shards: Path, tmp_path: Path) -> None:
    copytree(pictures, tmp_path / "source")
    (tmp_path / "source" / "dark").rename(tmp_path / "source" / "dim")
    build_shards(tmp_path / "source", tmp_path / "other")
    (finding,) = wrong(found(tmp_path, shards, f"data.validation={tmp_path / 'other'}"))
    assert finding.what.endswith("differ (3 and 3; class 1 is dark in one and dim in the other)")
    assert finding.fix.startswith("build both with one class list, or map one to the other with data.label_map")


def test_shards_that_the_chain_builds_first_may_be_missing_and_their_source_may_not(
    pictures: Path, shards: Path, tmp_path: Path
) -> None:
    built = [
        f"shards={{source: {pictures}, folder: built}}",
        "data.train=built/train",
        "data.validation=built/validation",
    ]
    findings = found(tmp_path, shards, *built)
    assert wrong(findings) == []
    assert findings[0] == Finding("ok", "shards", f"will be built from {pictures} into {tmp_path}/built")
    what = f"data.train: the chain builds the shards first, from {pictures}"
    assert Finding("ok", "pretrain", what) in findings
    # What a stage starts from is looked at all the same.
    checkpoint = save_trained(tmp_path / "runs/big/pretrain", 7)
    model = "model={name: coatnet_debug, depths: [1, 1, 2, 1]}"
    what = f"start_from: the raw weights in {checkpoint}, of stage pretrain of another run"
    assert Finding("ok", "pretrain", what) in found(tmp_path, shards, *built, "pretrain.start_from=runs/big", model)
    (other,) = wrong(found(tmp_path, shards, *built, "pretrain.start_from=runs/big"))
    assert "\n  blocks: 8 C1x8 C1x16 T2x32 T1x32 (stride 1) there" in other.what
    gone = found(tmp_path, shards, f"shards={{source: {tmp_path}/gone, folder: built}}", *built[1:])
    assert wrong(gone) == [
        Finding("error", "shards", f"shards.source: {tmp_path}/gone: no such file or folder", "correct it")
    ]
    # Built, they are looked at as any others, and must be those of the recipe.
    copytree(shards, tmp_path / "built")
    findings = found(tmp_path, shards, *built)
    assert the_finding(findings, "data.train: 45 samples")
    (other,) = wrong(findings)
    assert (other.level, other.where) == ("error", "shards")
    assert "\n  validation_per_class: the folder has 5, the recipe says 0" in other.what
    assert other.fix.startswith("Name another shards.folder to build them anew")
    as_built = [*built, "shards.samples_per_shard=7", "shards.validation_per_class=5"]
    findings = found(tmp_path, shards, *as_built)
    assert wrong(findings) == []
    assert findings[0].what == f"{tmp_path}/built was built from {pictures} with the settings of the recipe"
    (tmp_path / "built" / "build.json").unlink()
    (unknown,) = wrong(found(tmp_path, shards, *as_built))
    assert (unknown.level, unknown.where) == ("warning", "shards")
    assert unknown.fix == "leave the section shards out to use the folder as it is"
    shutil.rmtree(tmp_path / "built" / "train")
    (finding,) = wrong(found(tmp_path, shards, "data.train=built/train"))
    assert finding.what == f"{tmp_path}/built/train: no index.json there"


@pytest.mark.parametrize(("seconds", "level"), [(-3600.0, "warning"), (3600.0, "warning"), (0.0, "ok")])
def test_a_file_server_with_another_time_is_a_warning(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, level: str
) -> None:
    monkeypatch.setattr("pipeline.preflight.disk_space.probe_writing", lambda folder: time.time() + seconds)
    finding = the_finding(found(tmp_path, shards), "clock: ")
    assert finding.level == level
    if seconds:
        assert finding.what == f"clock: the file server of {tmp_path} and this machine differ by 3600 s"


def test_a_run_folder_with_other_settings_is_reported_and_one_with_the_same_continues(
    shards: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards))
    folder = run_folder(recipe, "pretrain")
    folder.create()
    folder.freeze(plan_stage(recipe, "pretrain"), None)
    folder.events.begin(2)
    assert (
        the_finding(found(tmp_path, shards), str(folder.path)).what
        == f"{folder.path}: continues a run with these settings"
    )
    (finding,) = wrong(found(tmp_path, shards, "seed=1"))
    assert finding.what == f"{folder.path} holds a run with other settings:\n  seed: 0 -> 1"
    assert finding.fix == (
        "Restore them, give the recipe another name, or remove the folder to start over; --extend cannot change this: "
        "seed: with another one the order of the samples could not go on from where it is"
    )
    folder.finish(stage_result("pretrain/checkpoints/step-00000040"))
    (folder.checkpoints / "step-00000040").mkdir()
    (folder.checkpoints / "step-00000040/manifest.json").touch()
    assert the_finding(found(tmp_path, shards), str(folder.path)).what == f"{folder.path}: done"


def test_versions_older_than_required_are_listed() -> None:
    asked = ["numpy>=999.1", "rich>=1", "surely-not-installed>=2", "ruff>=99; extra == 'development'"]
    assert unmet(asked) == [
        f"numpy {metadata.version('numpy')} is installed, 999.1 or newer is required",
        "surely-not-installed is not installed, 2 or newer is required",
    ]
    first, second = metadata.version("numpy").split(".")[:2]
    assert unmet([f"numpy>={first}.{second}", f"numpy>={first}"]) == []
    assert unmet([f"numpy>={first}.{int(second) + 1}"]) != []


def test_unmet_versions_are_errors(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["torch>=99"])
    (finding,) = wrong(found(tmp_path, shards))
    assert finding.what == f"version: torch {metadata.version('torch')} is installed, 99 or newer is required"


@pytest.mark.slow
def test_remote_shards_are_compared_with_the_cache_and_read_from_here(
    shards: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.put(shards, "doctor-shards")
    remote = [f"data.train={url}/train", f"data.validation={url}/validation"]
    cache = [f"data.cache.folder={tmp_path / 'cache'}", "data.cache.gigabytes=0.01"]
    findings = found(tmp_path, shards, *remote, *cache)
    assert wrong(findings) == []
    assert the_finding(findings, "data.cache.gigabytes: 0.01, and a node reads 0.0 GB at a time")
    assert the_finding(findings, f"data.cache.folder: {tmp_path / 'cache'} has room for ")
    (finding,) = wrong(found(tmp_path, shards, *remote, "data.cache.gigabytes=0.00001"))
    assert finding.what == "data.cache.gigabytes: 1e-05 is too little for the shards that a node needs at the same time"
    assert not (tmp_path / "cache").exists()
    # Of the ranks, only those of one node count.
    monkeypatch.setattr(SampleOrder, "greatest_need", lambda order, sizes, ranks, of_node, steps: of_node * 10**12)
    for nodes, need in ((1, "set it to 2000.1,"), (2, "set it to 1000.1,")):
        (finding,) = wrong(found(tmp_path, shards, *remote, f"resources.nodes={nodes}"))
        assert finding.fix.startswith(need)


@pytest.mark.slow
def test_a_remote_checkpoint_folder_is_tested_by_writing(
    shards: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = "pretrain.checkpoint.folder=s3://test/doctor"
    finding = the_finding(found(tmp_path, shards, there), "checkpoints: ")
    assert finding.level == "ok"
    assert finding.what.startswith("checkpoints: s3://test/doctor/test/pretrain can be written; at most 4 of 0.4 MB")
    assert [file for file in s3.files().find("test/doctor") if "writable" in file] == []
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "readonly")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "readonly")
    (finding,) = wrong(found(tmp_path, shards, there, "data.storage.give_up_after=29"))
    assert finding.what.startswith("s3://test/doctor/test/pretrain/.writable-")
    assert "access refused" in finding.what


@pytest.mark.slow
def test_a_server_that_is_down_does_not_delay_the_check(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.preflight._GIVE_UP_AFTER", 0.1)
    nobody = ["data.storage.endpoint=http://127.0.0.1:9", "data.storage.anonymous=true"]
    (finding,) = wrong(found(tmp_path, shards, "data.train=s3://test/nothing", *nobody))
    assert finding.what.startswith("s3://test/nothing/index.json: no answer in 0 s")
    assert finding.fix == "the server or the network is down; try again later"

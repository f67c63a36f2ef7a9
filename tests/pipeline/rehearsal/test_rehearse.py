"""The rehearsal of a stage: its samples, what would fail on the cluster, and the whole result."""

import io
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from data.files.json_records import to_json
from data.limits import RECORD_BYTES
from data.order import SampleOrder, Samples
from jobs.planning.rehearsal import show_rehearsal
from models.registry import create_model
from pipeline.checkpoints.manifest import MANIFEST, FileEntry, FragmentEntry, Manifest, rank_name, step_name
from pipeline.errors import ConfigError, RunFailed
from pipeline.plan import TrainPlan, plan_stage, required_cache_bytes
from pipeline.preflight.finding import Finding
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.rehearsal.checkpoint_layout import PlannedFile
from pipeline.rehearsal.cluster_checks import cluster_findings, on_ranks
from pipeline.rehearsal.record import Rehearsal
from pipeline.rehearsal.rehearse import _manifest_findings, default_ranks, rehearse
from pipeline.rehearsal.sample_shares import AssumedData, StageData
from pipeline.runs.run_folder import run_folder
from pipeline.training.training_batches import open_stream
from tests.support.recipes import write_recipe
from tests.support.records import checkpoint_facts

ASSUMED = AssumedData(samples=1000, classes=3, samples_per_shard=64, bytes_per_sample=2000, validation_samples=100)


def recipe(folder: Path, shards: Path, *overrides: str, **changes: Any) -> Recipe:
    return load_recipe(write_recipe(folder, shards, **changes), list(overrides))


def stage_of(loaded: Recipe) -> TrainStage:
    stage = loaded.stages["pretrain"]
    assert isinstance(stage, TrainStage)
    return stage


def plan_of(loaded: Recipe, ranks: int | None = None) -> TrainPlan:
    plan = plan_stage(loaded, "pretrain", ranks)
    assert isinstance(plan, TrainPlan)
    return plan


def errors(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.level == "error"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_are_the_samples_that_ranks_really_read(shards: Path, tmp_path: Path, ranks: int) -> None:
    plan = plan_of(recipe(tmp_path, shards), ranks)
    data = StageData.of_plan(plan)
    for rank in range(ranks):
        share = data.share(0, rank, ranks)
        with closing(open_stream(plan, rank, ranks, 0)) as stream:
            origins = [origin for _ in range(share.micro_batches) for origin in next(stream).origins]
        assert len(origins) == share.samples == 12 // ranks
        assert tuple(origin.id for origin in origins)[:4] == share.first_ids[: len(origins)]
        names = [plan.train.index.shards[number].name for number in share.shards]
        assert sorted({origin.shard for origin in origins}) == sorted(names)
        assert share.epochs == (0,)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_sample_of_the_first_and_the_last_step_is_read_once(shards: Path, tmp_path: Path, ranks: int) -> None:
    loaded = recipe(tmp_path, shards)
    for data in (StageData.of_plan(plan_of(loaded, ranks)), StageData.assumed(stage_of(loaded), 0, ASSUMED, "")):
        assert data.first_and_last == (0, 39)
        assert [data.check_seen_once(step, ranks) for step in data.first_and_last] == [12, 12]


def test_a_sample_that_two_ranks_read_is_an_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, real = StageData.of_plan(plan_of(recipe(tmp_path, shards))), SampleOrder.at

    def overlapping(of: SampleOrder, step: int, start: int, stop: int) -> Samples:
        return real(of, step, max(0, start - 1), max(0, start - 1) + stop - start)

    monkeypatch.setattr(SampleOrder, "at", overlapping)
    with pytest.raises(RunFailed, match="step 0 on 2 ranks: 12 samples are read, 11 of them different"):
        data.check_seen_once(0, 2)


def test_made_up_shards_have_the_assumed_samples(shards: Path, tmp_path: Path) -> None:
    data = StageData.assumed(stage_of(recipe(tmp_path, shards)), 0, ASSUMED, "")
    assert (data.facts.samples, data.facts.shards, data.facts.classes) == (1000, 16, 3)
    assert data.order.shard_samples.tolist() == [64] * 15 + [40]
    assert data.shard_bytes.sum() == data.facts.shard_bytes == 2_000_000
    assert data.validation.samples == 100


def test_the_need_of_a_cache_is_that_of_a_start(shards: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe(tmp_path, shards), 4)
    index = {part: replace(getattr(plan, part).index, folder="s3://bucket/there") for part in ("train", "validation")}
    remote = replace(plan, **{part: replace(getattr(plan, part), index=index[part]) for part in index})
    expected = required_cache_bytes(plan.stage, 4, remote.validation, remote)
    local = StageData.of_plan(plan).cache_need(4)
    assert local.bytes == expected > 0
    assert not local.remote
    assert StageData.of_plan(remote).cache_need(4) == replace(local, remote=True)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(3, "stage pretrain: 3 ranks do not divide the 4 micro-batches of a step"), (8, "8 ranks do not divide the 4")],
)
def test_ranks_that_a_start_refuses_are_refused_with_its_message(
    shards: Path, tmp_path: Path, ranks: int, message: str
) -> None:
    loaded = recipe(tmp_path, shards)
    with pytest.raises(ConfigError, match=message) as refused:
        rehearse(loaded, "pretrain", ranks)
    with pytest.raises(ConfigError) as started:
        plan_stage(loaded, "pretrain", ranks)
    assert str(refused.value) == str(started.value)


def test_ranks_that_do_not_fill_nodes_are_refused(shards: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, shards, resources={"nodes": 1, "ranks": 2}, batch={"global_size": 12, "micro_size": 1})
    with pytest.raises(ConfigError, match="nodes 2 does not divide ranks 3.*; rehearse a multiple of 2 ranks"):
        on_ranks(loaded, "pretrain", 3)
    resources = on_ranks(loaded, "pretrain", 12).stages["pretrain"].resources
    assert (resources.nodes, resources.ranks, resources.ranks_per_node) == (6, 12, 2)
    alone = on_ranks(loaded, "pretrain", 1).stages["pretrain"].resources
    assert (alone.nodes, alone.ranks) == (1, 1)


@pytest.mark.parametrize(
    ("stage", "message"), [("evaluate", "nothing of it to rehearse"), ("other", "has no stage other; its stages are")]
)
def test_a_stage_that_cannot_be_rehearsed_is_refused(shards: Path, tmp_path: Path, stage: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rehearse(recipe(tmp_path, shards), stage, 2)


def test_the_first_the_last_and_a_middle_rank_are_rehearsed_beside_those_given() -> None:
    assert default_ranks(512, [17, 0]) == (0, 17, 256, 511)
    assert default_ranks(1) == (0,)
    with pytest.raises(ConfigError, match="rank 512 is none of 512 ranks; they count from 0 to 511"):
        default_ranks(512, [512])


def test_missing_shards_are_an_error_and_a_warning_where_others_are_assumed(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, tmp_path / "nowhere")
    findings, plan = cluster_findings(loaded, "pretrain", None)
    assert plan is None
    assert any("nowhere/train: no index.json there" in what for what in errors(findings))
    findings, plan = cluster_findings(loaded, "pretrain", ASSUMED)
    assert plan is None
    assert errors(findings) == []
    warnings = [finding for finding in findings if finding.level == "warning" and "nowhere/train" in finding.what]
    assert [finding.fix.endswith("the rehearsal goes on with made-up shards") for finding in warnings] == [True]


def test_a_gpu_that_is_too_small_is_found(shards: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, shards, resources={"ranks": 2, "gpu_gigabytes": 0.001})
    assert [what.split(":")[0] for what in errors(cluster_findings(loaded, "pretrain", None)[0])] == ["memory"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "node", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port"),
        ({"MASTER_PORT": "many"}, "MASTER_PORT=many in the environment is not a whole number"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "node", "MASTER_PORT": "1234"},
            "resources.ranks is 2, and RANK=0 WORLD_SIZE=8 in the environment make this process one of 8",
        ),
        ({"RANK": "0"}, "the environment has no WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_what_the_environment_says_wrongly_of_where_ranks_meet_is_found(
    shards: Path, tmp_path: Path, variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (found,) = errors(cluster_findings(recipe(tmp_path, shards), "pretrain", None)[0])
    assert message in found


def test_a_place_that_cannot_be_written_is_found(shards: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, shards, checkpoint={"folder": "/proc/checkpoints"})
    (found,) = errors(cluster_findings(loaded, "pretrain", None)[0])
    assert found.startswith("checkpoints: /proc cannot be written")


def test_an_interface_that_is_not_there_is_found(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    (found,) = errors(cluster_findings(recipe(tmp_path, shards), "pretrain", None)[0])
    assert found.startswith("GLOO_SOCKET_IFNAME=ib7: there is no ib7")


def test_a_folder_of_another_recipe_is_found(shards: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, shards)
    run = run_folder(loaded, "pretrain")
    run.create()
    run.freeze(plan_of(loaded), None)
    assert errors(cluster_findings(loaded, "pretrain", None)[0]) == []
    changed = recipe(tmp_path, shards, "seed=7")
    assert any("seed: 0 -> 7" in what for what in errors(cluster_findings(changed, "pretrain", None)[0]))


def test_a_manifest_that_is_too_large_to_be_read_is_found() -> None:
    assert _manifest_findings("pretrain", PlannedFile(MANIFEST, RECORD_BYTES, 7 * 10**6)) == []
    (found,) = errors(_manifest_findings("pretrain", PlannedFile(MANIFEST, RECORD_BYTES + 1, 7 * 10**6)))
    assert "would have 1,073,741,825 bytes for 7,000,000 fragments, and none of more than 1,073,741,824" in found


def write_manifest(loaded: Recipe, step: int, ranks: int, classes: int) -> Path:
    """A checkpoint of the run that consists of its manifest, which is all that a rehearsal reads."""
    model = create_model("coatnet_debug", num_classes=classes, image_size=32, device="meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fragments = tuple(
        FragmentEntry(name, size * rank // ranks, size * (rank + 1) // ranks, f"{rank_name(rank)}.safetensors")
        for name, size in ((name, int(np.prod(shape))) for name, shape in shapes.items())
        for rank in range(ranks)
        if size * rank // ranks < size * (rank + 1) // ranks
    )
    names = ["buffers.safetensors", *(f"{rank_name(rank)}.safetensors" for rank in range(ranks))]
    files = {name: FileEntry(10**8, "0" * 64) for name in names}
    folder = run_folder(loaded, "pretrain").checkpoints / step_name(step)
    folder.mkdir(parents=True)
    manifest = Manifest(checkpoint_facts(step, world_size=ranks), shapes, fragments, files)
    (folder / MANIFEST).write_text(json.dumps(manifest.as_json()))
    return folder


def shown(found: Rehearsal) -> str:
    output = io.StringIO()
    show_rehearsal(found, Console(width=200, file=output))
    return output.getvalue()


@pytest.mark.slow(seconds=10)
def test_a_rehearsal_on_real_shards_with_a_reshape_that_is_refused(shards: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, shards, zero_stage=2)
    found = rehearse(loaded, "pretrain", 4, ranks=[1], reshape_to=3)
    assert [one.rank for one in found.rehearsed] == [0, 1, 2, 3]
    assert found.consistency.engines_as_computed == 4
    assert found.consistency.elements_owned_once == dict.fromkeys((0, 1, 2, 3), found.parameters)
    assert found.consistency.samples_seen_once == {0: 12, 39: 12}
    assert found.consistency.files_named_once == 4 + 2
    assert found.data is not None
    assert (found.data.assumed, found.data.samples, found.data.classes) == (False, 45, 3)
    assert [file.name for file in found.rehearsed[0].files] == [
        "rank-00000.safetensors", "buffers.safetensors", "classes.json", "manifest.json"
    ]  # fmt: skip
    (reshape,) = found.reshapes
    assert (reshape.made_up, reshape.from_ranks, reshape.to_ranks) == (True, 4, 3)
    with pytest.raises(ConfigError) as started:
        plan_stage(loaded, "pretrain", 3)
    assert reshape.refused == str(started.value)
    assert found.fails
    assert errors(list(found.findings)) == []
    content = json.loads(json.dumps(to_json(found)))
    assert content["rehearsed"][1]["partitions"][2]["zero_stage"] == 2
    text = shown(found)
    assert "a start on so many ranks fails: stage pretrain: 3 ranks do not divide the 4 micro-batches" in text
    assert "every one of the 12 samples of step 39 is read by exactly one rank" in text


@pytest.mark.slow(seconds=10)
def test_a_rehearsal_on_assumed_data_reads_the_newest_checkpoint_of_the_run(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, tmp_path / "nowhere", "zero_stage=3", "precision=bf16")
    write_manifest(loaded, 5, ranks=2, classes=3)
    newest = write_manifest(loaded, 10, ranks=3, classes=3)
    found = rehearse(loaded, "pretrain", 2, assumed=ASSUMED)
    (reshape,) = found.reshapes
    assert (reshape.source, reshape.made_up, reshape.from_ranks, reshape.to_ranks) == (str(newest), False, 3, 2)
    assert reshape.refused is None
    assert reshape.most_files == 3
    assert not found.fails
    assert any("made-up shards" in finding.fix for finding in found.findings)
    assert any(line.startswith("1,000 samples of 3 classes in shards of 64") for line in found.assumed)
    assert any("ZeRO 3 asks whether all ranks" in line for line in found.answered)
    assert f"2 ranks that read the checkpoint {newest}" in shown(found)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_a_finding_and_no_data_leaves_samples_out(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, tmp_path / "nowhere")
    write_manifest(loaded, 5, ranks=2, classes=4)
    found = rehearse(loaded, "pretrain", 1)
    assert (found.data, found.cache, found.rehearsed[0].steps, found.reshapes) == (None, None, (), ())
    assert any("a checkpoint of another model: head.classifier.bias has 4 elements" in what for what in errors(list(found.findings)))  # fmt: skip
    assert found.fails
    assert found.assumed == ("without shards the model has 1,000 classes",)
    shown(found)

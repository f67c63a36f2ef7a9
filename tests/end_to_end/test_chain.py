"""The whole chain of a recipe as a user runs it: pretrain, fine-tune at a larger size, evaluate, inspect."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.images.augment import EvaluationTransform
from data.images.decode import decode
from data.index import read_index
from data.shard import Shard
from models import load_pretrained
from models.coatnet import CoAtNet
from models.complexity import count_parameters
from models.variants import VARIANTS
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.host import this_host
from pipeline.plan import plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.runs.announcements import list_name
from pipeline.trained_model import open_trained_model
from pipeline.training.images import normalized
from pipeline.weights import build_model
from tests.support.command import coatnet, environment, wait_until
from tests.support.event_files import steps
from tests.support.ports import free_ports
from tests.support.recipes import checkpoint_bytes, events, scalars, write_recipe

pytestmark = pytest.mark.slow


def fill(model: CoAtNet, checkpoint: str | Path) -> None:
    """Load the raw weights and statistics of a checkpoint by their names alone."""
    found = open_checkpoint(checkpoint)
    model.load_state_dict(found.parameters("raw") | found.buffers("raw"))


@pytest.fixture(scope="module")
def chain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The recipe of a finished chain, and what the command printed."""
    recipe = write_recipe(tmp_path_factory.mktemp("chain"), shards)
    stage_folder(recipe, "pretrain").mkdir(parents=True)
    (stage_folder(recipe, "pretrain") / "histograms").touch()  # requests them
    done = coatnet("run", recipe, "finetune.log.histograms_every_steps=7", "evaluate.log.samples=true")
    assert done.returncode == 0, done.stderr
    return recipe, done.stdout


def stage_folder(recipe: Path, stage: str) -> Path:
    return recipe.parent / "runs" / "test" / stage


def test_the_output_shows_progress_and_ends_with_the_table(chain: tuple[Path, str]) -> None:
    lines = chain[1].splitlines()
    assert any("pretrain  step 40/40  loss " in line and " images/s  ETA 0:00:00" in line for line in lines)
    assert any("evaluate  " in line and "top-1" in line and "on 15 images" in line for line in lines)
    table = "\n".join(lines[-8:])
    for stage, count in (("pretrain", "40"), ("finetune", "6"), ("evaluate", "6")):
        row = next(line for line in table.splitlines() if stage in line and "│" in line)
        assert f" {count} │" in row
    assert "pretrain/checkpoints/step-00000040" in table


def test_a_start_names_settings_that_have_no_effect(chain: tuple[Path, str]) -> None:
    assert [line for line in chain[1].splitlines() if "warning: " in line] == [
        "finetune  warning: log.histograms_every_steps: 7 is longer than the stage's 6 steps, so there are no histograms",
        "evaluate  warning: log.samples: true has no effect, since the stage only evaluates",
    ]
    log = (stage_folder(chain[0], "finetune") / "logs/rank-00000.log").read_text()
    assert "finetune  warning: log.histograms_every_steps: 7 is longer" in log


def test_a_start_says_what_it_computes_where_and_how_to_watch_it(chain: tuple[Path, str]) -> None:
    lines = chain[1].splitlines()
    folder = os.path.relpath(stage_folder(chain[0], "finetune"))
    first = next(number for number, line in enumerate(lines) if line.startswith("finetune  "))
    assert lines[first : first + 2] == [
        f"finetune  2 ranks with 1 thread each on CPUs, rank 0 on a machine with {this_host().text}; coatnet_debug with "
        f"{count_parameters(VARIANTS['coatnet_debug'], 48, 3):,} parameters, 48 pixels, fp32",
        f"finetune  logs in {folder}/logs; curves with: coatnet tensorboard {folder}",
    ]


def test_a_run_folder_has_its_documented_files(chain: tuple[Path, str]) -> None:
    folder = stage_folder(chain[0], "pretrain")
    files = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
    assert {name.partition(".tfevents.")[0] for name in files} == {
        "recipe.yaml", "checkpoints", "validation", "events.jsonl", "logs", "progress.json", "result.json",
        "verified_shards", "events.out",
    }  # fmt: skip
    progress = json.loads((folder / "progress.json").read_text())
    assert (progress["step"], progress["steps"], progress["seconds_left"]) == (40, 40, 0.0)
    assert progress["loss"] == pytest.approx(scalars(folder, "train/loss")[40])  # TensorBoard has it in float32
    assert "step 40/40  loss" in (folder / "logs" / "rank-00000.log").read_text()
    assert (folder / "logs" / "rank-00001.log").exists()
    classes = json.loads((folder / "result.json").read_text())["classes"]
    assert {name: figures["samples"] for name, figures in classes.items()} == {"bright": 5, "dark": 5, "striped": 5}
    frozen = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (frozen["resolution"], frozen["optimizer"]["peak_learning_rate"]) == (32, 3e-3)
    names = [entry["event"] for entry in events(folder)]
    assert names[:2] == ["begin", "start"]
    assert names.count("save") == 8
    assert names[-2:] == ["evaluation", "finish"]
    # Two are kept by default.
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000035", "step-00000040"]


def test_a_run_is_opened_as_the_model_of_its_last_training_stage_with_the_names_of_its_classes(
    chain: tuple[Path, str],
) -> None:
    folder = stage_folder(chain[0], "finetune")
    with open_trained_model(str(folder.parent)) as trained:
        facts = trained.facts
    assert facts.source.resolved == str(folder / "checkpoints" / "step-00000006")
    assert (facts.classes, facts.loss, facts.remarks) == (("bright", "dark", "striped"), "softmax", ())
    assert (facts.preprocessing.image_size, facts.preprocessing.crop) == (48, "whole")


def fetch(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    """The answer of TensorBoard's server, empty until it is up."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/data/plugin/{path}",
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return {}


@pytest.fixture(scope="module")
def tensorboard(chain: tuple[Path, str]) -> Iterator[int]:
    """The port of a TensorBoard that has read all stages."""
    port = free_ports(1)[0]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(chain[0].parent / "runs"), "--host", "127.0.0.1",
         "--port", str(port)],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    trained, evaluated = ("pretrain", "finetune"), ("pretrain", "finetune", "evaluate")
    read = {*(f"test/{stage}" for stage in trained), *(f"test/{stage}/validation" for stage in evaluated)}
    try:
        wait_until(lambda: fetch(port, "scalars/tags").keys() == read, server)
        yield port
    finally:
        server.terminate()
        server.wait(30)


STAGES_OF_THE_MODEL = ("stem", "s1", "s2", "s3", "s4", "head", "all")
TRAIN_TAGS = {
    *(f"train/{name}" for name in ("loss", "learning_rate", "gradient_norm", "images_per_second", "samples")),
    "train/skipped_samples",
    *(f"{kind}/{stage}" for kind in ("weight_norm", "update_ratio") for stage in STAGES_OF_THE_MODEL),
    *(f"wall_time/step_p{share}_seconds" for share in (50, 90, 99)),
    *(f"wall_time/checkpoint_{part}_seconds" for part in ("stall", "write")),
    "wall_time/data_wait_share",
    *(
        f"wall_time_of_ranks/{kind}_{figure}"
        for kind in ("data_wait", "forward")
        for figure in ("largest_seconds", "median_seconds", "slowest_rank")
    ),
    "usage/host_gigabytes",
}
VALIDATION_TAGS = {f"validation/{name}" for name in ("top1", "top5", "loss")}


def test_tensorboard_serves_the_curves_and_the_images(tensorboard: int) -> None:
    tags = {run: set(tags) for run, tags in fetch(tensorboard, "scalars/tags").items()}
    assert tags["test/pretrain"] >= TRAIN_TAGS
    assert tags["test/finetune"] == tags["test/pretrain"]
    for stage in ("pretrain", "finetune", "evaluate"):
        assert tags[f"test/{stage}/validation"] == VALIDATION_TAGS
    pictures = fetch(tensorboard, "images/tags")
    assert [list(pictures[f"test/{stage}"]) for stage in ("pretrain", "finetune")] == [["train/images"]] * 2


def test_every_chart_of_the_layout_finds_its_curves(tensorboard: int) -> None:
    runs = fetch(tensorboard, "scalars/tags")
    tags = {*runs["test/pretrain"], *runs["test/pretrain/validation"]}
    # Only written on GPUs, after failures, or with cross-checks.
    tags |= {
        "train/mfu",
        "usage/device_allocated_gigabytes",
        "train/steps_not_applied",
        "verify/seconds",
        "verify/passed",
    }
    categories = fetch(tensorboard, "custom_scalars/layout")["category"]
    charts = {chart["title"]: chart["multiline"]["tag"] for category in categories for chart in category["chart"]}
    for title, patterns in charts.items():
        for pattern in patterns:
            assert any(re.match(pattern, tag) for tag in tags), (title, pattern)
    drawn = {tag for patterns in charts.values() for pattern in patterns for tag in tags if re.match(pattern, tag)}
    assert drawn == tags


def test_tensorboard_shows_settings_beside_results_and_no_run_but_the_stages(tensorboard: int) -> None:
    asked = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 9,
    }
    groups = fetch(tensorboard, "hparams/session_groups", asked)["sessionGroups"]
    rows = {group["hparams"]["stage"]: group for group in groups}
    assert rows.keys() == {"pretrain", "finetune", "evaluate"}
    assert (rows["pretrain"]["hparams"]["peak_learning_rate"], rows["finetune"]["hparams"]["resolution"]) == (3e-3, 48)
    results = {value["name"]["tag"]: value["value"] for value in rows["finetune"]["metricValues"]}
    assert results.keys() == VALIDATION_TAGS
    assert results["validation/top1"] > 0.6


def test_histograms_requested_by_a_file_cover_every_parameter_at_the_next_step(
    chain: tuple[Path, str], tensorboard: int
) -> None:
    folder = stage_folder(chain[0], "pretrain")
    assert not (folder / "histograms").exists()
    parameters = open_checkpoint(folder / "checkpoints/step-00000040").parameters()
    found = {tag: at for tag, at in steps(folder).items() if tag.startswith("weights/")}
    assert found == {f"weights/{name}": [2] for name in parameters}
    assert fetch(tensorboard, "histograms/tags")["test/pretrain"].keys() == found.keys()


def test_the_images_are_one_grid_of_the_first_micro_batch(chain: tuple[Path, str]) -> None:
    events = EventAccumulator(str(stage_folder(chain[0], "finetune")))
    events.Reload()
    (image,) = events.Images("train/images")
    pixels = decode(image.encoded_image_string)
    assert pixels.shape == (48 + 4, 8 * 50 + 2, 3)
    assert (pixels[0] == 255).all()


def test_fine_tuning_starts_from_the_pretrained_weights_with_resized_tables(
    chain: tuple[Path, str], shards: Path, tmp_path: Path
) -> None:
    """With a negligible learning rate, fine-tuning must leave the pretrained weights unchanged."""
    recipe = chain[0]
    copy = tmp_path / "chain"
    shutil.copytree(recipe.parent, copy)
    shutil.rmtree(copy / "runs/test/finetune")
    done = coatnet("train", copy / "recipe.yaml", "finetune", "optimizer.peak_learning_rate=1e-12", "finetune.steps=1")
    # The override also changes the settings of `pretrain`, whose run is not started here.
    assert done.returncode == 0, done.stderr
    before = open_checkpoint(stage_folder(recipe, "pretrain") / "checkpoints/step-00000040").parameters()
    after = open_checkpoint(copy / "runs/test/finetune/checkpoints/step-00000001").parameters()
    for name, tensor in after.items():
        if name.endswith("relative_bias.table"):
            assert (before[name].shape, tensor.shape) == ((2, 3, 3), (2, 5, 5))
            torch.testing.assert_close(tensor[:, 2, 2], before[name][:, 1, 1])
        else:
            torch.testing.assert_close(tensor, before[name])


def test_a_stage_says_what_it_takes_from_an_earlier_one(chain: tuple[Path, str]) -> None:
    lines = chain[1].splitlines()
    resized = "relative position tables are resized for 48 pixels: 2 from 3 x 3 to 5 x 5"
    start = "finetune  starts from the raw weights in pretrain/checkpoints/step-00000040, with new optimizer state"
    assert lines[lines.index(start) + 1].startswith("finetune  starts with the classifier of stage pretrain: ")
    assert lines[lines.index(start) + 2].startswith("finetune  weights taken  ")
    assert lines[lines.index(start) + 3] == f"finetune  weights resized      2  {resized}"
    evaluated = lines.index("evaluate  evaluates the raw weights in finetune/checkpoints/step-00000006")
    assert lines[evaluated + 1].startswith("evaluate  weights taken  ")
    assert "step 6/6" in lines[evaluated + 2]
    (entry,) = [e for e in events(stage_folder(chain[0], "finetune")) if e["event"] == "weights"]
    assert (entry["weights"], entry["classifier"], entry["checkpoint"]) == (
        "raw", "kept", "pretrain/checkpoints/step-00000040"
    )  # fmt: skip


def test_an_exported_model_gives_the_logits_of_its_checkpoint(chain: tuple[Path, str], tmp_path: Path) -> None:
    run, file = stage_folder(chain[0], "finetune"), tmp_path / "model.safetensors"
    done = coatnet("export", run, file)
    assert done.returncode == 0, done.stderr
    checkpoint = run / "checkpoints/step-00000006"
    classes = list_name(open_checkpoint(checkpoint).manifest.facts.run.digests.classes_digest)
    described = f"coatnet_debug, 3 classes ({classes}), 48 pixels; raw weights of {checkpoint}\n"
    assert done.stdout == f"{file}: safetensors, {file.stat().st_size / 1e6:.1f} MB; {described}"
    plain = build_model(plan_stage(load_recipe(chain[0]), "evaluate"))
    fill(plain, checkpoint)
    pictures = torch.randn(2, 48, 48, 3)
    assert torch.equal(load_pretrained(file)(pictures), plain.eval()(pictures))


def test_the_accuracy_is_that_of_the_final_weights(chain: tuple[Path, str]) -> None:
    """The evaluation stage against a plain loop over the images, one by one, without ranks or DeepSpeed."""
    recipe = load_recipe(chain[0])
    plan = plan_stage(recipe, "evaluate")
    model = build_model(plan)
    fill(model, stage_folder(chain[0], "finetune") / "checkpoints/step-00000006")
    model.eval()
    index = read_index(plan.stage.data.validation)
    transform, right = EvaluationTransform(48, "whole"), 0
    for number, entry in enumerate(index.shards):
        shard = Shard(Path(index.location(number)), index.image_fields, index.label.field, entry.samples)
        for place in range(entry.samples):
            sample = shard.read(place)
            pixels = transform(decode(sample.image))[None]
            with torch.no_grad():
                right += model(normalized(pixels, torch.device("cpu"), torch.float32)).argmax().item() == int(
                    sample.label
                )
    result = json.loads((stage_folder(chain[0], "evaluate") / "result.json").read_text())
    assert result["validation"]["top1"] == right / 15
    assert result["validation"]["samples"] == 15
    fine_tuned = json.loads((stage_folder(chain[0], "finetune") / "result.json").read_text())
    assert result["validation"] == fine_tuned["validation"]
    assert fine_tuned["samples"] == 6 * 12
    assert fine_tuned["validation"]["top1"] > 0.6  # the classes differ in brightness and pattern


def test_a_finished_chain_is_recognised_and_left_alone(chain: tuple[Path, str]) -> None:
    recipe = chain[0]
    final = stage_folder(recipe, "finetune") / "checkpoints/step-00000006"
    before = checkpoint_bytes(final)
    again = coatnet("run", recipe)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 3
    assert "finetune/checkpoints/step-00000006" in again.stdout
    assert checkpoint_bytes(final) == before


def test_logging_ranks_and_checkpointing_may_change_between_starts_but_not_the_learning_rate(
    chain: tuple[Path, str],
) -> None:
    recipe = chain[0]
    free = coatnet(
        "run",
        recipe,
        "log.every_steps=7",
        "resources.ranks=1",
        "checkpoint.every_steps=3",
        "activation_checkpointing=2",
    )
    assert free.returncode == 0, free.stderr
    refused = coatnet("run", recipe, "pretrain.optimizer.peak_learning_rate=4e-3")
    assert refused.returncode == 78
    assert "optimizer.peak_learning_rate: 0.003 -> 0.004" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_curves_of_a_finished_chain_have_every_step(chain: tuple[Path, str]) -> None:
    assert list(scalars(stage_folder(chain[0], "pretrain"), "train/loss")) == list(range(1, 41))


def test_a_chain_in_bf16_evaluates_what_it_trained(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    changes = ["precision=bf16", "zero_stage=1", "resources.ranks=1", "pretrain.steps=6", "finetune.steps=2"]
    done = coatnet("run", recipe, *changes)
    assert done.returncode == 0, done.stderr
    # DeepSpeed prints the memory in use while it builds this optimizer.
    assert "MA " not in done.stdout
    assert "MA " in (stage_folder(recipe, "pretrain") / "logs/rank-00000.log").read_text()
    trained, evaluated = (
        json.loads((stage_folder(recipe, stage) / "result.json").read_text()) for stage in ("finetune", "evaluate")
    )
    assert evaluated["validation"] == trained["validation"]
    buffers = open_checkpoint(stage_folder(recipe, "finetune") / "checkpoints/step-00000002").buffers()
    assert all(buffer.dtype == torch.float32 for buffer in buffers.values())

"""The commands in the pages that teach: each `sh` and `python` block is run in order, on small data, in the folder of its page."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import write_pictures, write_tar_of_tars
from tests.servers.slurm import SlurmCluster
from tests.support.command import coatnet, environment
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow(seconds=60)

SMALL = "model.name=coatnet_micro precision=fp32 batch.global_size=8 batch.micro_size=4 data.lanes=2 data.workers=1"
OWN_IMAGES = (
    f"{SMALL} resources.ranks=1 pretrain.epochs=1 pretrain.optimizer.warmup_epochs=0 finetune.epochs=1 "
    "pretrain.resolution=32 finetune.resolution=32 evaluate.resolution=32 finetune.batch.global_size=8 "
    "finetune.batch.micro_size=4 evaluate.batch.global_size=8 evaluate.batch.micro_size=4"
)
"""Overrides with which the recipe for one's own images ends soon on small data."""
IMAGENET = f"{SMALL} resources.nodes=1 resources.ranks=2 pretrain.optimizer.warmup_steps=20"


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks that are code: (`sh` or `python`, text)."""
    return re.findall(
        r"^```(sh|python)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE | re.DOTALL
    )


def follow(page: str, folder: Path, shorter: Mapping[str, str]) -> list[str]:
    """Run the blocks of a page in `folder`; returns the output of each `coatnet` command."""
    unused, outputs = set(shorter), []
    variables: dict[str, str] = {}
    for language, text in blocks(page):
        if language == "python":
            _run([sys.executable, "-c", text], folder, variables)
            continue
        if not all(line.startswith("coatnet ") for line in text.splitlines()):
            variables = _exported(text, folder, variables)
            continue
        for line in text.splitlines():
            added = [extra for command, extra in shorter.items() if line.startswith(command)]
            unused -= {command for command in shorter if line.startswith(command)}
            words = shlex.split(" ".join([line, *added]), comments=True)[1:]
            done = coatnet(*words, folder=folder, fresh=False, **variables)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            outputs.append(done.stdout)
    assert unused == set(), f"{page} has no such command"
    return outputs


def _exported(script: str, folder: Path, variables: dict[str, str]) -> dict[str, str]:
    """Run a script of bash, and return the variables that it exports."""
    shown = folder / ".environment"
    _run(["bash", "-euo", "pipefail", "-c", f"{script}\nenv -0 > {shlex.quote(str(shown))}"], folder, variables)
    found = dict(entry.split("=", 1) for entry in shown.read_text().split("\0") if entry)
    before = environment() | variables
    return dict(variables) | {
        name: value
        for name, value in found.items()
        if before.get(name) != value and name not in ("_", "SHLVL", "PWD", "OLDPWD")
    }


def _run(command: list[str], folder: Path, variables: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment() | variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"


@pytest.fixture
def page_folder(tmp_path: Path) -> Path:
    """A working directory whose name needs no quotes."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_ones_own_images_from_a_folder_to_predictions(page_folder: Path) -> None:
    write_pictures(page_folder / "my_images", per_class=20)
    outputs = follow("own-images.md", page_folder, {"coatnet doctor": OWN_IMAGES, "coatnet run": OWN_IMAGES})
    assert any("probability" in output and "striped" in output for output in outputs)
    for file in (
        "predictions.png",
        "evaluation/confusion.png",
        "runs/own_images/report.html",
        "my_model/config.json",
        "my_timm_model/config.json",
    ):
        assert (page_folder / file).stat().st_size > 0
    by_recipe = coatnet("predict", "own_images.yaml", "my_images/dark/0000.jpg", folder=page_folder)
    assert by_recipe.returncode == 0, by_recipe.stderr
    by_recipe = coatnet("evaluate", "own_images.yaml", "shards/validation", folder=page_folder)
    assert by_recipe.returncode == 0, by_recipe.stderr
    assert (page_folder / "runs/own_images/finetune/evaluations/validation/evaluation.json").exists()


def test_operating_a_run(page_folder: Path) -> None:
    write_pictures(page_folder / "my_images", per_class=20)
    assert (
        coatnet("shards", "build", "my_images", "shards", "--validation-per-class", "5", folder=page_folder).returncode
        == 0
    )
    assert coatnet("recipes", "copy", "own_images", folder=page_folder).returncode == 0
    run = coatnet("run", "own_images.yaml", *OWN_IMAGES.split(), folder=page_folder)
    assert run.returncode == 0, run.stderr
    status, logs, checkpoints = follow("operating.md", page_folder, {})
    assert "finetune" in status
    assert "newest" in checkpoints
    assert logs


def test_the_messages_in_the_guide_to_operating_are_those_of_the_program() -> None:
    code = "".join(
        file.read_text() for folder in ("data", "pipeline", "jobs") for file in (ROOT / folder).rglob("*.py")
    )
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts that continue on the next line
    text = (ROOT / "docs/operating.md").read_text()
    rows = text.partition("| message | cause |")[2].partition("\n\n")[0].splitlines()[2:]
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(messages) > 15
    assert [message for message in messages if message not in code] == []


def test_adapting_to_a_site(page_folder: Path, slurm: SlurmCluster) -> None:
    write_pictures(page_folder / "my_images", per_class=20)
    assert (
        coatnet("shards", "build", "my_images", "shards", "--validation-per-class", "5", folder=page_folder).returncode
        == 0
    )
    _, script = follow("site.md", page_folder, {"coatnet submit own_images.yaml": OWN_IMAGES})
    assert "--partition=main" in script
    assert "--time=1:00:00" in script


def test_imagenet21k_to_a_chain_of_jobs(page_folder: Path, slurm: SlurmCluster) -> None:
    pictures = write_pictures(page_folder / "source" / "pictures", per_class=20)
    for name in ("fall11_whole.tar", "ILSVRC2012_img_train.tar"):
        write_tar_of_tars(pictures, page_folder / name)
    files = sorted(pictures.rglob("*.jpg"))[::4]
    (page_folder / "flat").mkdir()
    for number, file in enumerate(files):
        shutil.copy(file, page_folder / "flat" / f"ILSVRC2012_val_{number:08d}.JPEG")
    subprocess.run(["tar", "cf", "ILSVRC2012_img_val.tar", "-C", "flat", "."], cwd=page_folder, check=True)
    labels = [f"ILSVRC2012_val_{number:08d}.JPEG {file.parent.name}\n" for number, file in enumerate(files)]
    (page_folder / "val_labels.txt").write_text("".join(labels))
    small = f"{IMAGENET} resources.partition=main"
    outputs = follow(
        "imagenet21k.md",
        page_folder,
        {
            "coatnet shards build fall11": "--validation-fraction 0.25",
            "coatnet doctor": small,
            "coatnet submit": f"{small} --dry-run",
        },
    )
    assert any("sbatch" in output for output in outputs)


@pytest.mark.parametrize("file", ["Dockerfile", "apptainer.def"])
def test_container_definitions_copy_what_exists_and_install_the_tested_versions(file: str) -> None:
    text = (ROOT / "slurm" / file).read_text()
    copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) or re.findall(
        r"^ {4}(\S+) /opt/coatnet/", text, re.MULTILINE
    )
    names = {name for line in copied for name in line.split()}
    assert {name for name in names if not (ROOT / name).exists()} == set()
    assert {"constraints.txt", "pyproject.toml", "data", "jobs", "models", "pipeline", "benchmarks", "slurm"} <= names
    assert re.findall(r"pip install .*-c constraints.txt (\S+)", text) == ["torch", "."]

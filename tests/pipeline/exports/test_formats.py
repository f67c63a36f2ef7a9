"""Exports in every format, loaded as docs/using-the-model.md says, against the model that they were made of."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from models import load_pretrained
from models.pretrained import CITATION
from pipeline.errors import ConfigError
from pipeline.exports import formats
from pipeline.exports.export import ExportReport, export
from pipeline.trained_model import open_trained_model
from pipeline.training.images import imagenet_preprocessing
from tests.support.command import environment
from tests.support.paths import ROOT
from tests.support.timm_import import timm
from tests.support.trained import CLASSES, assert_same_model, save_trained, trained_model

pytestmark = pytest.mark.slow(seconds=30)

MODEL: dict[str, Any] = {
    "name": "coatnet_0", "num_classes": 3, "image_size": 64, "depths": [1, 1, 2, 1], "widths": [16, 16, 32, 64, 64],
    "weight_std": None,
}  # fmt: skip
OUTPUTS = ("model", "model.safetensors", "model-timm", "model.onnx", "model.pt2")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ExportReport]]:
    """A folder with an export of one model in every format, and what was reported of each."""
    folder = tmp_path_factory.mktemp("exported")
    run = folder / "runs" / "pretrain"
    save_trained(run, 5, model=MODEL, preprocessing=imagenet_preprocessing(64, "center"))
    (folder / "names.txt").write_text("tench tench, Tinca tinca\ngoldfish\tgoldfish, Carassius auratus\nn99 mole\n")
    names = folder / "names.txt"
    reports = {
        name: export(str(run), folder / name, wanted="timm" if name == "model-timm" else None, names=names)
        for name in OUTPUTS
    }
    Image.radial_gradient("L").resize((90, 70)).convert("RGB").save(folder / "image.jpg")
    return folder, reports


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 64, 64, 3, generator=torch.Generator().manual_seed(count))


def test_safetensors_give_the_model_to_the_bit(exported: tuple[Path, dict[str, ExportReport]]) -> None:
    folder, _ = exported
    for name in ("model", "model.safetensors"):
        assert_same_model(load_pretrained(folder / name), trained_model(5, **MODEL), images())
        with open_trained_model(str(folder / name)) as trained:
            assert_same_model(trained.build("cpu"), trained_model(5, **MODEL), images())


def test_every_export_has_the_facts_of_the_model(exported: tuple[Path, dict[str, ExportReport]]) -> None:
    folder, reports = exported
    facts = open_trained_model(str(folder / "runs")).facts
    for name in ("model", "model.safetensors"):
        read = open_trained_model(str(folder / name)).facts
        for field in ("arguments", "classes", "preprocessing", "loss", "weights", "step", "samples", "run_id", "stage"):
            assert getattr(read, field) == getattr(facts, field)
        assert (read.recipe_digest, read.classes_digest) == (facts.recipe_digest, facts.classes_digest)
        assert read.display_names == ("tench, Tinca tinca", "goldfish, Carassius auratus", CLASSES[2])
    config = json.loads((folder / "model" / "config.json").read_text())
    assert (config["citation"], config["training"]["source"]) == (CITATION, facts.source.resolved)
    extra_files = {"config.json": ""}
    torch.export.load(str(folder / "model.pt2"), extra_files=extra_files)
    assert json.loads(extra_files["config.json"]) == config
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["config"]) == config
    for report in reports.values():
        assert report.remarks == (
            f"{folder / 'names.txt'}: has no name for 1 of the 3 classes, which keeps its own ({CLASSES[2]})",
            f"{folder / 'names.txt'}: 1 of its lines names no class (n99)",
        )


def test_plain_timm_loads_its_folder_with_equal_logits(exported: tuple[Path, dict[str, ExportReport]]) -> None:
    folder, _ = exported
    theirs = timm.create_model(f"local-dir:{folder / 'model-timm'}", pretrained=True).eval()
    with torch.no_grad():
        logits = trained_model(5, **MODEL)(images())
        assert (theirs(images().permute(0, 3, 1, 2)) - logits).abs().max() < 1e-5
    assert logits.std(dim=0).min() > 1e-3
    config = json.loads((folder / "model-timm" / "config.json").read_text())
    assert (config["label_names"], config["num_classes"]) == (list(CLASSES), 3)
    assert config["label_descriptions"]["tench"] == "tench, Tinca tinca"
    found = timm.data.resolve_model_data_config(theirs)
    assert (found["input_size"], found["interpolation"], found["crop_mode"]) == ((3, 64, 64), "bilinear", "center")
    assert (list(found["mean"]), list(found["std"])) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert found["crop_pct"] == pytest.approx(64 / 96)


def test_onnx_and_torch_programs_were_compared_and_take_any_batch(
    exported: tuple[Path, dict[str, ExportReport]],
) -> None:
    import onnxruntime

    folder, reports = exported
    assert reports["model.pt2"].difference == 0.0
    difference = reports["model.onnx"].difference
    assert difference is not None
    assert difference < 1e-5
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    program = torch.export.load(str(folder / "model.pt2")).module()
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("images", ["batch", 64, 64, 3])]
    model = trained_model(5, **MODEL)
    for count in (1, 2, 7):
        with torch.no_grad():
            logits = model(images(count))
            assert torch.equal(program(images(count)), logits)
        (found,) = session.run(None, {"images": images(count).numpy()})
        assert (torch.from_numpy(found) - logits).abs().max() < 1e-5


def test_the_documented_code_runs_and_its_programs_agree(
    exported: tuple[Path, dict[str, ExportReport]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, in one namespace, as in a notebook."""
    monkeypatch.chdir(exported[0])
    text = (ROOT / "docs" / "using-the-model.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    names: dict[str, Any] = {}
    logits = {}
    for section in sections:
        code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
        exec(code, names)  # noqa: S102 (our own documentation)
        logits[section.partition("\n")[0]] = torch.as_tensor(names["logits"])
    ours, by_timm, by_onnx, by_torch = logits.values()
    assert torch.equal(ours, by_torch)
    assert (ours - by_onnx).abs().max() < 1e-5
    assert (ours - by_timm).abs().max() < 0.1 * ours.std()  # which resizes before it crops
    assert names["classes"] == list(CLASSES)
    assert capsys.readouterr().out.count("%  ") == 3


def test_loading_imports_neither_deepspeed_nor_anything_else_that_trains(
    exported: tuple[Path, dict[str, ExportReport]],
) -> None:
    code = (
        "import sys; from models import load_pretrained; model = load_pretrained(sys.argv[1]); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    run = [sys.executable, "-c", code, str(exported[0] / "model")]
    loaded = subprocess.run(run, env=environment(), capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "safetensors", "models"} <= set(loaded)
    assert not set(loaded) & {
        "data", "pipeline", "jobs", "deepspeed", "pydantic", "webdataset", "fsspec", "cv2", "PIL", "rich", "typer",
        "tensorboard", "yaml", "timm", "onnx",
    }  # fmt: skip


def test_weights_too_large_for_one_onnx_file_are_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(formats, "_PROTOBUF_BYTES", 1000)
    save_trained(tmp_path / "pretrain", 5)
    report = export(str(tmp_path / "pretrain"), tmp_path / "model.onnx")
    assert report.bytes == sum((tmp_path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    x_BHWC = torch.randn(1, 32, 32, 3)
    with torch.no_grad():
        logits = trained_model(5)(x_BHWC)
    (found,) = session.run(None, {"images": x_BHWC.numpy()})
    assert (torch.from_numpy(found) - logits).abs().max() < 1e-5


def test_an_onnx_file_that_cannot_be_checked_says_so_and_one_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    save_trained(tmp_path / "pretrain", 5)

    def without(*missing: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in missing else find_spec(n))

    without("onnxscript")
    with pytest.raises(ConfigError, match="--format onnx: needs onnxscript, which is not installed: pip install onnx"):
        export(str(tmp_path / "pretrain"), tmp_path / "model.onnx")
    without("onnxruntime")
    report = export(str(tmp_path / "pretrain"), tmp_path / "model.onnx")
    assert (report.difference, report.compared_by) == (None, "onnxruntime")

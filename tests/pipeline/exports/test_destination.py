"""What the name of an export means, and what it may replace."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from models.pretrained import load_pretrained
from pipeline.errors import ConfigError
from pipeline.exports.destination import export_format, publication
from pipeline.exports.export import export
from tests.support.trained import save_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run folder of a trained stage."""
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    save_trained(folder, 5)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "wanted", "found"),
    [
        ("model", None, "safetensors"),
        ("model-v1.2", None, "safetensors"),
        ("model.safetensors", None, "safetensors"),
        ("model.ONNX", None, "onnx"),
        ("model.pt2", None, "torch"),
        ("model.pt2", "torch", "torch"),
        ("model", "timm", "timm"),
    ],
)
def test_the_format_follows_from_the_name(name: str, wanted: object, found: str) -> None:
    assert export_format(Path(name), wanted) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "wanted", "reason"),
    [
        (
            "m.onnx",
            "safetensors",
            "--format safetensors writes a folder or a .safetensors file, not .onnx, which is --format onnx",
        ),
        ("m.safetensors", "timm", "--format timm writes a folder, not .safetensors, which is --format safetensors"),
        ("m.pt2", "onnx", "--format onnx writes an .onnx file, not .pt2, which is --format torch; change one of them"),
        ("m", "onnx", "--format onnx writes an .onnx file, not a name without a suffix; change one of them"),
        ("m.pth", None, "--format safetensors writes a folder or a .safetensors file, not .pth; change one of them"),
    ],
)
def test_a_name_that_contradicts_the_format_is_refused(name: str, wanted: object, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        export_format(Path(name), wanted)  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"{name}: {reason}")


def test_an_export_replaces_an_export_and_nothing_else(run: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        export(run, out)
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert load_pretrained(out).num_classes == 3
    (out / "notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"out: a folder with other files than those of an export \(notes.txt\), which"
    ):
        export(run, out)
    (out / "notes.txt").unlink()
    (out / "config.json").write_text('{"architecture": "another program\'s"}')
    with pytest.raises(ConfigError, match=r"other files than those of an export \(config.json, model.safetensors\)"):
        export(run, out)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file: a file, and --format safetensors writes a folder"):
        export(run, tmp_path / "file")
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(ConfigError, match="out.safetensors: a folder, and the export is one file"):
        export(run, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "out.safetensors"]


def test_what_fails_while_it_is_written_leaves_what_was_there(run: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def write_until_the_disk_is_full() -> None:
        with publication(out, folder=True) as new:
            (new / "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="out: cannot be written .*No space left"):
        write_until_the_disk_is_full()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_says_what_was_written_and_what_does_not_match(run: str, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("tench the tench\nn02 other\n")
    done = CliRunner().invoke(app, ["export", run, str(tmp_path / "out"), "--names", str(names)])
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert "has no name for 2 of the 3 classes, which keep their own (goldfish, [red]shark[/])" in text
    assert "1 of its lines names no class (n02)" in text
    assert f"{tmp_path / 'out'}: safetensors, 0." in text
    refused = CliRunner().invoke(app, ["export", run, str(tmp_path / "x"), "--format", "timm"])
    assert refused.exit_code == 78
    assert "timm cannot express coatnet_debug: its stage S4 does not stride" in " ".join(refused.stderr.split())
    assert not (tmp_path / "x").exists()


def test_a_recipe_means_the_run_that_it_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["recipes", "copy", "own_images"])
    assert done.exit_code == 0, done.output
    refused = CliRunner().invoke(app, ["export", "own_images.yaml", "out"])
    assert refused.exit_code == 78
    assert (
        f"own_images.yaml: has not run yet ({tmp_path}/runs/own_images does not exist); run it first" in refused.stderr
    )
    save_trained(tmp_path / "runs" / "own_images" / "pretrain", 5)
    done = CliRunner().invoke(app, ["export", "own_images.yaml", "out"])
    assert done.exit_code == 0, done.output
    assert f"raw weights of {tmp_path}/runs/own_images/pretrain/checkpoints/step-00000005" in " ".join(
        done.stdout.split()
    )

"""`coatnet predict` on the command line."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from data.images.contact_sheet import sheet_size
from jobs.cli import app
from jobs.predictions import CSV_COLUMNS, PICTURE_CELL
from models.pretrained import config_of
from pipeline.trained_model import open_trained_model
from tests.support.command import coatnet
from tests.support.paths import ROOT
from tests.support.recipes import write_recipe
from tests.support.third_party import picture
from tests.support.trained import MODEL, save_trained

CLASSES = ("bright", "dark", "striped")
HOSTILE = ("\x1b[2Jtench", "[red]shark[/]", 'cat\u202eff\n,"x"')


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a stage that was trained for the classes of the pictures."""
    folder = tmp_path_factory.mktemp("run") / "pretrain"
    save_trained(folder, 5, averaged=True, classes=CLASSES)
    return folder


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images, one of them damaged, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture(0))
    (folder / "b.jpg").write_bytes(picture(1, size=(90, 60))[:-50])
    (folder / "c.png").write_bytes(picture(2, "PNG"))
    (folder / "notes.txt").write_text("x")
    return folder


def predict(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def rows(result: Result) -> list[list[str]]:
    """The words of the lines of a table, without those that are empty or drawn."""
    return [line.split() for line in result.stdout.splitlines() if line.strip(" ─")]


def test_a_table_has_the_best_classes_of_each_image(run: Path, images: Path) -> None:
    (images / "b.jpg").unlink()
    result = predict(run, "in", "-k", "2")
    assert result.exit_code == 0, result.stderr
    found = rows(result)
    assert found[0] == ["image", "rank", "class", "probability"]
    assert [row[:-2] for row in found[1:]] == [
        ["in/a.jpg", "1", found[1][2]],
        ["2", found[2][1]],
        ["in/c.png", "1", found[3][2]],
        ["2", found[4][1]],
    ]
    assert {found[1][2], found[2][1]} <= set(CLASSES)
    assert float(found[1][-2]) >= float(found[2][-2])
    assert result.stderr.splitlines() == [
        "left out: 1 not an image (.txt) (in/notes.txt)",
        f"coatnet_debug, moving average after step 5, {run}/checkpoints/step-00000005; 3 classes, 32 x 32 pixels "
        "(whole image), CPU",
        "scores are by softmax: the probabilities of all classes add up to 1",
    ]


def test_images_that_cannot_be_read_are_named_and_the_others_written_to_every_file(run: Path, images: Path) -> None:
    result = predict(run, "in", "gone.jpg", "--json", "out.json", "--csv", "out.csv", "--picture", "out.png", "-k", "9")
    assert result.exit_code == 78
    reason = "damaged: Premature end of JPEG file"
    assert result.stderr.splitlines()[3:] == [
        "--top 9: the model has 3 classes; all are shown",
        f"warning: in/b.jpg: {reason}",
        "warning: gone.jpg: no such file",
        "out.png: 4 images",
        "error: 2 of 4 images could not be read and are named above with the reason; the others are classified",
    ]
    assert ["in/b.jpg", *reason.split()] in rows(result)
    content = json.loads((images.parent / "out.json").read_text())
    assert content["unreadable"] == [
        {"image": "in/b.jpg", "problem": reason},
        {"image": "gone.jpg", "problem": "no such file"},
    ]
    assert [image["image"] for image in content["images"]] == ["in/a.jpg", "in/c.png"]
    table = list(csv.DictReader((images.parent / "out.csv").open()))
    assert tuple(table[0]) == CSV_COLUMNS
    assert [(row["image"], row["rank"], row["problem"]) for row in table] == [
        *(("in/a.jpg", str(rank), "") for rank in (1, 2, 3)),
        ("in/b.jpg", "", reason),
        *(("in/c.png", str(rank), "") for rank in (1, 2, 3)),
        ("gone.jpg", "", "no such file"),
    ]
    for image in content["images"]:
        same = [row for row in table if row["image"] == image["image"]]
        for prediction, row in zip(image["predictions"], same, strict=True):
            assert (prediction["class"], prediction["score"]) == (row["class"], float(row["score"]))
            assert CLASSES[prediction["class_number"]] == prediction["class"]
    with Image.open("out.png") as sheet:
        assert (sheet.format, sheet.size) == ("PNG", sheet_size(4, 1, PICTURE_CELL, lines=4))


def test_a_long_reason_is_whole_in_its_warning_and_cut_in_the_table(run: Path, images: Path) -> None:
    place = "http://127.0.0.1:1/x.jpg"
    result = predict(run, "in/a.jpg", place, "--give-up-after", "0")
    assert result.exit_code == 75
    warning = next(line for line in result.stderr.splitlines() if line.startswith(f"warning: {place}: "))
    reason = warning.removeprefix(f"warning: {place}: ")
    assert reason.endswith("; the server or the network is down")
    assert result.stderr.splitlines()[-1].endswith("the others are classified; the same command starts over")
    shown = next(line for line in result.stdout.splitlines() if place in line).split(place)[1].strip()
    assert shown == f"{reason[:59].rstrip()}…"


def test_every_key_and_column_is_documented(run: Path, images: Path) -> None:
    content = json.loads(predict(run, "in/a.jpg", "--json", "-").stdout)
    document = (ROOT / "docs" / "predict.md").read_text()

    def keys(value: Any) -> set[str]:
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return (set(value) if isinstance(value, dict) else set()).union(*map(keys, values))

    assert len(keys(content)) > 15
    assert [name for name in sorted(keys(content) | set(CSV_COLUMNS)) if f"`{name}`" not in document] == []


def test_labels_of_shards_are_shown_beside_the_classes_and_counted(run: Path, shards: Path) -> None:
    result = predict(run, shards / "validation", "-k", "1", "--csv", "-")
    assert result.exit_code == 0, result.stderr
    table = list(csv.DictReader(io.StringIO(result.stdout)))
    right = sum(row["class"] == row["labels"] for row in table)
    assert {row["labels"] for row in table} == set(CLASSES)
    assert result.stderr.splitlines()[-1] == f"top-1 {right / 15:.2%}  top-5 100.00%  on 15 labelled images"
    found = rows(predict(run, shards / "validation", "-k", "1"))
    assert found[0] == ["image", "label", "rank", "class", "probability"]
    assert {row[-5] for row in found[1:]} == set(CLASSES)


def test_the_first_images_are_shown_where_a_file_has_all(run: Path, pictures: Path, tmp_path: Path) -> None:
    result = predict(run, pictures, "-k", "1", "--csv", tmp_path / "all.csv")
    assert (len(rows(result)), len((tmp_path / "all.csv").read_text().splitlines())) == (21, 61)
    assert result.stderr.splitlines()[-1] == f"40 more images are in {tmp_path}/all.csv"
    assert len(rows(predict(run, pictures, "-k", "1"))) == 61


def test_names_for_people_are_taken_from_synsets_and_their_words(images: Path, tmp_path: Path) -> None:
    save_trained(tmp_path / "named", 5, classes=("n01440764", "n01443537", "n02012849"))
    (tmp_path / "words.txt").write_text("n02012849 crane\nn01443537 goldfish\nn01440764 tench, Tinca tinca\n")
    arguments = ("named", "in/a.jpg", "--names", "words.txt")
    assert "tench, Tinca tinca (n01440764)" in predict(*arguments).stdout
    content = json.loads(predict(*arguments, "--json", "-").stdout)
    assert {one["class"]: one["name"] for one in content["images"][0]["predictions"]} == {
        "n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n02012849": "crane",
    }  # fmt: skip
    (tmp_path / "words.txt").write_text("n01440764 tench\nn03126707 crane\n")
    some = predict(*arguments)
    assert "words.txt: has no name for 2 of the 3 classes, which keep their own (n01443537, n02012849)" in some.stderr
    assert "words.txt: 1 of its lines names no class (n03126707)" in some.stderr
    (tmp_path / "words.txt").write_text("tench\ngoldfish\n")
    refused = predict(*arguments)
    assert (refused.exit_code, refused.stdout) == (78, "")
    assert "words.txt: line 1 is 'tench'; lines must be a class and its name" in refused.stderr


def test_names_for_people_need_the_models_own(images: Path, tmp_path: Path) -> None:
    save_trained(tmp_path / "nameless", 5, classes=None)
    (tmp_path / "words.txt").write_text("a b\n")
    result = predict("nameless", "in/a.jpg", "--names", "words.txt")
    assert result.exit_code == 78
    assert (
        "--names words.txt: the model's own names of its classes, which its lines need, are not known" in result.stderr
    )
    result = predict("nameless", "in/a.jpg")
    assert "warning: the names of the model's classes are not known; their numbers are shown" in result.stderr
    assert "class 2" in result.stdout


def test_an_exported_model_predicts_the_same_with_the_names_that_it_brings(run: Path, images: Path) -> None:
    folder = images.parent / "exported"
    folder.mkdir()
    with open_trained_model(str(run)) as trained:
        facts = replace(trained.facts, display_names=("Bright", "Dark", "Striped"))
        save_file(trained.parameters() | trained.buffers(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(facts)))
    of_run, exported = (
        json.loads(predict(model, "in/a.jpg", "--json", "-").stdout)["images"][0]["predictions"]
        for model in (run, folder)
    )
    assert exported == [one | {"name": one["class"].capitalize()} for one in of_run]


def test_a_model_without_a_classifier_is_refused(images: Path, tmp_path: Path) -> None:
    save_trained(tmp_path / "features", 5, classes=None, model=MODEL | {"num_classes": 0})
    result = predict("features", "in/a.jpg")
    assert (result.exit_code, result.stdout) == (78, "")
    assert "step-00000005: the model has no classifier" in result.stderr


def test_names_of_classes_and_files_are_shown_with_escapes_and_are_exact_in_json(images: Path, tmp_path: Path) -> None:
    save_trained(tmp_path / "hostile", 5, classes=HOSTILE)
    name = "\x1b[31m[bold]\u202e.jpg"
    (images / name).write_bytes(picture(1))
    (images / "b.jpg").unlink()
    result = predict("hostile", "in", "--csv", "out.csv", "--picture", "out.png")
    assert result.exit_code == 0, result.stderr
    written = (tmp_path / "out.csv").read_text()
    for text in (result.stdout, result.stderr, written):
        assert not {"\x1b", "\u202e"} & set(text)
    for shown in ("\\x1b[2Jtench", "[red]shark[/]", 'cat\\u202eff\\n,"x"', "in/\\x1b[31m[bold]\\u202e.jpg"):
        assert shown in result.stdout
    assert {row["class"] for row in csv.DictReader(io.StringIO(written))} == {
        "\\x1b[2Jtench", "[red]shark[/]", 'cat\\u202eff\\n,"x"',
    }  # fmt: skip
    printed = predict("hostile", "in", "--json", "-").stdout
    assert printed.isascii()
    content = json.loads(printed)
    assert content["images"][0]["image"] == f"in/{name}"
    assert {one["class"] for one in content["images"][0]["predictions"]} == set(HOSTILE)


def test_other_sizes_crops_and_orientations_are_said(run: Path, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(
        tmp_path / "a.jpg", exif=turned
    )
    result = predict(run, tmp_path / "a.jpg", "--image-size", "64", "--crop", "center", "--weights", "raw")
    assert result.exit_code == 0, result.stderr
    assert "raw weights after step 5" in result.stderr
    assert result.stderr.splitlines()[1:] == [
        "scores are by softmax: the probabilities of all classes add up to 1",
        "the model was trained at 32 pixels; its relative position tables are resized for 64",
        "evaluations of the model use --crop whole",
        "1 image has an EXIF orientation, which is ignored as in training; to classify them upright, turn their pixels",
    ]
    default = json.loads(predict(run, tmp_path / "a.jpg", "--json", "-").stdout)
    assert (default["image_size"], default["crop"], default["images"][0]["turned"]) == (32, "whole", True)


def test_scores_of_a_sigmoid_are_said_to_be_independent(images: Path, tmp_path: Path) -> None:
    save_trained(tmp_path / "sigmoid", 5, loss="sigmoid")
    result = predict("sigmoid", "in/a.jpg", "--json", "-")
    assert "scores are by sigmoid: the probability of each class for itself" in result.stderr
    assert json.loads(result.stdout)["scores"] == "sigmoid"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("in", "--picture", "sheet.jpg"),
            "--picture sheet.jpg: takes the file to write; give a name that ends in .png",
        ),
        (
            ("in", "--json", "in/a.jpg"),
            "--json in/a.jpg: takes the file to write; give a name that ends in .json, or - for",
        ),
        (("in", "--csv", "/dev/null"), "--csv /dev/null: takes the file to write"),
        (("in", "--picture", "in/c.png"), "--picture in/c.png: is one of the images to classify; give another file"),
        (("in", "--json", "none/x.json"), "--json none/x.json: no folder none; create it first"),
        (("in", "--json", "-", "--csv", "-"), "--csv -: --json writes to standard output, too"),
        (("in", "--csv", "folder.csv"), "--csv folder.csv: not a regular file; give another name"),
        (("nowhere",), "nowhere: no such file or folder; check the path"),
        (("in", "--image-size", "50"), "image size 50 x 50: each side must be a multiple of 16"),
        (("in", "--weights", "nothing"), "Invalid value for '--weights'"),
        (
            ("in/b.jpg",),
            "error: 1 of 1 image could not be read and is named above with the reason; nothing is classified",
        ),
    ],
)
def test_mistakes_are_reported_with_their_fix(
    run: Path, images: Path, arguments: tuple[str, ...], message: str
) -> None:
    (images.parent / "folder.csv").mkdir()
    result = predict(run, *arguments)
    assert result.exit_code == (2 if "Invalid" in message else 78)
    assert message in result.stderr
    assert result.stdout == "" or arguments == ("in/b.jpg",)


def test_a_model_that_is_none_is_refused(images: Path) -> None:
    result = predict("nowhere", "in")
    assert (result.exit_code, result.stdout) == (78, "")
    assert "nowhere: no such file or folder; give the run folder of a stage, a checkpoint" in result.stderr


def test_an_image_may_come_through_standard_input(run: Path, images: Path) -> None:
    arguments = ["predict", str(run), "-", "in/a.jpg", "--json", "-"]
    result = CliRunner().invoke(app, arguments, input=picture(0))
    piped, same = json.loads(result.stdout)["images"]
    assert (piped["image"], piped["predictions"]) == ("-", same["predictions"])


@pytest.mark.slow
def test_without_a_terminal_standard_output_is_the_json_alone(run: Path, images: Path) -> None:
    done = coatnet("predict", run, "in", "--json", "-", folder=images.parent, fresh=True)
    assert done.returncode == 78
    assert [image["image"] for image in json.loads(done.stdout)["images"]] == ["in/a.jpg", "in/c.png"]
    assert "\x1b" not in done.stderr
    assert "━" not in done.stderr


@pytest.mark.slow(seconds=12)
def test_accuracies_over_validation_shards_are_the_trainers_own(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    trained = coatnet("train", recipe, "pretrain", "pretrain.steps=12", "resources.ranks=1", folder=tmp_path)
    assert trained.returncode == 0, trained.stderr
    result = json.loads((tmp_path / "runs/test/pretrain/result.json").read_text())
    done = coatnet(
        "predict", "runs/test/pretrain", shards / "validation", "--batch-size", "3", "--json", "-", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["accuracy"] == {
        "images": 15,
        "top1": round(result["validation"]["top1"], 6),
        "top5": round(result["validation"]["top5"], 6),
    }
    for name, of_class in result["classes"].items():
        own = [image for image in content["images"] if image["labels"] == [name]]
        right = sum(image["predictions"][0]["class"] == name for image in own)
        assert (len(own), round(right / len(own), 6)) == (of_class["samples"], of_class["top1"])

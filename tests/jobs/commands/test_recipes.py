"""`coatnet recipes`: the bundled recipes are listed, shown and copied, and suggested where only a name is given."""

import json
from pathlib import Path

import pytest

from data.errors import EXIT_CONFIG
from jobs.bundled_recipes import bundled_recipes, load_recipe
from jobs.commands.recipes import copy, show
from pipeline.errors import ConfigError
from tests.support.command import coatnet


def test_the_list_has_a_line_for_each_recipe() -> None:
    done = coatnet("recipes")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    assert bundled_recipes().keys() <= lines.keys()
    assert lines["coatnet-6-in21k"].split() == [
        "coatnet-6-in21k", "coatnet_6", "pretrain", "224,", "finetune", "224", "384", "512", "128",
    ]  # fmt: skip
    assert lines["ablation-layouts"].split()[1:] == ["coatnet_2_cccc,", "4", "more", "5", "at", "224", "8"]


def test_json_has_models_stages_and_gpus() -> None:
    facts = json.loads(coatnet("recipes", "--json").stdout)
    assert list(facts) == list(bundled_recipes())
    assert facts["coatnet-3-jft"] == {
        "models": ["coatnet_3_dw"],
        "stages": {"pretrain": 224, "finetune_224": 224, "finetune_384": 384, "finetune_512": 512},
        "gpus": 64,
    }


def test_a_recipe_is_shown_and_copied_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bundled = bundled_recipes()["coatnet-5-in21k"].read_text()
    show("coatnet-5-in21k")
    assert capsys.readouterr().out == bundled
    copy("coatnet-5-in21k")
    assert capsys.readouterr().out == "wrote coatnet-5-in21k.yaml\n"
    copy("coatnet-5-in21k", Path("mine.yaml"))
    assert Path("coatnet-5-in21k.yaml").read_text() == Path("mine.yaml").read_text() == bundled


def refused(capsys: pytest.CaptureFixture[str], name: str, file: Path | None = None) -> str:
    """The message of `coatnet recipes copy` that writes nothing."""
    with pytest.raises(SystemExit) as ended:
        copy(name, file)
    assert ended.value.code == EXIT_CONFIG
    return capsys.readouterr().err


def test_a_copy_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    assert "mine.yaml exists; name another file: coatnet recipes copy demo FILE" in refused(capsys, "demo", file)
    assert file.read_text() == "mine"
    assert "No such file or directory" in refused(capsys, "demo", tmp_path / "absent" / "mine.yaml")


def test_an_unknown_name_is_answered_with_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no recipe coatnet-5-in22k comes with the program; did you mean coatnet-5-in21k" in refused(
        capsys, "coatnet-5-in22k"
    )
    assert "no recipe xyz comes with the program; `coatnet recipes` lists them" in refused(capsys, "xyz")


@pytest.mark.parametrize("file", ["coatnet-5-in21k", "coatnet-5-in21k.yaml", "recipes/coatnet-5-in21k.yml"])
def test_a_bundled_recipe_that_was_not_copied_is_suggested(file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; `coatnet recipes copy coatnet-5-in21k` writes it"):
        load_recipe(tmp_path / file)
    with pytest.raises(ConfigError, match=r"other\.yaml: No such file or directory$"):
        load_recipe(tmp_path / "other.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["run"], ["train"], ["bench", "data"], ["order"]], ids=" ".join)
def test_every_command_that_takes_a_recipe_suggests_copying_it(words: list[str], tmp_path: Path) -> None:
    stage = [] if words == ["run"] else ["pretrain"]
    done = coatnet(*words, "coatnet-5-in21k.yaml", *stage, folder=tmp_path)
    assert done.returncode == EXIT_CONFIG
    assert "`coatnet recipes copy coatnet-5-in21k` writes it" in done.stderr

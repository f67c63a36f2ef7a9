"""Settings written into a recipe file: a line each, and nothing else changes."""

import shutil
from pathlib import Path

import pytest

from jobs.recipe_edit import check_editable, write_settings
from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe

HEAD = """\
name: test # a comment

defaults:
  data: {train: a, validation: b}
  model: {name: coatnet_0}
  batch: {global_size: 8, micro_size: 4}
  optimizer: {peak_learning_rate: 1e-3}
stages:
"""


def write(folder: Path, stages: str, head: str = HEAD) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(head + stages, newline="")
    return path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "  one:\n    # why\n    resolution: 224 # pixels\n    steps: 3\n",
            "  one:\n    # why\n    compile: true # new\n    resolution: 224 # pixels\n    steps: 3\n",
        ),
        (
            "  one:\n    resolution: 224\n    compile: false  # old reason\n    steps: 3\n",
            "  one:\n    resolution: 224\n    compile: true # new\n    steps: 3\n",
        ),
        (
            "  one:\n    resolution: 224\n    steps: 3\n    compile: false",
            "  one:\n    resolution: 224\n    steps: 3\n    compile: true # new",
        ),
        (
            "  one:\r\n    resolution: 224\r\n    steps: 3\r\n",
            "  one:\r\n    compile: true # new\r\n    resolution: 224\r\n    steps: 3\r\n",
        ),
        (
            "  one: &anchor\n    resolution: 224\n    steps: 3\n",
            "  one: &anchor\n    compile: true # new\n    resolution: 224\n    steps: 3\n",
        ),
    ],
    ids=["added", "replaced", "last line", "line ends of Windows", "anchor"],
)
def test_a_setting_is_written_into_its_stage(tmp_path: Path, before: str, after: str) -> None:
    path = write(tmp_path, before)
    path.chmod(0o640)
    write_settings(path, "one", {"compile": True}, "new")
    assert path.read_bytes().decode() == HEAD + after
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_several_settings_are_written_together(tmp_path: Path) -> None:
    path = write(tmp_path, "  one:\n    deterministic: false\n    resolution: 224\n    steps: 3\n")
    write_settings(path, "one", {"compile": True, "deterministic": True}, "new")
    stage = load_recipe(path).stages["one"]
    assert (stage.deterministic, stage.model_dump()["compile"]) == (True, True)
    assert path.read_text().count("# new") == 2


def test_what_a_stage_takes_from_another_one_is_overridden_in_it_alone(tmp_path: Path) -> None:
    path = write(
        tmp_path, "  one: &one\n    resolution: 224\n    steps: 3\n  two:\n    <<: *one\n    resolution: 384\n"
    )
    write_settings(path, "two", {"compile": True}, "new")
    compiled = {name: stage.model_dump()["compile"] for name, stage in load_recipe(path).stages.items()}
    assert compiled == {"one": False, "two": True}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("  one: &one\n    resolution: 224\n    steps: 3\n  two:\n    <<: *one\n", "would change two, which takes settings from it"),
        ("  one: {resolution: 224, steps: 3}\n", "in braces, or on one line; write by hand: compile: true"),
        ("  two: &two\n    resolution: 224\n    steps: 3\n  one: *two\n", "it repeats another one by an alias"),
        ("  one:\n    resolution: 224\n    steps: 3\n    compile:\n      true\n", "the value of compile is not a plain one on its line"),
    ],
)  # fmt: skip
def test_a_stage_that_cannot_be_edited_alone_is_left_as_it_is(tmp_path: Path, stages: str, message: str) -> None:
    path = write(tmp_path, stages)
    with pytest.raises(ConfigError) as refused:
        write_settings(path, "one", {"compile": True}, "new")
    assert message in str(refused.value)
    assert path.read_text() == HEAD + stages
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_link_to_a_recipe_stays_a_link(tmp_path: Path) -> None:
    path = write(tmp_path, "  one:\n    resolution: 224\n    steps: 3\n")
    (tmp_path / "link.yaml").symlink_to(path)
    write_settings(tmp_path / "link.yaml", "one", {"compile": True}, "new")
    assert (tmp_path / "link.yaml").is_symlink()
    assert "compile: true # new" in path.read_text()


def test_the_recipe_of_a_run_is_not_edited(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    frozen = tmp_path / "recipes" / "0123456789abcdef.yaml"
    shutil.copy(write(tmp_path, "  one:\n    resolution: 224\n    steps: 3\n"), frozen)
    with pytest.raises(ConfigError, match="is that of a run and stays as it is"):
        check_editable(frozen, "one", {"compile": True})
    check_editable(tmp_path / "recipe.yaml", "one", {"compile": True})  # whose text is the same

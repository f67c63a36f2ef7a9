"""Settings of a stage's sections, as `batch.micro_size`, written into a recipe file."""

from pathlib import Path
from typing import Any

import pytest

from jobs.recipe_edit import with_settings, write_settings
from pipeline.errors import ConfigError
from pipeline.recipe.loader import load_recipe

HEAD = """\
name: test # a comment

defaults:
  data: {train: a, validation: b}
  model: {name: coatnet_0}
  batch: {global_size: 8, micro_size: 4} # of all
  optimizer: {peak_learning_rate: 1e-3}
stages:
"""
RANKS = {"resources.ranks": 2, "resources.nodes": 2}


def write(folder: Path, stages: str, head: str = HEAD) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(head + stages, newline="")
    return path


def stage_text(body: str) -> str:
    return f"  one:\n    resolution: 224\n    steps: 3\n{body}"


@pytest.mark.parametrize(
    ("before", "settings", "after"),
    [
        (
            "    batch: {global_size: 8, micro_size: 4}\n",
            {"batch.micro_size": 2},
            "    batch: {global_size: 8, micro_size: 2} # new\n",
        ),
        (
            "    batch: {micro_size: 4, global_size: 8} # old reason\n    ema_decay: 0.9\n",
            {"batch.micro_size": 2},
            "    batch: {micro_size: 2, global_size: 8} # new\n    ema_decay: 0.9\n",
        ),
        ("    resources: {ranks: 4}\n", RANKS, "    resources: {ranks: 2, nodes: 2} # new\n"),
        ("    resources: {}\n", RANKS, "    resources: {ranks: 2, nodes: 2} # new\n"),
        ("    resources: { }\n", RANKS, "    resources: {ranks: 2, nodes: 2 } # new\n"),
        ("    resources: {ranks: 4, }\n", RANKS, "    resources: {ranks: 2, nodes: 2 } # new\n"),
        ("    resources: {threads_per_rank: 3,}\n", RANKS, "    resources: {threads_per_rank: 3, ranks: 2, nodes: 2} # new\n"),
        ("    resources: {ranks: 4}", RANKS, "    resources: {ranks: 2, nodes: 2} # new"),
        ("    resources: {ranks: 4}\r\n    ema_decay: 0.9\r\n", RANKS, "    resources: {ranks: 2, nodes: 2} # new\r\n    ema_decay: 0.9\r\n"),
        (
            "    resources: # of the stage\n      # many\n      ranks: 4 # old\n      threads_per_rank: 3 # kept\n",
            RANKS,
            "    resources: # of the stage\n      # many\n      nodes: 2 # new\n      ranks: 2 # new\n      threads_per_rank: 3 # kept\n",
        ),
        (
            "    resources:\r\n      ranks: 4\r\n",
            {"resources.nodes": 2},
            "    resources:\r\n      nodes: 2 # new\r\n      ranks: 4\r\n",
        ),
    ],
    ids=[
        "in braces", "comment replaced", "added in braces", "empty braces", "empty braces with a space", "comma at the end",
        "comma at the end, added", "last line", "line ends of Windows", "block", "block with line ends of Windows",
    ],
)  # fmt: skip
def test_a_setting_is_written_into_its_section(
    tmp_path: Path, before: str, settings: dict[str, Any], after: str
) -> None:
    path = write(tmp_path, stage_text(before))
    write_settings(path, "one", settings, "new")
    assert path.read_bytes().decode() == HEAD + stage_text(after)
    stage = load_recipe(path).stages["one"]
    assert stage == with_settings(stage, settings)


def test_a_section_that_the_stage_has_not_is_added_to_it(tmp_path: Path) -> None:
    path = write(tmp_path, stage_text(""))
    write_settings(path, "one", {"batch.micro_size": 2, "zero_stage": 2} | RANKS, "new")
    found = sorted(set(path.read_text().splitlines()) - set((HEAD + stage_text("")).splitlines()))
    assert found == [
        "    batch: {micro_size: 2} # new",
        "    resources: {ranks: 2, nodes: 2} # new",
        "    zero_stage: 2 # new",
    ]
    assert load_recipe(path).stages["one"].batch.global_size == 8  # of the defaults


def test_the_rest_of_a_section_of_another_stage_is_kept(tmp_path: Path) -> None:
    """A section of a stage replaces all of the one that `<<` brings."""
    stages = (
        "  one: &one\n    resolution: 224\n    steps: 3\n    resources: {nodes: 2, ranks: 4}\n"
        "  two:\n    <<: *one\n    resolution: 384\n"
    )
    path = write(tmp_path, stages)
    write_settings(path, "two", {"resources.ranks": 2}, "new")
    assert path.read_text() == HEAD + stages.replace(
        "    <<: *one\n", "    resources: {nodes: 2, ranks: 2} # new\n    <<: *one\n"
    )


@pytest.mark.parametrize(
    ("stages", "settings", "message"),
    [
        (
            "  two: &two\n    resolution: 224\n    steps: 3\n    data: {train: a, random_augment: {layers: 2, magnitude: 5}}\n"
            "  one:\n    <<: *two\n",
            {"data.lanes": 4},
            "cannot be edited, since it takes data from another one by `<<`; write by hand: data.lanes: 4",
        ),
        (
            "  two:\n    resolution: 224\n    steps: 3\n    batch: &batch {global_size: 8, micro_size: 4}\n"
            "  one:\n    resolution: 224\n    steps: 3\n    batch: *batch\n",
            {"batch.micro_size": 2},
            "cannot be edited, since batch is not written out in it",
        ),
        (
            "  one:\n    resolution: 224\n    steps: 3\n    batch: &batch {global_size: 8, micro_size: 4}\n"
            "  two:\n    resolution: 224\n    steps: 3\n    batch: *batch\n",
            {"batch.micro_size": 2},
            "would change two, which takes settings from it; write them by hand",
        ),
        (
            "  one:\n    resolution: 224\n    steps: 3\n    batch: {global_size: 8,\n      micro_size: 4}\n",
            {"batch.micro_size": 2},
            "since a section in braces is on several lines",
        ),
        (
            "  one:\n    resolution: 224\n    steps: &size 4\n    batch: {global_size: 8, micro_size: *size}\n",
            {"batch.micro_size": 2},
            "since the value of micro_size is not a plain one",
        ),
        (
            "  one:\n    resolution: 224\n    steps: 3\n    batch: {global_size: 8, micro_size: &size 4}\n"
            "  two:\n    resolution: 224\n    steps: *size\n",
            {"batch.micro_size": 2},
            "with batch.micro_size: 2 in stage one it could not be read; write them by hand",
        ),
        (
            "  one:\n    resolution: 224\n    steps: 3\n    batch: {global_size: 8, micro_size: 4}\n",
            {"batch.micro_size": 3},
            "with batch.micro_size: 3 in stage one it could not be read; write them by hand",
        ),
    ],
    ids=["nested by <<", "alias", "anchor", "several lines", "alias of a value", "anchor of a value", "impossible"],
)  # fmt: skip
def test_a_section_that_cannot_be_edited_alone_is_left_as_it_is(
    tmp_path: Path, stages: str, settings: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, stages)
    load_recipe(path)
    with pytest.raises(ConfigError) as refused:
        write_settings(path, "one", settings, "new")
    assert str(refused.value).startswith(f"recipe {path}: ")
    assert message in str(refused.value)
    assert path.read_text() == HEAD + stages
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]

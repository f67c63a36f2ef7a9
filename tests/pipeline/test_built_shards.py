"""Existing shards are compared with the section `shards` of a recipe."""

import inspect
import os
from pathlib import Path
from shutil import copytree, rmtree

import pytest

from data.building.build import build_shards, merge_parts
from data.building.build_record import DEFAULTS, LEFT_OUT, RECORD_NAME, read_record
from data.errors import DataError
from pipeline.built_shards import check_built
from pipeline.errors import ConfigError
from pipeline.plan import plan_stage
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.sections import ShardBuildSettings
from tests.support.recipes import write_recipe

AS_BUILT = {"samples_per_shard": 7, "validation_per_class": 5}


def section(source: Path, folder: Path, **changes: object) -> ShardBuildSettings:
    return ShardBuildSettings.model_validate({"source": str(source), "folder": str(folder), **AS_BUILT, **changes})


@pytest.fixture
def place(pictures: Path, shards: Path, tmp_path: Path) -> Path:
    """A folder with copies of images and of the shards built from them, with the times of their files."""
    copytree(pictures, tmp_path / "place" / "images")
    build_shards(
        tmp_path / "place" / "images", tmp_path / "place" / "shards", samples_per_shard=7, validation_per_class=5
    )
    return tmp_path / "place"


def test_shards_as_the_recipe_describes_them_are_used(pictures: Path, shards: Path, tmp_path: Path) -> None:
    assert check_built(section(pictures, shards)) is None
    assert check_built(section(pictures, shards, processes=3, parts=2, skip_broken=True)) is None
    assert check_built(section(pictures, tmp_path / "new")) is None  # to be built
    (tmp_path / "link").symlink_to(pictures)
    assert check_built(section(tmp_path / "link", shards)) is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 1}, "seed: the folder has 0, the recipe says 1"),
        ({"samples_per_shard": 8}, "samples_per_shard: the folder has 7, the recipe says 8"),
        ({"validation_per_class": 6}, "validation_per_class: the folder has 5, the recipe says 6"),
        ({"short_side": 256}, "short_side: the folder has none, the recipe says 256"),
        ({"convert": True}, "convert: the folder has false, the recipe says true"),
        ({"recompress": True}, "recompress: the folder has false, the recipe says true"),
        ({"restart_markers": True}, "restart_markers: the folder has false, the recipe says true"),
    ],
)
def test_a_setting_that_the_shards_were_not_built_with_is_refused(
    pictures: Path, shards: Path, changes: dict[str, object], line: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_built(section(pictures, shards, **changes))
    assert str(refused.value).splitlines() == [
        f"shards: {shards} was not built as the recipe says:",
        f"  {line}",
        "Name another shards.folder to build them anew, restore the old values, or leave the section shards out to use "
        "the folder as it is",
    ]


def test_another_source_is_refused_and_all_differences_are_listed(pictures: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        check_built(section(tmp_path, shards, seed=1))
    assert str(refused.value).splitlines()[1:3] == [
        f"  source: the folder has {pictures}, the recipe says {tmp_path}",
        "  seed: the folder has 0, the recipe says 1",
    ]
    with pytest.raises(ConfigError, match="the recipe says s3://bucket/images"):
        check_built(ShardBuildSettings(source="s3://bucket/images", folder=str(shards)))


def test_options_that_a_recipe_does_not_have_are_compared_with_their_defaults(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("bright\ndark\nstriped\n")
    build_shards(
        pictures, tmp_path / "new", classes=tmp_path / "names.txt", leave_out=["*7.jpg"], convert=True, quality=80,
        skip_broken=True,
    )  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        check_built(ShardBuildSettings(source=str(pictures), folder=str(tmp_path / "new"), convert=True))
    assert str(refused.value).splitlines()[1:-1] == [
        "  quality: the folder has 80, the recipe says 95",
        '  leave_out: the folder has ["*7.jpg"], the recipe says none',
        f"  classes: the folder has {tmp_path}/names.txt, the recipe says none",
        "  skip_broken: the folder has true, the recipe says false",
    ]


def test_defaults_are_those_of_the_build() -> None:
    parameters = inspect.signature(build_shards).parameters
    recorded = (
        "within", "nested", "leave_out", "quality", "subsampling", "recompress", "restart_markers", "shard_bytes", "validation_fraction",
        "classes", "labels",
    )  # fmt: skip
    assert all((parameters[name].default or None) == DEFAULTS.get(name) for name in recorded)
    assert all(parameters[name].default == value for name, value in LEFT_OUT.items())


def test_shards_are_built_with_the_quality_and_subsampling_of_a_recipe_and_used_with_these_alone(
    pictures: Path, tmp_path: Path
) -> None:
    encoding = {"short_side": 16, "quality": 90, "subsampling": "4:2:0"}
    wanted = section(pictures, tmp_path / "new", **encoding)
    build_shards(wanted.source, Path(wanted.folder), **wanted.build_options)
    assert check_built(wanted) is None
    with pytest.raises(ConfigError) as refused:
        check_built(section(pictures, tmp_path / "new", short_side=16, recompress=True))
    assert str(refused.value).splitlines()[1:-1] == [
        "  subsampling: the folder has 4:2:0, the recipe says 4:4:4",
        "  recompress: the folder has false, the recipe says true",
        "  quality: the folder has 90, the recipe says 95",
    ]
    # Shards that are older than these options do not record them.
    build_shards(pictures, tmp_path / "older", short_side=16, samples_per_shard=7, validation_per_class=5)
    assert check_built(section(pictures, tmp_path / "older", short_side=16)) is None
    with pytest.raises(ConfigError, match="subsampling: the folder has 4:4:4, the recipe says 4:2:0"):
        check_built(section(pictures, tmp_path / "older", short_side=16, subsampling="4:2:0"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["short_side=16", "subsampling=4:1:1"], r"shards\.subsampling: .*'4:4:4', '4:2:2' or '4:2:0'"),
        (["short_side=16", "quality=101"], r"shards\.quality: .*100"),
        (
            ["quality=90"],
            r"shards: quality 90 and subsampling 4:4:4 are for images that are encoded again, and none is",
        ),
        (["subsampling=4:2:0"], r"shards: .* set one of these, or leave quality and subsampling out"),
    ],
)
def test_a_recipe_with_an_encoding_that_cannot_be_is_refused(
    settings: list[str], message: str, pictures: Path, shards: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, shards)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path, [f"shards.{setting}" for setting in (f"source={pictures}", "folder=new", *settings)])


def test_subsampling_is_written_without_quotes(pictures: Path, shards: Path, tmp_path: Path) -> None:
    """To some readers of YAML, 4:2:0 is a number to base 60."""
    path = write_recipe(tmp_path, shards)
    path.write_text(
        f"{path.read_text()}\nshards: {{source: {pictures}, folder: new, short_side: 9, subsampling: 4:2:0}}\n"
    )
    found = load_recipe(path).shards
    assert found is not None
    assert found.build_options["subsampling"] == "4:2:0"


def test_a_moved_project_has_the_same_source(place: Path, tmp_path: Path) -> None:
    place.rename(tmp_path / "elsewhere")
    assert check_built(section(tmp_path / "elsewhere" / "images", tmp_path / "elsewhere" / "shards")) is None


def test_a_source_with_another_class_folder_is_refused_and_one_without_its_images_is_not(place: Path) -> None:
    (place / "images" / "cow").mkdir()
    with pytest.raises(ConfigError, match=r"images has changed since .* \(3 folders and tars in it then, 4 now\)"):
        check_built(section(place / "images", place / "shards"))
    (place / "images" / "cow").rmdir()
    (place / "images" / "dark").rename(place / "images" / "dim")
    with pytest.raises(ConfigError, match="the folders and tars in it have other names"):
        check_built(section(place / "images", place / "shards"))
    rmtree(place / "images")
    assert check_built(section(place / "images", place / "shards")) is None


def test_a_list_of_another_size_is_refused(pictures: Path, tmp_path: Path) -> None:
    lines = [f"{path}\t{path.parent.name}\n" for path in sorted(pictures.rglob("*.jpg"))]
    (tmp_path / "list.tsv").write_text("".join(lines))
    build_shards(tmp_path / "list.tsv", tmp_path / "new")
    (tmp_path / "list.tsv").write_text("".join(lines[:-1]))
    with pytest.raises(ConfigError, match=r"list.tsv has changed since .* \([\d,]+ bytes then, [\d,]+ now\)"):
        check_built(ShardBuildSettings(source=str(tmp_path / "list.tsv"), folder=str(tmp_path / "new")))


def test_a_source_that_was_modified_since_is_a_doubt(place: Path) -> None:
    os.utime(place / "images" / "dark", (1e9, 2e9))
    doubt = check_built(section(place / "images", place / "shards"))
    assert doubt is not None
    assert doubt.startswith(f"shards: {place}/images was modified after {place}/shards was built from it")


def test_shards_without_a_record_are_a_doubt_and_a_damaged_one_is_refused(pictures: Path, place: Path) -> None:
    record = place / "shards" / RECORD_NAME
    record.write_text("{}")
    with pytest.raises(DataError, match=r"build.json: not the record of a build \(source is missing\)"):
        check_built(section(pictures, place / "shards"))
    record.unlink()
    doubt = check_built(section(pictures, place / "shards", seed=1))
    assert doubt is not None
    assert "whether it was built as the recipe says is not known" in doubt


def test_parts_leave_the_same_record_as_a_single_build(pictures: Path, shards: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        build_shards(pictures, tmp_path / "new", samples_per_shard=7, validation_per_class=5, part=(number, 2))
    merge_parts(tmp_path / "new")
    ours, whole = read_record(tmp_path / "new"), read_record(shards)
    assert ours is not None
    assert whole is not None
    assert (ours.source, ours.state, ours.options) == (whole.source, whole.state, whole.options)
    assert check_built(section(pictures, tmp_path / "new")) is None


def test_every_stage_is_planned_on_shards_as_the_recipe_describes_them(
    pictures: Path, shards: Path, tmp_path: Path
) -> None:
    """Also one that `coatnet train` starts alone."""
    overrides = [
        f"shards.source={pictures}",
        f"shards.folder={shards}",
        *(f"shards.{k}={v}" for k, v in AS_BUILT.items()),
    ]
    path = write_recipe(tmp_path, shards)
    assert plan_stage(load_recipe(path, overrides), "pretrain")
    with pytest.raises(ConfigError, match="seed: the folder has 0, the recipe says 2"):
        plan_stage(load_recipe(path, [*overrides, "shards.seed=2"]), "pretrain")

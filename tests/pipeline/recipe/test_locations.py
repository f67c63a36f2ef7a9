"""Paths and URLs in recipes: variables, home folders, and which settings may be URLs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from jobs.frozen_recipe import frozen_recipe
from pipeline.errors import ConfigError, SeveralErrors
from pipeline.recipe.loader import load_recipe
from pipeline.recipe.locations import Location
from pipeline.recipe.schema import EvaluateStage, Recipe, TrainStage
from tests.pipeline.recipe.test_recipe import RECIPE, write
from tests.support.recipes import write_recipe

TEXTS = {
    "name", "stages.model.name", "stages.data.storage.profile", "stages.resources.time_limit",
    "stages.resources.partition", "stages.resources.account", "stages.resources.qos", "stages.resources.constraint",
    "stages.resources.flags", "stages.data.excluded_samples",
}  # fmt: skip
"""Settings that are neither a path nor a URL nor one of some words."""
PATHS = {
    "runs": "checkpoint.folder may be a URL",
    "data.label_map": "copy the label map to a file system",
    "data.validation_label_map": "copy the label map to a file system",
    "data.cache.folder": "on a local disk of the node",
    "shards.folder": "shards are built in a local folder",
}
PATHS_OR_URLS = {"start_from", "data.train", "data.validation", "checkpoint.folder", "shards.source"}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SCRATCH": "/scratch/me", "BUCKET": "s3://mine", "EMPTY": "", "HOME": "/home/me"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)


def setting(recipe: Recipe, key: str) -> Any:
    """The value of a setting, of the first stage if it belongs to a stage."""
    value: Any = recipe if key.split(".")[0] in Recipe.model_fields else recipe.stages["pretrain"]
    for name in key.split("."):
        value = getattr(value, name)
    return value


def read(folder: Path, value: str, *keys: str) -> list[Any]:
    """The settings `keys`, all of which are written as `value`."""
    shards = ["shards={source: a, folder: b}"] if any(key.startswith("shards.") for key in keys) else []
    recipe = load_recipe(write(folder), [*shards, *(f"{key}={value}" for key in keys)])
    return [setting(recipe, key) for key in keys]


def refused(folder: Path, value: str, *keys: str) -> dict[str, str]:
    """The problem of each setting."""
    with pytest.raises(SeveralErrors) as found:
        read(folder, value, *keys)
    # Each is `override KEY=VALUE: KEY: PROBLEM`, a setting of stages with all of its key.
    problems = [problem.split(f"={value}: ", 1) for problem in found.value.problems]
    return {override.removeprefix("override "): problem for override, problem in problems}


def settings(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, set[Any], list[Any]]]:
    """Key, basic types and metadata of every setting below a section."""

    def parts(kind: Any) -> Iterator[Any]:
        yield kind
        for inner in (*get_args(kind), *getattr(kind, "__metadata__", ())):
            yield from parts(inner)

    for name, field in section.model_fields.items():
        found = list(parts(field.annotation))
        below = [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for kind in below:
            yield from settings(kind, f"{path}{name}.")
        if not below:
            types = {kind for kind in found if isinstance(kind, type)}
            yield f"{path}{name}", types, [*field.metadata, *found]


def test_every_setting_of_text_says_whether_it_is_a_path_or_a_url() -> None:
    texts = {key: metadata for key, types, metadata in settings(Recipe) if str in types}
    located = {key for key, metadata in texts.items() if any(isinstance(mark, Location) for mark in metadata)}
    in_stages = {key.removeprefix("stages.") for key in located}
    assert in_stages >= {*PATHS, *PATHS_OR_URLS}
    assert {key.replace("shards.resources", "stages.resources") for key in texts.keys() - located} == TEXTS


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("$SCRATCH/x", "/scratch/me/x"),
        ('"${SCRATCH}/x"', "/scratch/me/x"),
        ("~/x", "/home/me/x"),
        ("~root/x", "/root/x"),
        ("a$$SCRATCH", "{folder}/a$SCRATCH"),
        ("./~/x", "{folder}/~/x"),
        ("../x", "{folder.parent}/x"),
        ("file:///x/y", "/x/y"),
    ],
)
def test_paths_are_resolved(tmp_path: Path, written: str, path: str) -> None:
    found = read(tmp_path, written, *PATHS, *PATHS_OR_URLS)
    assert set(found) == {path.format(folder=tmp_path)}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("$UNSET/x", "$UNSET/x: the environment variable UNSET is not set; set it, or write $$ for a dollar sign"),
        ("${EMPTY}/x", "the environment variable EMPTY is empty"),
        ("a$", "write $NAME or ${NAME} for an environment variable, and $$ for a dollar sign"),
        ("${SCRATCH:-/tmp}/x", "write $NAME or ${NAME}"),
        ("''", "is empty"),
    ],
)
def test_what_cannot_be_resolved_is_refused_with_setting_and_name(tmp_path: Path, written: str, message: str) -> None:
    keys = {*PATHS, *PATHS_OR_URLS, "resources.container", "data.storage.endpoint"}
    problems = refused(tmp_path, written, *keys)
    assert problems.keys() == keys
    assert all(f"{key}: " in problem and message in problem for key, problem in problems.items()), problems


def test_an_unset_variable_is_reported_with_its_line(tmp_path: Path) -> None:
    text = RECIPE.replace("train: shards/train", "train: ${UNSET}/train")
    with pytest.raises(
        ConfigError, match=r"recipe.yaml:4: stages.pretrain.data.train: \$\{UNSET\}/train: .* UNSET is not"
    ):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("url", ["s3://bucket/x", "https://host/x", "$BUCKET/x", "s3:/bucket/x", "S3://bucket/x"])
def test_urls_are_refused_where_only_paths_work_with_what_takes_their_place(tmp_path: Path, url: str) -> None:
    problems = refused(tmp_path, url, *PATHS)
    assert problems.keys() == PATHS.keys()
    for key, instead in PATHS.items():
        assert " is a URL, and this must be a local path; " in problems[key]
        assert instead in problems[key]


def test_other_settings_may_be_urls_of_storages_that_exist(tmp_path: Path) -> None:
    assert set(read(tmp_path, "$BUCKET/x//y", *PATHS_OR_URLS)) == {"s3://mine/x//y"}
    for url, message in {
        "s3:/bucket/x": "neither a path nor a URL; write s3://",
        "hdfs://x": "not a supported location",
        "simplecache::s3://x": "not a supported location",
        "pipe:cat x": "not a supported location",
        "file://host/x": "has a host",
    }.items():
        problems = refused(tmp_path, url, *PATHS_OR_URLS)
        assert problems.keys() == PATHS_OR_URLS
        assert all(message in problem for problem in problems.values()), problems


def test_images_mounts_and_servers_are_resolved(tmp_path: Path) -> None:
    for key, written, expected in (
        ("resources.container", "$SCRATCH/x.sqsh", "/scratch/me/x.sqsh"),
        ("resources.container", "./x.sif", f"{tmp_path}/x.sif"),
        ("resources.container", "registry#an/image:1", "registry#an/image:1"),
        ("data.storage.endpoint", "http://host:9000", "http://host:9000"),
        (
            "resources.container_mounts",
            "['~', $SCRATCH:/x, '~/a:/b:ro', some:/d]",
            ("/home/me", "/scratch/me:/x", "/home/me/a:/b:ro", f"{tmp_path}/some:/d"),
        ),
    ):
        assert read(tmp_path, written, key) == [expected]
    assert " is not the URL of a server" in refused(tmp_path, "host:9000", "data.storage.endpoint").popitem()[1]
    with_login = refused(tmp_path, "http://me:secret@host:9000", "data.storage.endpoint").popitem()[1]
    assert "http://...@host:9000: the address contains a login" in with_login
    assert "secret" not in with_login
    assert " is not a folder " in refused(tmp_path, "[$BUCKET]", "resources.container_mounts").popitem()[1]


def test_what_was_resolved_is_not_resolved_again(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a recipe, values of variables and frozen recipes may have dollar signs."""
    monkeypatch.setenv("SCRATCH", "/scratch/$UNSET")
    folder = tmp_path / "it's\n$UNSET of $HOME ~ 100%j"
    path = write_recipe(folder, folder / "shards")
    recipe = load_recipe(path, ["checkpoint.folder=$SCRATCH/a$$b", "resources.container=$SCRATCH/c", "name=a"])
    assert recipe.runs == f"{folder}/runs"
    assert setting(recipe, "data.train") == f"{folder}/shards/train"
    assert setting(recipe, "checkpoint.folder") == "/scratch/$UNSET/a$b"
    frozen = frozen_recipe(recipe)
    frozen.write()
    monkeypatch.delenv("SCRATCH")
    assert load_recipe(frozen.path) == recipe
    assert frozen_recipe(load_recipe(frozen.path)).path == frozen.path


def test_settings_without_a_recipe_are_taken_for_resolved(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["data.train=a$$UNSET"])
    for stage in recipe.stages.values():
        assert isinstance(stage, TrainStage | EvaluateStage)
        assert type(stage).model_validate(stage.model_dump(mode="json")) == stage

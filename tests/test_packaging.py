"""The distributions: everything that runs is in the wheel, everything to work on is in the sdist."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from setuptools import find_namespace_packages

from tests.support.command import environment
from tests.support.paths import ROOT
from tests.support.recipes import write_recipe

PACKAGES = ("data", "jobs", "models", "pipeline")
NOT_SOURCE = (".venv", ".git", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info")
WRITTEN_BY_RUNS = ("build", "demo", "runs")  # in the root of a checkout; below it, a package may have such a name


def source_files(folder: str, pattern: str) -> set[str]:
    """Paths of files below a folder of the checkout, relative to the root."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if "__pycache__" not in path.parts}


def test_every_folder_with_code_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = find_namespace_packages(str(ROOT), include=settings["include"], exclude=settings["exclude"])
    code = {str(Path(file).parent).replace("/", ".") for package in PACKAGES for file in source_files(package, "*.py")}
    assert code <= set(found)
    assert not any("__pycache__" in package for package in found)
    for name in code:
        assert (ROOT / name.replace(".", "/") / "__init__.py").exists(), f"{name} has no __init__.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, since setuptools writes beside what it builds; with a file that must not get out."""
    folder = tmp_path_factory.mktemp("source") / "checkout"

    def ignored(parent: str, names: list[str]) -> set[str]:
        found = set(shutil.ignore_patterns(*NOT_SOURCE)(parent, names))
        return found | set(WRITTEN_BY_RUNS) if Path(parent) == ROOT else found

    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "slurm" / "site.sh").write_text("export SECRET=1\n")
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    _run(source, sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "dist", ".")
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_the_code_the_recipes_the_demo_and_the_batch_scripts(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    expected = {"slurm/launch.sh"} | source_files("slurm", "*.sbatch") | source_files("jobs/recipes", "*.yaml")
    expected |= source_files("jobs/fashion_mnist", "*") | source_files("pipeline/planner", "*.yaml")
    for package in PACKAGES:
        expected |= source_files(package, "*.py") | {f"{package}/py.typed"}
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == expected
    assert "Classifier: Private :: Do Not Upload\n" in text
    assert "License-Expression: Apache-2.0\n" in text
    assert "# CoAtNet pretraining" in text  # the README


@pytest.mark.slow
def test_the_sdist_has_what_it_takes_to_test_and_to_change_it(source: Path) -> None:
    _run(source, sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')")
    (path,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    expected = {"Makefile", "MANIFEST.in", "constraints.txt", "pyproject.toml", ".ci/run", ".pre-commit-config.yaml"}
    expected |= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "slurm/launch.sh"}
    expected |= source_files("docs", "*.*") | source_files("slurm", "*.sbatch")
    for folder in (*PACKAGES, "benchmarks", "tests"):
        expected |= source_files(folder, "*.py")
    assert expected <= names
    assert "slurm/site.sh" not in names
    assert not any("__pycache__" in name for name in names)


@pytest.mark.slow(seconds=20)
def test_an_installed_wheel_runs_in_a_folder_whose_names_collide_with_its_packages(
    wheel: Path, pictures: Path, tmp_path: Path
) -> None:
    installed, work = tmp_path / "installed", tmp_path / "work"
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(installed)]
    _run(tmp_path, sys.executable, "-m", "pip", "install", *options, str(wheel))
    for name in ("models.py", "data/__init__.py", "jobs.py", "pipeline.py", "yaml.py"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("raise SystemExit('imported from the working folder')\n")

    def coatnet(*arguments: str) -> str:
        return _run(work, sys.executable, "-P", "-m", "jobs", *arguments, PYTHONPATH=str(installed))

    place = "import data, jobs, models, pipeline; print(*{p.__file__ for p in (data, jobs, models, pipeline)})"
    for file in _run(work, sys.executable, "-P", "-c", place, PYTHONPATH=str(installed)).split():
        assert Path(file).is_relative_to(installed)

    built = coatnet("shards", "build", str(pictures), "shards", "--samples-per-shard=7", "--validation-per-class=5")
    assert re.search(r"\b45\b", built), built
    recipe = write_recipe(work, Path("shards"), resources={"ranks": 1})
    settings = yaml.safe_load(recipe.read_text())
    settings["stages"] = {"pretrain": settings["stages"]["pretrain"] | {"steps": 5}}
    recipe.write_text(yaml.safe_dump(settings))
    coatnet("run", "recipe.yaml")
    assert "5/5" in coatnet("status", "recipe.yaml")
    assert "own_images" in coatnet("recipes")


def _run(folder: Path, *command: str, **variables: str) -> str:
    """A command's output; it must succeed."""
    done = subprocess.run(
        command, cwd=folder, env=environment() | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}{os.linesep}{done.stdout}{done.stderr}"
    return done.stdout

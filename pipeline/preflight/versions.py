"""The versions of what a run depends on, and whether this program supports them."""

import hashlib
import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path

from pipeline.preflight.finding import Finding

_DISTRIBUTION = "coatnet-pretraining"
_SOURCES = ("models", "data", "pipeline", "jobs")


def versions() -> dict[str, str]:
    """The versions of Python, torch, DeepSpeed and the sources of this program, by name."""
    found = {"Python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("torch", "deepspeed")}
    return found | {"coatnet": source_digest()}


@cache
def source_digest() -> str:
    """The first digits of a sha256 of all source files of this program; equal on nodes that run the same program."""
    home = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for package in _SOURCES:
        for file in sorted((home / package).rglob("*.py")):
            digest.update(f"{file.relative_to(home)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def assess_versions() -> list[Finding]:
    """Compare what is installed with the ranges that the package requires."""
    found = [
        Finding("error", "", f"version: {problem}", "install the required versions: pip install -c constraints.txt .")
        for problem in unmet(_requirements())
    ]
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [*found, Finding("ok", "", f"versions: {named}")]


def unmet(requirements: list[str]) -> list[str]:
    """Which requirements, such as `torch>=2.11`, are not met, and by which version; those of extras are ignored."""
    problems = []
    for requirement in requirements:
        match = re.match(r"^([\w.-]+)\s*>=\s*([\d.]+)\s*$", requirement)
        if match is None:
            continue
        name, least = match.groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed, {least} or newer is required")
            continue
        if _numbers(version) < _numbers(least):
            problems.append(f"{name} {version} is installed, {least} or newer is required")
    return problems


def _requirements() -> list[str]:
    try:
        return metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a source folder
        return []


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])

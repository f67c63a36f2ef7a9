"""The versions of what a run consists of, and whether they are those that this program asks for."""

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
    """Of Python, torch, DeepSpeed and the sources of this program, by name."""
    found = {"Python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("torch", "deepspeed")}
    return found | {"coatnet": source_digest()}


@cache
def source_digest() -> str:
    """The beginning of a sha256 of all source files of this program: where it differs, so does the program."""
    home = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for package in _SOURCES:
        for file in sorted((home / package).rglob("*.py")):
            digest.update(f"{file.relative_to(home)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def assess_versions() -> list[Finding]:
    """What is installed against the ranges of the package."""
    found = [
        Finding("error", "", f"version: {problem}", "install what is asked for: pip install -c constraints.txt .")
        for problem in unmet(_requirements())
    ]
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [*found, Finding("ok", "", f"versions: {named}")]


def unmet(requirements: list[str]) -> list[str]:
    """Which of requirements such as `torch>=2.11` are not met here, and by what; those of extras are passed over."""
    problems = []
    for requirement in requirements:
        match = re.match(r"^([\w.-]+)\s*>=\s*([\d.]+)\s*$", requirement)
        if match is None:
            continue
        name, least = match.groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed, {least} or newer is asked for")
            continue
        if _numbers(version) < _numbers(least):
            problems.append(f"{name} {version} is installed, {least} or newer is asked for")
    return problems


def _requirements() -> list[str]:
    try:
        return metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a folder of sources
        return []


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])

"""Running `coatnet replay` on real ranks, and reading what it has found."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from tests.support.command import coatnet

ON_TWO = {"ranks": 2, "gpus_per_rank": 0}
"""`resources` of the runs."""

NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


def strict_json(text: str) -> Any:
    """The content of a JSON text without NaN and Infinity, which are no JSON."""

    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def replayed(*arguments: str | Path, ranks: int = 2, variables: Mapping[str, str] = NO_VARIABLES) -> dict[str, Any]:
    """What `coatnet replay ARGUMENTS --json` prints, which is what its folder holds as well."""
    done = coatnet("replay", *arguments, f"--ranks={ranks}", "--json", folder=None, fresh=False, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = strict_json(done.stdout)
    assert strict_json((Path(report["folder"]) / "replay.json").read_text()) == {
        key: value for key, value in report.items() if key != "folder"
    }
    return report


def refused(*arguments: str | Path) -> str:
    """The message of a replay that is refused with 78 before any rank starts."""
    done = coatnet("replay", *arguments)
    assert done.returncode == 78, done.stdout + done.stderr
    assert done.stdout == ""
    return done.stderr


def agreements(report: dict[str, Any]) -> dict[int, str | None]:
    """Step -> how it compares with the log."""
    return {row["step"]: row.get("agreement") for row in report["steps"]}


def contents(run: Path) -> dict[str, str]:
    """Digests of the files of a run by their paths, without those of replays."""
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(run.rglob("*"))
        if file.is_file() and "replays" not in file.relative_to(run).parts
    }

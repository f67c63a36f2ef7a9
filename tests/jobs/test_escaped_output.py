"""Names that are not UTF-8, or that the locale cannot encode, are printed by every command."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_pictures
from tests.support.command import coatnet

LOCALES: dict[str, dict[str, Any]] = {
    "UTF-8": {"LANG": "en_US.UTF-8", "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"},
    "C": {"LANG": "C", "LC_ALL": ""},
    "POSIX": {"LC_ALL": "POSIX"},
    "ASCII": {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
    "ASCII without UTF-8 mode": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.fixture(scope="module")
def odd_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples with names in Latin-1, one without a label."""
    folder = tmp_path_factory.mktemp("odd")
    picture = next(write_pictures(folder / "pictures", per_class=1).rglob("*.jpg")).read_bytes()
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards/a-0000.tar", "w") as tar:
        for number in range(3):
            members = {"jpg": picture, "cls": b"%d" % number} if number != 1 else {"jpg": picture}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"caf\udce9-{number}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "shards"


@pytest.mark.slow
@pytest.mark.parametrize("locale", LOCALES)
def test_names_that_are_not_utf_8_are_printed_in_every_locale(locale: str, odd_shards: Path, tmp_path: Path) -> None:
    indexed = coatnet("shards", "index", odd_shards, "--output", tmp_path, fresh=True, **LOCALES[locale])
    assert indexed.returncode == 0, indexed.stderr
    assert r"a-0000.tar: caf\xe9-1" in indexed.stdout


CLASSES = ("caf\udce9", "日本", "tea")


@pytest.mark.slow
def test_class_names_that_are_not_utf_8_are_printed(tmp_path: Path) -> None:
    picture = next(write_pictures(tmp_path / "pictures", per_class=1).rglob("*.jpg")).read_bytes()
    for name in CLASSES:
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "1.jpg").write_bytes(picture)
    built = coatnet("shards", "build", tmp_path / "classes", tmp_path / "shards", "--processes", "1")
    assert built.returncode == 0, built.stderr
    shown = coatnet(
        "shards", "show", tmp_path / "shards", "--output", tmp_path / "c.png", fresh=True, **LOCALES["ASCII"]
    )
    assert shown.returncode == 0, shown.stderr
    assert r"caf\xe9" in shown.stdout
    assert r"\u65e5\u672c" in shown.stdout

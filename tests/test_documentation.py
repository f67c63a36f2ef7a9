"""The documentation: the index names every page, and links lead somewhere."""

import re
import tomllib
from pathlib import Path

import pytest

from data import limits
from data.tar import NO_END_MARK, SEVERAL_TARS
from pipeline.gpu_benchmark.measure import OPTIONAL
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def targets(page: Path) -> list[str]:
    """Where the links and images of a page lead, code left out."""
    text = re.sub(r"^(    |```).*$", "", page.read_text(), flags=re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_names_every_page() -> None:
    linked = {target.partition("#")[0] for target in targets(ROOT / "docs" / "index.md")}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for target in targets(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_relative_to(ROOT) or not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_paths_in_the_guide_for_contributors_exist() -> None:
    paths = re.findall(r"`((?:\.ci|[\w.-]+)/[\w./-]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(paths) > 30
    assert [path for path in paths if not any((ROOT / folder / path).exists() for folder in (".", "tests"))] == []


def test_the_guide_for_contributors_lists_the_import_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for contract in contracts:
        name = "layers" if contract["type"] == "layers" else contract["name"]
        assert f"\n| {name} | " in text


def test_the_kinds_of_remarks_on_datasets_are_documented() -> None:
    for folder, page in (("building", "shards.md"), ("indexing", "indexing.md")):
        files = [*(ROOT / "data" / folder).glob("*.py"), ROOT / "data" / "classes" / "class_remarks.py"]
        code = "".join(file.read_text() for file in files)
        kinds = {*re.findall(r"\.remark\(\s*\"(\w+)\"", code), NO_END_MARK, SEVERAL_TARS}
        assert len(kinds) > 7
        assert kinds <= set(re.findall(r"`(\w+)`", (ROOT / "docs" / page).read_text()))


def test_all_limits_on_files_from_outside_are_documented_with_their_numbers() -> None:
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| ([0-9,]+) \| ", (ROOT / "docs" / "security.md").read_text(), flags=re.MULTILINE
    )
    documented = {name: int(number.replace(",", "")) for name, number in rows}
    assert documented == {name: value for name, value in vars(limits).items() if name.isupper()}


def test_all_measurements_of_a_gpu_are_documented_in_their_order() -> None:
    table = (ROOT / "docs" / "gpus.md").read_text().partition("| `--only` |")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\S+)` \|", table, flags=re.MULTILINE)) == OPTIONAL

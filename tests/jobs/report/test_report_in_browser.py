"""The report in a real browser: what is shown, and that names in it do nothing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.text.printable import printable
from tests.jobs.report.runs import HOSTILE, made_run, report, write_evaluation
from tests.jobs.report.test_report import Page
from tests.support.browser import find_browser, rendered, screenshot

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run whose names are hostile."""
    find_browser()
    run = made_run(tmp_path_factory.mktemp("report"), HOSTILE)
    write_evaluation(run.stage("pretrain"), HOSTILE)
    assert report(run.path).exit_code == 0
    return run.path / "report.html"


def test_the_browser_has_the_whole_document_and_runs_nothing_in_it(page: Path, tmp_path: Path) -> None:
    shown = Page(rendered(page, tmp_path / "profile"))
    written = Page(page.read_text())
    assert [tag for tag, _ in shown.elements if tag != "tbody"] == [
        tag for tag, _ in written.elements if tag != "tbody"
    ]
    assert shown.text == written.text
    assert "small: report" in shown.texts  # the title, which the names would change
    for name in HOSTILE:
        assert printable(name) in shown.text
    assert shown.count("svg") == 7


@pytest.mark.parametrize("width", [1280, 420])
def test_the_page_is_seen_down_to_its_end(page: Path, tmp_path: Path, width: int) -> None:
    picture = tmp_path / "page.png"
    screenshot(page, tmp_path / "profile", picture, width, 3000)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    assert pixels.shape == (3000, width, 3)
    for part in np.split(pixels @ (65536, 256, 1), 6):  # none is blank
        assert np.count_nonzero(np.bincount(part.ravel())) > 20
    for part in np.split(pixels.max(axis=2), 6):
        assert (part < 128).mean() > 0.001  # dark enough to read
    assert (np.abs(pixels - np.array([0x1D, 0x5F, 0xBF])).sum(axis=2) < 30).sum() > 300  # curves in blue

"""A real browser without a window: Chromium, which shows a page as a person would see it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGE = "chromium"
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 120


def find_browser() -> str:
    """The program; without it the test is skipped, or fails where `CI` is set."""
    for name in _PROGRAMS:
        if program := shutil.which(name):
            return program
    reason = f"no browser: apt-get install {PACKAGE}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def rendered(page: Path, profile: Path) -> str:
    """The document as the browser has it once it has loaded `page`."""
    return _run(page, profile, "--dump-dom")


def screenshot(page: Path, profile: Path, picture: Path, width: int, height: int) -> None:
    """Write what is seen of the page to `picture`, a PNG."""
    _run(page, profile, f"--screenshot={picture}", f"--window-size={width},{height}", "--hide-scrollbars")


def _run(page: Path, profile: Path, *arguments: str) -> str:
    # Root has no sandbox, nor has a container; the page is one that the test has written.
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [find_browser(), *options, *arguments, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=True,
    )
    return done.stdout

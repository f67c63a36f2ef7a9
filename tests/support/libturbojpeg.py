"""A real libturbojpeg 3: the one that this machine or the wheel of pylibjxl has."""

import os

import pytest

from data.images.turbojpeg import find_turbojpeg


def libturbojpeg() -> str:
    """Its file; without it the test is skipped, or fails where `CI` is set."""
    found = find_turbojpeg({})
    if found is not None:
        return found.path
    reason = "no libturbojpeg 3: pip install pylibjxl"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)

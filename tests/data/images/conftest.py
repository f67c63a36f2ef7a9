"""The decoders of windows."""

import pytest

from data.images.turbojpeg import TurboJpeg
from tests.data.images.windows import Counting
from tests.support.libturbojpeg import libturbojpeg


@pytest.fixture(params=["libturbojpeg", "simplejpeg"])
def regions(request: pytest.FixtureRequest) -> Counting:
    return Counting(TurboJpeg(libturbojpeg()) if request.param == "libturbojpeg" else None)

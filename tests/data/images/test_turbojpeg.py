"""Which libturbojpeg is used, and what is said of one that cannot be."""

import shutil
import sys
from pathlib import Path

import pytest

from data.errors import DataError
from data.images import turbojpeg
from data.images.turbojpeg import VARIABLE, TurboJpeg, find_turbojpeg, places
from tests.support.libturbojpeg import libturbojpeg

OLD = "libm.so.6"  # a library without the functions of version 3


def test_the_named_library_is_taken_before_all_others() -> None:
    path = libturbojpeg()
    found = find_turbojpeg({VARIABLE: path})
    assert found
    assert found.path == path


def test_an_empty_name_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    path = libturbojpeg()
    monkeypatch.setattr(turbojpeg, "places", lambda: (path,))
    assert find_turbojpeg({VARIABLE: ""}) is None


def test_the_first_place_with_version_3_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = libturbojpeg()
    monkeypatch.setattr(turbojpeg, "places", lambda: (str(tmp_path / "missing.so"), OLD, path, str(tmp_path)))
    found = find_turbojpeg({})
    assert found
    assert found.path == path
    monkeypatch.setattr(turbojpeg, "places", lambda: (str(tmp_path / "missing.so"), OLD))
    assert find_turbojpeg({}) is None


def test_the_environment_of_this_python_comes_before_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    shutil.copy(libturbojpeg(), tmp_path / "lib" / "libturbojpeg.so.0")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    found = find_turbojpeg({})
    assert found
    assert found.path == places()[0] == str(tmp_path / "lib" / "libturbojpeg.so.0")


def test_the_module_of_an_installed_pylibjxl_is_found_without_importing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = tmp_path / "pylibjxl" / "_pylibjxl.abi3.so"
    module.parent.mkdir()
    (module.parent / "__init__.py").write_text("raise ImportError")
    shutil.copy(libturbojpeg(), module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    found = find_turbojpeg({})
    assert found
    assert found.path == str(module)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/nowhere/libturbojpeg.so", "cannot be loaded (/nowhere/libturbojpeg.so: cannot open shared object file"),
        (__file__, "cannot be loaded"),
        (OLD, "is older than libturbojpeg 3"),
    ],
    ids=["missing", "no library", "old"],
)
def test_a_named_library_that_cannot_be_used_is_an_error(name: str, problem: str) -> None:
    with pytest.raises(DataError) as raised:
        find_turbojpeg({VARIABLE: name})
    message = str(raised.value)
    assert message.startswith(f"{VARIABLE}={name}: it {problem}")
    assert message.endswith("; name a libturbojpeg.so of version 3 or later, or unset the variable")


def test_what_is_no_jpeg_or_not_inside_of_it_gives_no_pixels() -> None:
    library = TurboJpeg(libturbojpeg())
    assert library.region(b"no JPEG", 0, 0, 8, 8) is None

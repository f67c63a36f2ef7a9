"""libturbojpeg 3 by ctypes: it decodes a region of a JPEG, and codes one anew with restart markers without a loss.

No package that is kept up offers these to Python.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.images.jpeg import Pixels

VARIABLE = "COATNET_LIBTURBOJPEG"
"""The environment variable that names the file of the library; empty, none is used."""

# Of turbojpeg.h.
_DECOMPRESS, _TRANSFORM = 1, 2
_STOP_ON_WARNING, _RESTART_BLOCKS = 0, 18
_RGB = 0
_OPTIMIZE = 256


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class _Transform(ctypes.Structure):
    _fields_ = (
        ("region", _Region), ("operation", ctypes.c_int), ("options", ctypes.c_int), ("data", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
    )  # fmt: skip


class TurboJpeg:
    """The library in a file; threads may share it, and decoding and coding release the interpreter's lock.

    Args:
        path: of the file, or a name that the dynamic loader finds.

    Raises:
        OSError: there is none, or it cannot be loaded.
        AttributeError: it is older than 3.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # The short calls keep the interpreter's lock: to wait for it again takes longer than they do.
        library, unlocked = ctypes.PyDLL(path), ctypes.CDLL(path)
        handle, encoded, size, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int
        self._crop = library.tj3SetCroppingRegion
        self._crop.argtypes = [handle, _Region]
        self._new = library.tj3Init
        self._new.argtypes, self._new.restype = [number], handle
        self._set = library.tj3Set
        self._set.argtypes = [handle, number, number]
        self._read_header = library.tj3DecompressHeader
        self._read_header.argtypes = [handle, encoded, size]
        self._decompress = unlocked.tj3Decompress8
        self._decompress.argtypes = [handle, encoded, size, handle, number, number]
        self._transform = unlocked.tj3Transform
        self._transform.argtypes = [
            handle, encoded, size, number, ctypes.POINTER(handle), ctypes.POINTER(size), ctypes.POINTER(_Transform),
        ]  # fmt: skip
        self._free = library.tj3Free
        self._free.argtypes, self._free.restype = [handle], None
        self._destroy = library.tj3Destroy
        self._destroy.argtypes, self._destroy.restype = [handle], None

    def region(self, encoded: bytes, left: int, top: int, width: int, height: int) -> Pixels | None:
        """Pixels (height, width, 3) uint8 RGB of a JPEG from row `top` and column `left` on.

        `left` is a multiple of the width of an iMCU. None for any error or warning of the library up to the last row,
        or if the region is not inside of the image; if it ends with the image, up to the end of the file.
        """
        pixels = np.empty((height, width, 3), np.uint8)
        handle = self._new(_DECOMPRESS)
        if handle is None:
            return None
        try:
            failed = (
                self._set(handle, _STOP_ON_WARNING, 1)
                or self._read_header(handle, encoded, len(encoded))
                or self._crop(handle, _Region(left, top, width, height))
                or self._decompress(handle, encoded, len(encoded), pixels.ctypes.data, 0, _RGB)
            )
        finally:
            self._destroy(handle)
        return None if failed else pixels

    def recoded(self, encoded: bytes, interval: int) -> bytes | None:
        """A JPEG of the same coefficients in one scan, with Huffman codes of its own, and everything else as it is.

        After every `interval` MCUs comes a restart marker, or none if it is 0. None for any error or warning.
        """
        handle = self._new(_TRANSFORM)
        if handle is None:
            return None
        content, size = ctypes.c_void_p(), ctypes.c_size_t()
        wanted = _Transform(options=_OPTIMIZE)
        try:
            failed = (
                self._set(handle, _STOP_ON_WARNING, 1)
                or self._set(handle, _RESTART_BLOCKS, interval)
                or self._transform(handle, encoded, len(encoded), 1, content, size, wanted)
            )
            return None if failed or not content.value else ctypes.string_at(content.value, size.value)
        finally:
            self._free(content)
            self._destroy(handle)


def find_turbojpeg(environment: Mapping[str, str]) -> TurboJpeg | None:
    """The one that `COATNET_LIBTURBOJPEG` names, else the first of `places()` that is version 3; None if there is none.

    Raises:
        DataError: the named file cannot be used.
    """
    named = environment.get(VARIABLE)
    if named is None:
        return _first(places())
    if not named:
        return None
    try:
        return TurboJpeg(named)
    except OSError as error:
        problem = f"cannot be loaded ({error})"
    except AttributeError:
        problem = "is older than libturbojpeg 3"
    raise DataError(
        f"{VARIABLE}={named}: it {problem}; name a libturbojpeg.so of version 3 or later, or unset the variable"
    )


def places() -> tuple[str, ...]:
    """Where libturbojpeg may be: in this Python's environment (conda), in the wheel of pylibjxl, whose extension module
    exports its functions, in the system, and in the packages of the libjpeg-turbo project."""
    wheel = importlib.util.find_spec("pylibjxl")  # which imports nothing
    modules = [path for folder in (wheel and wheel.submodule_search_locations) or () for path in _modules(folder)]
    return (
        f"{sys.prefix}/lib/libturbojpeg.so.0",
        *modules,
        "libturbojpeg.so.0",  # as the dynamic loader finds it
        "/opt/libjpeg-turbo/lib64/libturbojpeg.so.0",
    )


def _modules(folder: str) -> list[str]:
    return sorted(map(str, Path(folder).glob("_pylibjxl*.so")))


def _first(paths: Iterable[str]) -> TurboJpeg | None:
    for path in paths:
        try:
            return TurboJpeg(path)
        except (OSError, AttributeError):
            continue
    return None

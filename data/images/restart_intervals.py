"""The part of a JPEG that a window needs, as a JPEG of its own, where restart markers allow to leave out the rest.

What is between two restart markers is decoded without anything before it. Where a row of MCUs consists of whole
intervals, those that cover a window are a JPEG of a smaller size, whose pixels in the window are those of the whole.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.images.region_frame import EOI, RegionFrame, Window

_RESTARTS = bytes(range(0xD0, 0xD8))
"""The second bytes of the restart markers, which follow one another in turn."""


class JpegPart(NamedTuple):
    """A JPEG, its frame, and the window in it."""

    encoded: bytes
    frame: RegionFrame
    window: Window


def cut_out(encoded: bytes, frame: RegionFrame, window: Window) -> JpegPart | None:
    """The part of a JPEG with restart markers that has the pixels of `window`.

    None if the markers are not those that the header promises: then something is damaged.
    """
    (rows, columns), (height, width) = window, frame.mcu
    in_column, in_row = frame.grid
    shape = in_column, in_row // frame.interval
    stops = _stops(encoded, frame, shape[0] * shape[1])
    if stops is None:
        return None
    starts = np.concatenate(([frame.data_at], stops[:-1])).reshape(shape)
    stops = stops.reshape(shape)
    above, beside = frame.reach
    width *= frame.interval
    top, bottom = max(0, rows.start - above) // height, -(-frame.rows_read(rows.stop) // height)
    left, right = max(0, columns.start - beside) // width, -(-min(frame.width, columns.stop + beside) // width)
    if left and frame.width - left * width <= 2 * frame.across:
        left -= 1  # libjpeg interpolates no chrominance that is at most two pixels wide
    size = min(frame.height, bottom * height) - top * height, min(frame.width, right * width) - left * width
    chosen = slice(top, bottom), slice(left, right)
    starts, stops = starts[chosen], stops[chosen]
    at = frame.height_at
    header = (encoded[:at], *(side.to_bytes(2) for side in size), encoded[at + 4 : frame.data_at])
    data = (encoded[begin:end] for begin, end in zip(starts[:, 0].tolist(), stops[:, -1].tolist(), strict=True))
    part = bytearray().join((*header, *data))
    # Each interval ends with a marker, whose number depends on its place.
    markers = np.cumsum(stops - starts) + (frame.data_at - 1)
    np.frombuffer(part, np.uint8)[markers] = _numbers(len(markers))
    return JpegPart(
        bytes(part),
        frame._replace(height=size[0], width=size[1]),
        (_moved(rows, top * height), _moved(columns, left * width)),
    )


def _stops(encoded: bytes, frame: RegionFrame, count: int) -> NDArray[np.int64] | None:
    """The place behind the marker that ends each of the `count` intervals; the last one is that of the image's end."""
    data = np.frombuffer(encoded, np.uint8)[frame.data_at :]
    at = np.flatnonzero(data[:-1] == 0xFF) + 1
    at = at[data[at] != 0][:count]  # others are bytes of data
    if len(at) < count or not np.array_equal(data[at], _numbers(count)):
        return None
    return np.asarray(at + (frame.data_at + 1), np.int64)


def _numbers(count: int) -> NDArray[np.uint8]:
    """The second bytes of `count` markers, of which the last is the end of the image."""
    numbers = _RESTARTS * (count // len(_RESTARTS)) + _RESTARTS[: count % len(_RESTARTS)]
    return np.frombuffer(numbers[:-1] + EOI[1:], np.uint8)


def _moved(span: slice, by: int) -> slice:
    return slice(span.start - by, span.stop - by)

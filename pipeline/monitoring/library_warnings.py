"""Warnings of libraries that say nothing to a user of this program; all others appear as usual."""

import warnings

_QUIET = (
    # DeepSpeed calls collectives whose new names older versions of torch do not have.
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
)
"""The beginning of each message, as a regular expression, and its category."""


def quiet_library_warnings() -> None:
    """Leave these out for the rest of this process."""
    for message, category in _QUIET:
        warnings.filterwarnings("ignore", message, category)

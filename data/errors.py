"""Errors that end a command with a message for the user: the base class, and those about data.

Exit codes are those of sysexits.h. Each error class has its own, so that reporting one needs no table.
"""

EXIT_FAILED = 70
"""EX_SOFTWARE: the run failed and would fail again; do not requeue."""
EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL: stopped by a signal or a transient error; the same command continues: requeue."""
EXIT_CONFIG = 78
"""EX_CONFIG: the recipe, the data or a folder is wrong; do not requeue."""


class CoatnetError(Exception):
    """An error that is reported as a message without a traceback."""

    exit_code: int = EXIT_FAILED
    retryable: bool = False
    """Whether running the same command again may succeed."""
    if_repeated: str | None = None
    """What the same command does when it is given again, where the error knows."""
    is_consequence: bool = False
    """Whether the cause is in another process, which reports it."""


class DataError(CoatnetError):
    """Images, shards or an index that cannot be used; the message names the thing, what is wrong and the fix."""

    exit_code = EXIT_CONFIG


class StorageRefused(DataError):
    """A storage refuses access."""


class StorageDown(CoatnetError):
    """A storage has not answered for too long; the request may succeed later."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True

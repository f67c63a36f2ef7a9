"""What ends a command with a message for a person: the base of the program's errors, and those about data.

Exit codes are those of sysexits.h. Every error carries its own, so that whoever reports one needs no table.
"""

EXIT_FAILED = 70
"""EX_SOFTWARE: the run failed and would fail again; do not requeue."""
EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL: asked to stop, or ended for a reason that passes; the same command continues: requeue."""
EXIT_CONFIG = 78
"""EX_CONFIG: the recipe, the data or a folder is wrong; do not requeue."""


class CoatnetError(Exception):
    """An error that is reported as one message, without a traceback."""

    exit_code: int = EXIT_FAILED
    retryable: bool = False
    """Whether giving the same command again helps."""
    is_consequence: bool = False
    """Whether the cause lies in another process, which reports it."""


class DataError(CoatnetError):
    """Images, shards or an index that cannot be used; the message names the thing, what is wrong and the fix."""

    exit_code = EXIT_CONFIG


class StorageRefused(DataError):
    """A storage that refuses access."""


class StorageDown(CoatnetError):
    """A storage that has not answered for long; the request may succeed later."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True

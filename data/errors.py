"""Errors that end a command with a message for the user: the base class, and those about data.

Exit codes are those of sysexits.h. Each error class has its own, so that reporting one needs no table.
"""

import errno

EXIT_FAILED = 70
"""EX_SOFTWARE: the run failed and would fail again; do not requeue."""
EXIT_MACHINE_FAULTY = 71
"""EX_OSERR: a machine computes wrong values; requeue without it."""
EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL: stopped by a signal or a transient error; the same command continues: requeue."""
EXIT_CONFIG = 78
"""EX_CONFIG: the recipe, the data or a folder is wrong; do not requeue."""
EXIT_INTERRUPTED = 130
"""What a shell reports for SIGINT: a person pressed Ctrl-C; do not requeue."""


_PASSING = {
    errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.ENOLINK,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ECONNABORTED,
    errno.ECONNREFUSED, errno.ECONNRESET,
}  # fmt: skip
"""What network file systems answer while a server is away or fails over; of these, a local disk knows EIO alone."""


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


class LockHeld(CoatnetError):
    """A process of another node has the lock of a folder: it works there, or its node went down and the file server has
    not noticed yet."""

    exit_code = EXIT_TRY_AGAIN
    retryable = True


def may_pass(error: BaseException) -> bool:
    """Whether the operation that failed may succeed later, on this machine or on another one."""
    if isinstance(error, CoatnetError):
        return error.retryable
    return isinstance(error, OSError) and error.errno in _PASSING


def raise_if_passing(error: BaseException) -> None:
    """Raise `error` again if it may pass: it says nothing about the thing that could not be read or written."""
    if may_pass(error):
        raise error

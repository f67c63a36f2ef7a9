"""How many files this process may have open at a time: RLIMIT_NOFILE, whose soft limit it may raise to the hard one."""

import os
import resource

OTHER_FILES = 512
"""What a process is taken to need beside the files that it asks for: libraries, logs, sockets."""
_FEWEST = 16  # files that are promised even so


def allow_open_files(count: int) -> int:
    """Raise this process's limit of open files, usually 1,024, if `count` more might exceed it.

    Returns how many of them may be open: fewer if the hard limit, which only the system can raise, is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = max(OTHER_FILES, open_now() + OTHER_FILES // 2)  # rank 0 of many has thousands of connections
    needed = count + others
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return count
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return min(count, max(_FEWEST, limit - others))


def hard_limit() -> float:
    """How many files this process could be allowed; infinity without a limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return float("inf") if hard == resource.RLIM_INFINITY else hard


def open_now() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))

"""Code of a test that runs as another account."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import pytest

Answer = TypeVar("Answer")

NAMELESS = 54321
"""An account without a name, a home or rights, as containers run with."""


def open_to_all(folder: Path) -> None:
    """Let every account use `folder`, which pytest made for this one."""
    folder.chmod(0o777)
    for above in folder.parents:
        if above.name.startswith(("pytest", "popen")):  # the latter of its workers
            above.chmod(0o755)


def as_nameless(work: Callable[[], Answer]) -> Answer:
    """What `work` returns, or the exception that it raises, in a fork of this process that is `NAMELESS`."""
    if os.getuid() != 0:
        pytest.skip("only root may become another account")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NAMELESS)
            os.setuid(NAMELESS)
            found: tuple[bool, object] = (True, work())
        except Exception as error:
            found = (False, error)
        with open(writing, "wb") as out:
            pickle.dump(found, out)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answers:
        worked, answer = pickle.load(answers)
    os.waitpid(child, 0)
    if not worked:
        raise answer
    return cast(Answer, answer)

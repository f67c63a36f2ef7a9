"""The limit of open files of a real process."""

import subprocess
import sys

COMMAND = """
import resource
from data.files.open_file_limit import allow_open_files

def limits():
    return resource.getrlimit(resource.RLIMIT_NOFILE)

resource.setrlimit(resource.RLIMIT_NOFILE, (300, 4000))
print(allow_open_files(100), limits())
connections = [open("/dev/null") for _ in range(500)]
print(allow_open_files(100), limits()[0] >= 100 + 500 + 256)
print(allow_open_files(90_000) <= 4000 - 500 - 256, limits())
"""


def test_the_limit_is_raised_if_it_might_be_reached_with_what_is_open_already() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["100 (612, 4000)", "100 True", "True (4000, 4000)"]

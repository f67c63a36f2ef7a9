"""Ctrl-C in commands that save nothing: one line and 130, at every moment."""

import signal
import subprocess
import sys

import pytest

from tests.support.command import environment

WAITS_FOR_A_READ = """
import signal, time
from concurrent.futures import ThreadPoolExecutor
from jobs import exit_codes
exit_codes._CLEAN_UP_SECONDS = LIMIT
signal.signal(signal.SIGINT, signal.default_int_handler)
with exit_codes.exit_on_error("nothing was changed"), ThreadPoolExecutor(1) as pool:
    reading = pool.submit(time.sleep, 600)
    try:
        print("reads", flush=True)
        reading.result()
    finally:
        print("cleans up", flush=True)
"""
IMPORTS = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, *rest):
        if name == "MODULE":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["coatnet", "shards", "verify", "nowhere"]
runpy.run_module("jobs", run_name="__main__")
"""


def start(program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_read_that_does_not_end_delays_the_end_for_a_limited_time_and_not_after_a_second_control_c(
    again: bool,
) -> None:
    process = start(WAITS_FOR_A_READ.replace("LIMIT", "600" if again else "0.1"))
    assert process.stdout
    assert process.stdout.readline() == "reads\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleans up\n"
    if again:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "error: stopped; nothing was changed\n")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["typer", "jobs.exit_codes", "data.indexing.verify"])
def test_imports_answer_without_a_traceback(module: str) -> None:
    process = start(IMPORTS.replace("MODULE", module))
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "error: stopped; nothing was started\n")

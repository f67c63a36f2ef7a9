"""The `coatnet` command and its ranks as forks of one process that has done the imports, which saves seconds per start.

They are real processes that run the same `main`, with their own environment, signals and exit codes; for a new interpreter
use `tests.support.command.coatnet(..., fresh=True)`. Three processes are involved in a command:

server   imports, then forks for every request; ends with the process of the tests
keeper   waits for the command and sends its exit code
command  `main` of `coatnet`; the ranks that it starts are forks of it

This module imports little at its top: processes that a command spawns with `multiprocessing` import it again.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

_PARENT_DEATH_SIGNAL = 1  # prctl(2)


class Forked:
    """A running command, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = int(_line(connection))
        self.returncode: int | None = None
        self.stderr: IO[bytes] | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        if self.returncode is None:
            self._connection.settimeout(None if timeout is None else max(timeout, 1e-6))
            try:
                self.returncode = int(_line(self._connection))
            except TimeoutError:
                raise subprocess.TimeoutExpired("coatnet", timeout or 0.0) from None
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class PreforkServer:
    """Starts commands. Creating it takes as long as the imports; the server process ends with the process that created it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="coatnet-prefork-")
        self._address = f"{self._folder.name}/socket"
        # Threads do not survive a fork.
        fixed = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.prefork", self._address],
            env=environment | fixed,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def start(
        self,
        arguments: list[str],
        folder: Path,
        environment: dict[str, str],
        stdout: IO[bytes],
        stderr: IO[bytes],
        program: str = "",
    ) -> Forked:
        """Start `coatnet ARGUMENTS` in `folder` as the leader of a process group of its own.

        With `program`, a Python file or the name of a module, start `python FILE ARGUMENTS` or `python -m MODULE ARGUMENTS`.
        """
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        facts = {"arguments": arguments, "folder": str(folder), "environment": environment, "program": program}
        request = json.dumps(facts).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [stdout.fileno(), stderr.fileno()])
        connection.sendall(request)
        return Forked(connection)


def _line(connection: socket.socket) -> str:
    """A line from a connection. The connection's timeout applies to its first byte only."""
    received = b""
    while not received.endswith(b"\n"):
        piece = connection.recv(1)  # the rest belongs to the next line
        assert piece, "the prefork server has ended"
        received += piece
        connection.settimeout(None)
    return received.decode()


def _serve(address: str) -> NoReturn:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    _import_all()
    # Collections in commands and ranks, of which DeepSpeed forces some, then pass over what was imported: 0.3 s each.
    gc.collect()
    gc.freeze()
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "threads do not survive a fork"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:  # end of file: the process of the tests has ended
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _die_with_parent()
            _keep(connection)
        connection.close()


def _import_all() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as in pipeline/zero/engine.py
    for name in (
        "deepspeed.runtime.engine",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.zero.stage_1_and_2",
        "jobs.cli",
        "jobs.commands.run",
        "jobs.commands.train",
        "jobs.scheduler.job_end",
        "pipeline.stage",
        "torch._dynamo",
    ):
        importlib.import_module(name)
    del os.environ["TORCHDYNAMO_DISABLE"]


def _keep(connection: socket.socket) -> NoReturn:
    """Start the requested command; send its process id and, once it has ended, its exit code."""
    size, (stdout, stderr), _, _ = socket.recv_fds(connection, 8, 2)
    request = json.loads(_exactly(connection, int.from_bytes(size, "big")))
    command = os.fork()
    if command == 0:
        connection.close()
        _die_with_parent()
        os.setsid()
        os.chdir(request["folder"])
        if not request["program"]:
            subprocess.Popen = _popen  # type: ignore[assignment, misc]
        devnull = os.open(os.devnull, os.O_RDONLY)
        _run(request["arguments"], request["environment"], devnull, stdout, stderr, request["program"])
    os.close(stdout)
    os.close(stderr)
    connection.sendall(f"{command}\n".encode())
    _, status = os.waitpid(command, 0)
    with contextlib.suppress(BrokenPipeError):  # the tests have ended
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += connection.recv(size - len(received))
    return received


def _run(
    arguments: list[str], environment: dict[str, str], stdin: int, stdout: int, stderr: int, program: str = ""
) -> NoReturn:
    """Run `python -m jobs ARGUMENTS`, or another program, in this process as if it had been started for it."""
    import jobs
    from jobs.cli import main
    from pipeline.monitoring.bounded_output import finish_outputs

    os.environ.clear()
    os.environ.update(environment)
    for module in environment.get("TEST_IMPORTS", "").split():  # ranks are forks and have them too
        importlib.import_module(module)
    for place, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, place)
    # What `python -m jobs` has, which is where usage messages take the program's name from.
    sys.argv = [f"{jobs.__path__[0]}/__main__.py", *arguments]
    sys.modules["__main__"].__package__ = "jobs"
    code: Any = 1
    try:
        if program:
            _run_program(program, arguments)
        else:
            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    # Exit handlers of the processes that this one was forked from must not run.
    finish_outputs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_program(program: str, arguments: list[str]) -> None:
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


_real_popen = subprocess.Popen
_RANK_PROGRAMS = ([sys.executable, "-m", "jobs"], [sys.executable, "-P", "-m", "jobs"])
_MEASUREMENT = "pipeline.gpu_benchmark.worker"


def _popen(command: list[str], **options: Any) -> Any:
    """Replaces `subprocess.Popen` in a command: a rank, or a measurement, becomes a fork; all else starts as usual."""
    for program in _RANK_PROGRAMS:
        if command[: len(program)] == program:
            return _Rank(command[len(program) :], options)
    if command[1:4] == ["-P", "-m", _MEASUREMENT]:
        return _Rank(command[4:], options, _MEASUREMENT)
    return _real_popen(command, **options)


class _Rank:
    """The part of `subprocess.Popen` that `jobs/launch.py` and `pipeline/gpu_benchmark/processes.py` use."""

    def __init__(self, arguments: list[str], options: dict[str, Any], program: str = "") -> None:
        self.args = arguments
        self.returncode: int | None = None
        # A signal that arrives meanwhile must not find one process with the handlers of the other.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.pid = os.fork()
        if self.pid == 0:
            signal.set_wakeup_fd(-1)  # else the launcher would receive the rank's signals
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                if callable(signal.getsignal(number)) and number != signal.SIGINT:
                    signal.signal(number, signal.SIG_DFL)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            if options.get("process_group") == 0:
                os.setpgid(0, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            out = options.get("stdout")
            stdout = 1 if out is None else out.fileno()
            devnull = os.open(os.devnull, os.O_RDONLY)
            _run(arguments, options["env"], devnull, stdout, options["stderr"].fileno(), program)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    _serve(sys.argv[1])

"""The `coatnet` command and its ranks as forks of one process that has done the imports: seconds spared at each start.

They are real processes that run the very same `main`, with their own environment, signals and deaths; a real start is
`tests.support.command.coatnet(..., fresh=True)`. Three processes stand behind a command:

server   imports, then forks for every request; ends when the process of the tests does
keeper   waits for the command and sends its exit code
command  `main` of `coatnet`; the ranks that it starts are forks of it

This module stays light at its top: processes that a command spawns with `multiprocessing` import it again.
"""

import contextlib
import ctypes
import importlib
import json
import os
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
    """A command that was started, with what tests use of `subprocess.Popen`."""

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
            subprocess.TimeoutExpired: it still runs.
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
    """Starts commands; to start it takes the time of the imports. It ends with the process that has it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="coatnet-prefork-")
        self._address = f"{self._folder.name}/socket"
        # More than one thread would not survive the forks.
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
        self, arguments: list[str], folder: Path, environment: dict[str, str], stdout: IO[bytes], stderr: IO[bytes]
    ) -> Forked:
        """Start `coatnet ARGUMENTS` in `folder`, leading a process group of its own."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        request = json.dumps({"arguments": arguments, "folder": str(folder), "environment": environment}).encode()
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [stdout.fileno(), stderr.fileno()])
        connection.sendall(request)
        return Forked(connection)


def _line(connection: socket.socket) -> str:
    """A line from a connection; waits until it is whole, or fails by the connection's timeout before it has begun."""
    received = b""
    while not received.endswith(b"\n"):
        piece = connection.recv(1)  # what is behind it is another line
        assert piece, "the server of forks is gone"
        received += piece
        connection.settimeout(None)
    return received.decode()


def _serve(address: str) -> NoReturn:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    _import_all()
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "threads do not survive a fork"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers need nobody to wait for them
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:  # its other end is gone, and with it whoever could ask
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
        "jobs.chain",
        "jobs.cli",
        "pipeline.stage",
        "torch._dynamo",
    ):
        importlib.import_module(name)
    del os.environ["TORCHDYNAMO_DISABLE"]


def _keep(connection: socket.socket) -> NoReturn:
    """Start the command that is asked for, and tell its process id and, when it has ended, its exit code."""
    size, (stdout, stderr), _, _ = socket.recv_fds(connection, 8, 2)
    request = json.loads(_exactly(connection, int.from_bytes(size, "big")))
    command = os.fork()
    if command == 0:
        connection.close()
        _die_with_parent()
        os.setsid()
        os.chdir(request["folder"])
        subprocess.Popen = _popen  # type: ignore[assignment, misc]
        _run(request["arguments"], request["environment"], os.open(os.devnull, os.O_RDONLY), stdout, stderr)
    os.close(stdout), os.close(stderr)
    connection.sendall(f"{command}\n".encode())
    _, status = os.waitpid(command, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += connection.recv(size - len(received))
    return received


def _run(arguments: list[str], environment: dict[str, str], stdin: int, stdout: int, stderr: int) -> NoReturn:
    """Be a process that was started as `coatnet ARGUMENTS`."""
    from jobs.cli import main

    os.environ.clear()
    os.environ.update(environment)
    for place, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, place)
    sys.argv = ["coatnet", *arguments]
    code: Any = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    # Nothing of the processes that this one is a fork of may run at its end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_real_popen = subprocess.Popen


def _popen(command: list[str], **options: Any) -> Any:
    """In place of `subprocess.Popen` in a command: a rank becomes a fork, all else is what it always is."""
    if command[:4] == [sys.executable, "-P", "-m", "jobs"]:
        return _Rank(command[4:], options)
    return _real_popen(command, **options)


class _Rank:
    """What `jobs/launch.py` uses of `subprocess.Popen`."""

    def __init__(self, arguments: list[str], options: dict[str, Any]) -> None:
        self.args = arguments
        self.returncode: int | None = None
        # A signal that comes between must meet neither process in the state of the other.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.pid = os.fork()
        if self.pid == 0:
            signal.set_wakeup_fd(-1)  # else the launcher would hear what is sent to the rank
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                if callable(signal.getsignal(number)) and number != signal.SIGINT:
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            out = options.get("stdout")
            stdout = 1 if out is None else out.fileno()
            _run(arguments, options["env"], os.open(os.devnull, os.O_RDONLY), stdout, options["stderr"].fileno())
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

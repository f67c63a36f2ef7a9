"""A real Slurm cluster on this machine, for root: munge, a controller, four nodes, and on demand accounting."""

import contextlib
import itertools
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.servers.slurm_configuration import GPUS, write_configuration
from tests.support.ports import free_ports

_PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
_ACCOUNTING_PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
_SERVICES = ("munge", "database", "accounting", "controller")
_ISOLATED = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
# The shell stays as the first process of the namespace, and reaps what is orphaned there.
_BOOT = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && "$@"; exit $?'
# Keys of `scontrol show job` whose value is the rest of the line, whatever it holds.
_LONG_VALUES = re.compile("JobName|Command|WorkDir|Std(Err|In|Out)|(Admin|System)?Comment")


def obstacle(accounting: bool = False) -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid():
        return "no Slurm: starting one needs root"
    programs = _PACKAGES | (_ACCOUNTING_PACKAGES if accounting else {})
    missing = sorted({package for program, package in programs.items() if not shutil.which(program, path=_path())})
    if missing:
        return f"no Slurm: apt-get install {' '.join(missing)}"
    if subprocess.run([*_ISOLATED, "true"], capture_output=True).returncode:
        return "no Slurm: this machine does not let root make namespaces"
    return None


class SlurmCluster:
    """Four nodes, `node1` to `node4`, of 4 CPUs, 4,000 MB and 4 GPUs; the partitions are `main`, `low`, `lowgrace`, `high`.

    `high` preempts `main`'s neighbours `low` and `lowgrace`, of which the second grants 10 s of grace. Every daemon has its
    own namespaces of mounts, host names and processes: in jobs `hostname` says `node1`, the nodes' names resolve, process
    ids are those of the node, and the death of a namespace's first process is the power loss of a node, which nothing in
    it survives. The kernel ends them all with the thread that started the cluster, however that ends.

    Args:
        folder: for all that the daemons write, without spaces.
        accounting: whether `sacct` works, which takes seconds more to start.
        nodes: how many.
        requeue_delay: seconds that a job waits after it was requeued; 120 if a cluster does not say.
    """

    def __init__(self, folder: Path, accounting: bool = False, nodes: int = 4, requeue_delay: int = 10) -> None:
        self.folder = folder
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self._accounting = accounting
        self._requeue_delay = requeue_delay
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("log", "run", "munge", "spool", "state", "dev"):
            (folder / name).mkdir(parents=True)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        names = " ".join([*_SERVICES, *self.nodes])
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + f"\n127.0.0.1 {names}\n")
        for gpu in range(GPUS):  # only device nodes are taken for GPUs: these are /dev/null
            os.mknod(folder / "dev" / f"gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))

    @property
    def environment(self) -> dict[str, str]:
        """What clients need."""
        return {"SLURM_CONF": str(self._short / "slurm.conf"), "PATH": _path()}

    def start(self) -> None:
        """Start everything; the nodes are idle then.

        Raises:
            ChildProcessError: a daemon ended, with its last words.
        """
        # The path of a socket holds 107 bytes, fewer than a test's folder may have: the daemons see it through a link.
        self._links = tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp")
        self._short = Path(self._links.name) / "c"
        self._short.symlink_to(self.folder)
        for attempt in itertools.count(1):
            try:
                self._configure()
                self._start_daemons()
                return
            except ChildProcessError:  # perhaps somebody else was quicker to take one of the ports
                self._kill(*self._daemons)
                if attempt == 3:
                    self._links.cleanup()
                    raise

    def stop(self) -> None:
        """Kill everything, jobs included; the logs stay."""
        self._kill(*self._daemons)
        self._links.cleanup()

    def reset(self) -> None:
        """Cancel all jobs and bring everything back that is down: the nodes are idle then."""
        for name in ("controller", *self.nodes):
            if not self._runs(name):
                self._start_daemon(name)
        self._await_answer("scontrol", "ping", daemon="controller")
        self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
        _wait(lambda: not self._cancel_jobs(), "a job does not end")
        _wait(lambda: self._usable(self.nodes, "idle"), "a node does not come back")

    def fail_node(self, name: str, told: bool = True) -> None:
        """A power loss: the daemon, the steps and the jobs of a node die at once.

        The controller notices after SlurmdTimeout, 15 to 35 s; with `told`, as if by an administrator, now.
        """
        self._kill(name)
        if told:
            self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=power loss")

    def start_node(self, name: str) -> None:
        """Boot a node that failed, and wait until it takes jobs."""
        self._start_daemon(name)
        _wait(lambda: self._usable([name], "idle", "mixed", "allocated"), f"{name} does not come back")

    def kill_controller(self) -> None:
        """SIGKILL for slurmctld; jobs go on. What it was told in the last seconds it may not have saved."""
        self._kill("controller")

    def start_controller(self) -> None:
        """Start slurmctld again with what it saved, and wait until it answers."""
        self._start_daemon("controller")
        self._await_answer("scontrol", "ping", daemon="controller")

    def processes(self, name: str) -> list[psutil.Process]:
        """What runs on a node, its daemon included, as this machine sees it: the ids in jobs are others."""
        processes: list[psutil.Process] = psutil.Process(self._daemons[name].pid).children(recursive=True)
        return processes

    def run(self, *command: str, check: bool = True) -> str:
        """Run a client's command; returns its output.

        Raises:
            ChildProcessError: it failed, with what it said, unless not `check`.
        """
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.environment)
        if check and done.returncode:
            raise ChildProcessError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: str | int) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of one task of an array, by its keys: JobState, Reason, NodeList, ..."""
        return parse_job(self.run("scontrol", "show", "job", str(number)))

    def wait_for(self, number: str | int, *states: str, seconds: float = 120) -> dict[str, str]:
        """Wait until the job is in one of these states (RUNNING, PENDING, COMPLETED, ...); returns `job` then."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is not {' or '.join(states)} after {seconds} s: {job}"
            time.sleep(0.2)
        return job

    def requeue_now(self, number: str | int, seconds: float = 120) -> None:
        """Spare a job that is being requeued its delay, once it pends; if it has ended meanwhile, the delay is over."""
        if self.wait_for(number, "PENDING", "COMPLETED", "FAILED", seconds=seconds)["JobState"] == "PENDING":
            # Not `now`: on the node and in the second in which it was killed its new credential counts as revoked.
            self.run("scontrol", "update", f"jobid={number}", "StartTime=now+2", check=False)

    def end_soon(self, number: str | int, seconds: int) -> None:
        """Let the time limit of a running job be that far away; Slurm looks twice a minute."""
        self.run("scontrol", "update", f"jobid={number}", f"EndTime=now+{seconds}")

    def _configure(self) -> None:
        names = [*_SERVICES, *self.nodes]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        write_configuration(self.folder, self._short, self.nodes, self._ports, self._requeue_delay, self._accounting)

    def _start_daemons(self) -> None:
        self._start_daemon("munge")
        _wait(lambda: self._alive("munge") and (self.folder / "munge" / "socket").exists(), "munge")
        if self._accounting:
            self._start_database()
            _wait(lambda: self._alive("database") and _listens(self._ports["database"]), "the database")
            self._start_daemon("accounting")
            self._await_answer("sacctmgr", "show", "cluster", daemon="accounting")
            self.run("sacctmgr", "-i", "add", "cluster", "test", check=False)
        self._start_daemon("controller")
        for node in self.nodes:
            self._start_daemon(node)
        self._await_answer("scontrol", "ping", daemon="controller")
        _wait(self._up, "the nodes do not come up")

    def _up(self) -> bool:
        return all(map(self._alive, self._daemons)) and self._usable(self.nodes, "idle")

    def _start_database(self) -> None:
        if not (self.folder / "database").exists():
            command = ["mariadb-install-db", *self._database_options(), "--skip-test-db"]
            command += ["--auth-root-authentication-method=socket"]
            subprocess.run(command, check=True, capture_output=True, env=os.environ | self.environment)
        self._start_daemon("database")

    def _database_options(self) -> list[str]:
        data = f"--datadir={self.folder / 'database'}"
        return ["--no-defaults", data, "--user=root", "--innodb-flush-method=nosync", "--innodb-log-file-size=16M"]

    def _command(self, name: str) -> list[str]:
        folder, configuration = self._short, f"{self._short}/slurm.conf"
        match name:
            case "munge":
                return [
                    "munged", "--foreground", "--force", f"--key-file={folder}/munge/key", f"--socket={folder}/munge/socket",
                    f"--pid-file={folder}/munge/pid", f"--log-file={folder}/log/munge", f"--seed-file={folder}/munge/seed",
                ]  # fmt: skip
            case "database":
                return [
                    "mariadbd", *self._database_options(), "--bind-address=127.0.0.1", f"--port={self._ports[name]}",
                    f"--socket={folder}/run/database", f"--pid-file={folder}/run/database.pid",
                    f"--init-file={folder}/grant.sql", "--skip-name-resolve", "--skip-log-bin", "--performance-schema=OFF",
                    "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
                ]  # fmt: skip
            case "accounting":
                return ["slurmdbd", "-D"]
            case "controller":
                return ["slurmctld", "-D", "-i", "-f", configuration]
            case _:
                return ["slurmd", "-D", "-N", name, "-f", configuration]

    def _start_daemon(self, name: str) -> None:
        assert not self._runs(name), f"{name} runs"
        boot = [*_ISOLATED, "sh", "-c", _BOOT, "sh", str(self.folder / "hosts"), name, *self._command(name)]
        with open(self.folder / "log" / f"{name}.output", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *boot],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder / "run",
                env=os.environ | self.environment, start_new_session=True,
            )  # fmt: skip

    def _kill(self, *names: str) -> None:
        daemons = [self._daemons.pop(name) for name in names]
        for daemon in daemons:
            if daemon.poll() is None:
                # The first process of a namespace: all others die with it, and only then `unshare` ends.
                for process in psutil.Process(daemon.pid).children() or [daemon]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
        for daemon in daemons:
            daemon.wait(30)

    def _runs(self, name: str) -> bool:
        return name in self._daemons and self._daemons[name].poll() is None

    def _alive(self, name: str) -> bool:
        if self._runs(name):
            return True
        words = [file.read_text(errors="replace")[-2000:] for file in sorted((self.folder / "log").glob("*"))]
        raise ChildProcessError(f"{name} of the Slurm cluster ended\n" + "\n".join(words))

    def _await_answer(self, *command: str, daemon: str) -> None:
        def answers() -> bool:
            client = subprocess.run(command, capture_output=True, env=os.environ | self.environment)
            return self._alive(daemon) and client.returncode == 0

        _wait(answers, f"{daemon} does not answer")

    def _cancel_jobs(self) -> list[str]:
        jobs = self.run("squeue", "--noheader", "--all", "--format=%A").split()
        if jobs:
            self.run("scancel", *jobs, check=False)
        return jobs

    def _usable(self, nodes: list[str], *states: str) -> bool:
        found = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False).split()
        state = dict(zip(found[::2], found[1::2], strict=True))
        for node in nodes:
            if re.search("down|drain|fail|inval", state.get(node, "")):
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return all(state.get(node) in states for node in nodes)


def parse_job(record: str) -> dict[str, str]:
    """The keys and values of the first record that `scontrol show job` prints; values may hold spaces and lines."""
    values: dict[str, str] = {}
    key = ""
    for line in record.split("\n\nJobId=")[0].strip().splitlines():
        fields = re.split(r" (?=[A-Z][\w:/]*=)", line.strip())
        if not re.match(r"(   |JobId=)", line):
            values[key] += f"\n{line.rstrip()}"
            continue
        while fields:
            key, _, value = fields.pop(0).partition("=")
            if _LONG_VALUES.fullmatch(key):
                value = " ".join([value, *fields])
                fields = []
            values[key] = value
    return values


def _wait(condition: Callable[[], bool], failure: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.1)


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0

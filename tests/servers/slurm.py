"""A real Slurm cluster on this machine, for root: munge, a controller, four nodes, and optionally accounting."""

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
# The daemons come before tests that compute; jobs have the priority of `sbatch`, see PropagatePrioProcess.
_FIRST = ["nice", "-n", "-10"]
_ISOLATED = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
# The shell remains the first process of the namespace and reaps orphans.
_BOOT = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && "$@"; exit $?'
# States that a job does not leave by itself.
_FINAL = ("COMPLETED", "FAILED", "CANCELLED", "OUT_OF_MEMORY")
# A limit for what never happens: on a busy machine everything takes longer.
_SECONDS = 300
# Keys of `scontrol show job` whose value is the rest of the line.
_LONG_VALUES = re.compile("JobName|Command|WorkDir|Std(Err|In|Out)|(Admin|System)?Comment")


def obstacle(accounting: bool = False) -> str | None:
    """Why a cluster cannot be started here, or None."""
    if os.geteuid():
        return "no Slurm: starting one needs root"
    programs = _PACKAGES | (_ACCOUNTING_PACKAGES if accounting else {})
    missing = sorted({package for program, package in programs.items() if not shutil.which(program, path=_path())})
    if missing:
        return f"no Slurm: apt-get install {' '.join(missing)}"
    if subprocess.run([*_ISOLATED, "true"], capture_output=True).returncode:
        return "no Slurm: root cannot create namespaces on this machine"
    return None


class SlurmCluster:
    """Four nodes, `node1` to `node4`, of 4 CPUs, 4,000 MB and 4 GPUs; the partitions are `main`, `low`, `lowgrace`, `high`.

    `high` preempts `low` and `lowgrace`; the latter has a grace time of 10 s. Every daemon has its own mount, host name and
    process namespaces: in jobs `hostname` prints `node1`, names of nodes resolve, process ids are those of the node, and
    killing the first process of a namespace is the power loss of a node, which no process on it survives. The kernel kills
    all of them when the thread that started the cluster ends, however it ends.

    Args:
        folder: for all files of the daemons; the path must not contain spaces.
        accounting: whether `sacct` works; starting it takes some more seconds.
        nodes: their number.
        requeue_delay: seconds that a requeued job waits, and that a credential is valid; Slurm's default is 120.
    """

    def __init__(self, folder: Path, accounting: bool = False, nodes: int = 4, requeue_delay: int = 50) -> None:
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
        for gpu in range(GPUS):  # Slurm only accepts device files as GPUs: these are /dev/null
            os.mknod(folder / "dev" / f"gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))

    @property
    def environment(self) -> dict[str, str]:
        """Variables that clients need."""
        return {"SLURM_CONF": str(self._short / "slurm.conf"), "PATH": _path()}

    def start(self) -> None:
        """Start everything and wait until the nodes are idle.

        Raises:
            ChildProcessError: a daemon ended; the message has the end of its log.
        """
        # Paths of sockets are limited to 107 bytes, which the folder of a test may exceed: the daemons use a symbolic link.
        self._links = tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp")
        self._short = Path(self._links.name) / "c"
        self._short.symlink_to(self.folder)
        for attempt in itertools.count(1):
            try:
                self._configure()
                self._start_daemons()
                return
            except ChildProcessError:  # another process may have taken one of the ports
                self._kill(*self._daemons)
                if attempt == 3:
                    self._links.cleanup()
                    raise

    def stop(self) -> None:
        """Kill everything, including jobs; the logs remain."""
        self._kill(*self._daemons)
        self._links.cleanup()

    def reset(self) -> None:
        """Cancel all jobs, restart what is down, and wait until the nodes are idle."""
        for name in ("controller", *self.nodes):
            if not self._runs(name):
                self._start_daemon(name)
        self._await_answer("scontrol", "ping", daemon="controller")
        self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
        self.wait_until(lambda: not self._cancel_jobs(), "a job has not ended")
        self.wait_until(lambda: self._usable(self.nodes, "idle"), "a node is not idle again")

    def fail_node(self, name: str) -> None:
        """A power loss: daemon, steps and jobs of a node die at once, and an administrator informs the controller."""
        self._kill(name)
        # An answer of the daemon that was on its way returns a node to service that is only down, and jobs to it.
        for state in ("drain", "down"):
            self.run("scontrol", "update", f"nodename={name}", f"state={state}", "reason=power loss")

    def start_node(self, name: str) -> None:
        """Boot a node that failed, and wait until it takes jobs."""
        self._start_daemon(name)
        self.wait_until(lambda: self._usable([name], "idle", "mixed", "allocated"), f"{name} is not usable again")

    def kill_controller(self) -> None:
        """SIGKILL for slurmctld; jobs continue. Changes of the last seconds may not have been saved."""
        self._kill("controller")

    def start_controller(self) -> None:
        """Restart slurmctld with its saved state and wait until it responds."""
        self._start_daemon("controller")
        self._await_answer("scontrol", "ping", daemon="controller")

    def processes(self, name: str) -> list[psutil.Process]:
        """The processes of a node including its daemon, with the process ids of this machine, not those inside jobs."""
        processes: list[psutil.Process] = psutil.Process(self._daemons[name].pid).children(recursive=True)
        return processes

    def run(self, *command: str, check: bool = True) -> str:
        """Run a client command and return its output.

        Raises:
            ChildProcessError: it failed and `check` is set; the message has its output.
        """
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | self.environment)
        if check and done.returncode:
            raise ChildProcessError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: str | int) -> dict[str, str]:
        """The fields of `scontrol show job` for a job or one task of an array: JobState, Reason, NodeList, ..."""
        return parse_job(self.run("scontrol", "show", "job", str(number)))

    def wait_until(self, condition: Callable[[], bool], failure: str = "waited too long") -> None:
        """Poll `condition` until it holds; what fails says what Slurm knows about all jobs and nodes."""
        deadline = time.monotonic() + _SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{failure}\n{self._knowledge()}"
            time.sleep(0.1)

    def wait_for(self, number: str | int, *states: str) -> dict[str, str]:
        """Wait until the job is in one of these states (RUNNING, PENDING, COMPLETED, ...); returns `job` then.

        Fails at once if the job has ended in another state.
        """
        expected = f"job {number}: {' or '.join(states)} expected"
        job: dict[str, str] = {}

        def reached() -> bool:
            job.update(self.job(number))
            assert job["JobState"] in states or job["JobState"] not in _FINAL, f"{expected}\n{self._knowledge()}"
            return job["JobState"] in states

        self.wait_until(reached, expected)
        return job

    def wait_for_restart(self, number: str | int, restarts: int = 1) -> None:
        """Wait until Slurm has requeued the job that often, then shorten its delay; fails if the job has ended instead."""
        expected = f"job {number}: restart {restarts} expected"

        def restarted() -> bool:
            job = self.job(number)
            if int(job["Restarts"]) >= restarts:
                return True
            assert job["JobState"] not in _FINAL, f"{expected}\n{self._knowledge()}"
            return False

        self.wait_until(restarted, expected)
        self.requeue_now(number)

    def requeue_now(self, number: str | int) -> None:
        """Shorten the delay of a job that is being requeued, once it is pending; does nothing if it has ended meanwhile."""
        if self.wait_for(number, "PENDING", *_FINAL)["JobState"] == "PENDING":
            # Not `now`: in the second in which the job was killed, its node would treat the new credential as revoked.
            self.run("scontrol", "update", f"jobid={number}", "StartTime=now+2", check=False)

    def end_soon(self, number: str | int, seconds: int) -> None:
        """Set the time limit of a running job that many seconds ahead; Slurm checks limits twice a minute."""
        self.run("scontrol", "update", f"jobid={number}", f"EndTime=now+{seconds}")

    def _configure(self) -> None:
        names = [*_SERVICES, *self.nodes]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        write_configuration(self.folder, self._short, self.nodes, self._ports, self._requeue_delay, self._accounting)

    def _start_daemons(self) -> None:
        self._start_daemon("munge")
        self.wait_until(lambda: self._alive("munge") and (self.folder / "munge" / "socket").exists(), "munge")
        if self._accounting:
            self._start_database()
            self.wait_until(lambda: self._alive("database") and _listens(self._ports["database"]), "the database")
            self._start_daemon("accounting")
            self._await_answer("sacctmgr", "show", "cluster", daemon="accounting")
            self.run("sacctmgr", "-i", "add", "cluster", "test", check=False)
        self._start_daemon("controller")
        for node in self.nodes:
            self._start_daemon(node)
        self._await_answer("scontrol", "ping", daemon="controller")
        self.wait_until(self._up, "the nodes are not up")

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
                [*_FIRST, "setpriv", "--pdeathsig", "KILL", *boot],
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

        self.wait_until(answers, f"{daemon} does not respond")

    def _cancel_jobs(self) -> list[str]:
        jobs = self.run("squeue", "--noheader", "--all", "--format=%A").split()
        if jobs:
            self.run("scancel", *jobs, check=False)
        return jobs

    def _knowledge(self) -> str:
        """What Slurm knows about its jobs and nodes, and the end of the controller's log."""
        shown = [self.run("scontrol", "show", what, check=False) for what in ("jobs", "nodes")]
        log = self.folder / "log" / "slurmctld"
        return "\n".join([*shown, log.read_text(errors="replace")[-6000:] if log.exists() else ""])

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


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0

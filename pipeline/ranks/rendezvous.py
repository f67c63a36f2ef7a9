"""Where the ranks of a run meet, as the environment says: checked before any of them waits for the others."""

import errno
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from data.files.open_file_limit import OTHER_FILES, allow_open_files, hard_limit, open_now
from pipeline.errors import CAUSE_FILE, ConfigError, PortTaken

log = logging.getLogger(__name__)

STORE_FOLDER = "COATNET_STORE_FOLDER"
"""Environment variable with a folder that belongs to this account alone, in which the ranks of one machine meet."""
LAUNCHER = "COATNET_LAUNCHER"
"""Environment variable of ranks that this program has started on their machine, with the number of that process."""
STORE_SECRET = "COATNET_STORE_SECRET"  # noqa: S105
"""Environment variable with what the keys of a job's ranks begin with in the store at MASTER_ADDR and MASTER_PORT, so
that ranks of another job that come to the same port neither read nor change them."""

_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_RESOLVE_SECONDS = 60.0
"""How long the name of the first rank's machine may be unknown: that of a pod appears when the pod has started."""
STORE_CONNECTIONS = 2
"""Of each rank to the store where the ranks meet: for its process group, and for its watchdog."""
_LEAST_OTHERS = 64
"""Files without which a rank cannot do anything, beside those that it has open when the ranks meet."""
_INTERFACES = {"nccl": "NCCL_SOCKET_IFNAME", "gloo": "GLOO_SOCKET_IFNAME"}


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """This process among the ranks of a run, and where they meet: in a folder, or else at an address and port."""

    rank: int
    world_size: int
    local_rank: int
    address: str = ""
    port: int = 0
    folder: str | None = None
    secret: str = ""

    @property
    def is_local(self) -> bool:
        """Whether all ranks run on this machine, as far as the environment says."""
        return self.folder is not None or _is_loopback(self.address)


def read_rendezvous(environment: Mapping[str, str]) -> Rendezvous:
    """What RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say, or `STORE_FOLDER` instead of the last two.

    Raises:
        ConfigError: one of them is not set, or they cannot be those of a rank.
    """
    folder = environment.get(STORE_FOLDER) or None
    needed = _OWN if folder else _OWN + _ADDRESS
    present = [name for name in needed if environment.get(name)]
    if missing := [name for name in needed if name not in present]:
        raise ConfigError(
            f"the environment has no {', '.join(missing)}, which a rank needs; "
            + (f"unset {', '.join(present)}, with which this process is taken for a rank, or " if present else "")
            + "start all ranks with torchrun"
        )
    rank, world_size, local_rank = (_number(environment, name) for name in _OWN)
    counts = {"RANK": ("WORLD_SIZE", world_size), "LOCAL_RANK": ("WORLD_SIZE", world_size)}
    if "LOCAL_WORLD_SIZE" in environment:
        counts["LOCAL_RANK"] = "LOCAL_WORLD_SIZE", _number(environment, "LOCAL_WORLD_SIZE")
    for name, (of, count) in counts.items():
        if int(environment[name]) >= count:
            raise ConfigError(
                f"{name}={environment[name]} is no rank of {of}={count}: they count from 0; correct or unset them"
            )
    if folder:
        return Rendezvous(rank, world_size, local_rank, folder=folder)
    port = _number(environment, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise ConfigError(f"MASTER_PORT={port} is no port; give all ranks one from 1024 to 65535")
    secret = environment.get(STORE_SECRET, "")
    return Rendezvous(rank, world_size, local_rank, environment["MASTER_ADDR"], port, secret=secret)


def check_world_size(name: str, ranks: int, found: Rendezvous) -> None:
    """Check that as many ranks of stage `name` were started as the recipe has.

    Raises:
        ConfigError: they were not; variables that are left over from something else make one rank of any command.
    """
    if found.world_size != ranks:
        raise ConfigError(
            f"stage {name}: resources.ranks is {ranks}, and RANK={found.rank} WORLD_SIZE={found.world_size} in the "
            f"environment make this process one of {found.world_size}; start {ranks}, set resources.nodes and "
            f"resources.ranks={found.world_size}, or unset the variables if they are left over"
        )


def check_reachable(found: Rendezvous, backend: str) -> None:
    """Check that the ranks can meet, and that this one has the network interface that `backend` was told to use.

    Raises:
        ConfigError: a name that does not resolve, a folder that is not this account's alone, or an interface that is
            not there.
    """
    check_interface(backend)
    if found.folder is None:
        _resolve(found)
    else:
        _check_private(found.folder)


def allow_connections(found: Rendezvous, backend: str, *, holds_store: bool) -> None:
    """Raise this process's limit of open files to what its connections to the other ranks need.

    Args:
        found: where the ranks meet.
        backend: `gloo` connects every rank to every other.
        holds_store: whether this process holds the store, to which all ranks connect. Those that come when its files
            are used up would try again and again, and none of them would say why.

    Raises:
        ConfigError: the hard limit is too low for the connections.
    """
    what = [f"{STORE_CONNECTIONS} connections of each to the store that rank 0 holds"] if holds_store else []
    what += ["one of gloo to each"] if backend == "gloo" else []
    connections = found.world_size * (STORE_CONNECTIONS * holds_store + (backend == "gloo"))
    needed, hard = connections + open_now() + _LEAST_OTHERS, hard_limit()
    if needed > hard:
        raise ConfigError(
            f"the hard limit of open files of rank {found.rank} on {socket.gethostname()} is {hard:,.0f}, too low for "
            f"{found.world_size:,} ranks ({' and '.join(what)}): it needs {connections + 2 * OTHER_FILES:,}; raise it "
            "where the job starts (`ulimit -Hn`, LimitNOFILE= of slurmd, --ulimit nofile= of a container)"
        )
    allow_open_files(connections)


def listen_for_ranks(found: Rendezvous) -> socket.socket:
    """A socket that listens where the ranks meet, on the address that MASTER_ADDR has on this machine and no other.

    It listens on all addresses, with a warning, if MASTER_ADDR is none of this machine, as with address translation, or
    a loopback address under the name of the machine, which other machines know under another one.

    Raises:
        ConfigError: the port is taken.
        PortTaken: the port of a job is taken.
    """
    reason = "is no address of this machine"
    try:
        for family, _, _, _, (host, *_) in socket.getaddrinfo(found.address, found.port, type=socket.SOCK_STREAM):
            if _is_loopback(str(host)) and not found.is_local:
                reason = f"means {host} here, where no other machine can connect"
                continue
            try:
                return socket.create_server((host, found.port), family=family)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        log.warning("MASTER_ADDR=%s %s: rank 0 listens on all addresses of this machine", found.address, reason)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", found.port), family=family, dualstack_ipv6=both)
    except OSError as error:
        # A program that waits for the ranks of a job has chosen the port, and starts the job again.
        kind = PortTaken if CAUSE_FILE in os.environ else ConfigError
        raise kind(
            f"MASTER_PORT={found.port}: rank 0 cannot listen there on {socket.gethostname()} "
            f"({error.strerror}); end what does, or give all ranks another port"
        ) from None


def keep_to_this_machine() -> None:
    """Let Gloo and NCCL listen on the loopback interface alone, unless their variables name others."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == "127.0.0.1" for one in addresses):
            for variable, value in (("GLOO_SOCKET_IFNAME", name), ("NCCL_SOCKET_IFNAME", f"={name}")):
                if not os.environ.get(variable):
                    os.environ[variable] = value
            return


def check_interface(backend: str) -> None:
    """Check that this machine has a network interface that the variable of `backend`, `nccl` or `gloo`, selects.

    Raises:
        ConfigError: it does not; the message has those that exist.
    """
    variable = _INTERFACES[backend]
    value = os.environ.get(variable, "")
    addresses = {
        name: [one for one in found if one.family in (socket.AF_INET, socket.AF_INET6)]
        for name, found in psutil.net_if_addrs().items()
    }
    usable = sorted(name for name, found in addresses.items() if found)
    wrong = _unmatched(value, usable) if backend == "nccl" else _absent(value, usable)
    if not wrong:
        return
    idle = [name for name in wrong if name in addresses]
    reason = f"{idle[0]} has no address" if idle else f"there is no {' or '.join(wrong)}"
    raise ConfigError(
        f"{variable}={value}: {reason} on {socket.gethostname()}, whose interfaces with an address are "
        f"{', '.join(usable)}; correct or unset {variable}"
    )


def _unmatched(value: str, names: list[str]) -> list[str]:
    """The words of NCCL_SOCKET_IFNAME if they select none of these interfaces.

    They are prefixes, or whole names after `=`; after `^` they exclude
    (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html).
    """
    excludes, rest = value.startswith("^"), value.removeprefix("^")
    exact, rest = rest.startswith("="), rest.removeprefix("=")
    words = [word.partition(":")[0] for word in rest.split(",") if word]  # a port may follow
    if not words or any(
        any(name == word if exact else name.startswith(word) for word in words) != excludes for name in names
    ):
        return []
    return [f"other interface than {', '.join(words)}"] if excludes else words


def _absent(value: str, names: list[str]) -> list[str]:
    """The names in GLOO_SOCKET_IFNAME, all of which Gloo uses, that are none of these interfaces."""
    return [name for name in value.split(",") if name not in names] if value else []


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


def _check_private(folder: str) -> None:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise ConfigError(
            f"{STORE_FOLDER}={folder}: {error.strerror} on {socket.gethostname()}; the ranks of a machine meet there, "
            "so that a container has to mount it"
        ) from None
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise ConfigError(f"{STORE_FOLDER}={folder}: other accounts can use this folder; give it mode 700")


def _resolve(found: Rendezvous) -> None:
    deadline = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(found.address, found.port)
            return
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"MASTER_ADDR={found.address}: {socket.gethostname()} cannot resolve this name ({error}); give all "
                    "ranks a name or address of rank 0's machine that they can reach"
                ) from None
            time.sleep(1.0)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} in the environment is not a whole number; correct or unset it")
    return int(text)

"""What ranks read from the environment about each other, refused before they wait for each other."""

import os
import re
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
import torch

from pipeline.errors import ConfigError, PortTaken
from pipeline.faults.preemption import StopSignals
from pipeline.ranks import distributed, rendezvous
from pipeline.ranks.distributed import Ranks, join_ranks, join_without_gpus
from pipeline.ranks.rendezvous import (
    Rendezvous,
    allow_connections,
    check_interface,
    check_reachable,
    check_world_size,
    keep_to_this_machine,
    listen_for_ranks,
    read_rendezvous,
)
from pipeline.recipe.loader import load_recipe
from pipeline.stage import run_stage
from tests.support.ports import free_ports
from tests.support.recipes import write_recipe

RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
NIC = next(name for name, found in psutil.net_if_addrs().items() if any(one.address == "127.0.0.1" for one in found))


def test_a_rank_knows_itself_and_where_to_meet() -> None:
    assert read_rendezvous(RANK) == Rendezvous(1, 2, 1, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": "", "LOCAL_RANK": ""}, "the environment has no LOCAL_RANK, MASTER_ADDR, which a rank needs; unset RANK, WORLD_SIZE, MASTER_PORT, with which this process is taken for a rank, or start all ranks with torchrun"),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT=tcp://10.0.0.1:80 in the environment is not a whole number; correct or unset it"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port; give all ranks one from 1024 to 65535"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0 in the environment is not a whole number; correct or unset it"),
        ({"RANK": "2"}, "RANK=2 is no rank of WORLD_SIZE=2: they count from 0; correct or unset them"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is no rank of WORLD_SIZE=2: they count from 0; correct or unset them"),
        ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 is no rank of LOCAL_WORLD_SIZE=1: they count from 0; correct or unset them"),
    ],
)  # fmt: skip
def test_variables_that_cannot_be_those_of_a_rank_are_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_rendezvous(RANK | changes)
    assert str(raised.value) == message


def test_ranks_are_as_many_as_the_recipe_has() -> None:
    check_world_size("pretrain", 2, read_rendezvous(RANK))
    with pytest.raises(ConfigError, match=r"stage pretrain: resources.ranks is 8, and RANK=1 WORLD_SIZE=2 in the env"):
        check_world_size("pretrain", 8, read_rendezvous(RANK))


def test_a_stage_does_not_start_on_other_ranks_than_those_of_its_recipe(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, shards), ["resources.ranks=2"])
    for name, value in (RANK | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="stage pretrain: resources.ranks is 2, and RANK=0 WORLD_SIZE=1"):
        run_stage(recipe, "pretrain", StopSignals(_end), node="here", started=0.0, job_end_time=lambda: None)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("join", [join_without_gpus, lambda: join_ranks(torch.get_num_threads())])
def test_ranks_that_join_have_checked_their_interface(
    join: Callable[[], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (RANK | {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "=none0")
    with pytest.raises(ConfigError, match="_SOCKET_IFNAME==none0: there is no =?none0 on"):
        join()


def test_the_leader_may_open_a_connection_for_each_rank_before_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listens(Exception):
        pass

    def listen(found: Rendezvous) -> NoReturn:
        raise Listens(resource.getrlimit(resource.RLIMIT_NOFILE)[0])

    monkeypatch.setattr(distributed, "listen_for_ranks", listen)
    for name, value in (RANK | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "500", "DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        with pytest.raises(Listens) as raised:
            join_without_gpus()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert int(str(raised.value)) >= 1500 + 512  # two to the store, and one to each by gloo


@pytest.mark.parametrize(
    ("backend", "holds_store", "connections", "what"),
    [
        ("nccl", True, 8192, "2 connections of each to the store that rank 0 holds"),
        ("gloo", True, 12288, "2 connections of each to the store that rank 0 holds and one of gloo to each"),
        ("gloo", False, 4096, "one of gloo to each"),
    ],
)
def test_a_hard_limit_of_open_files_that_is_too_low_is_refused_before_ranks_wait(
    backend: str, holds_store: bool, connections: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[tuple[int, int]] = []
    found = read_rendezvous(RANK | {"WORLD_SIZE": "4096"})
    monkeypatch.setattr(resource, "setrlimit", lambda _which, limits: allowed.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1024, connections))
    with pytest.raises(ConfigError) as raised:
        allow_connections(found, backend, holds_store=holds_store)
    assert str(raised.value) == (
        f"the hard limit of open files of rank 1 on {socket.gethostname()} is {connections:,}, too low for 4,096 ranks "
        f"({what}): it needs {connections + 1024:,}; raise it where the job starts (`ulimit -Hn`, LimitNOFILE= of "
        "slurmd, --ulimit nofile= of a container)"
    )
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1024, connections + 2000))
    allow_connections(found, backend, holds_store=holds_store)
    assert connections + 512 <= allowed[0][0] <= connections + 2000
    allow_connections(found, "nccl", holds_store=False)  # connects to few
    assert len(allowed) == 1


def _end(code: int, message: str) -> NoReturn:
    raise SystemExit(f"{code}: {message}")


def test_a_port_that_another_process_listens_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_ports(1)[0]
    leader = read_rendezvous(RANK | {"RANK": "0", "MASTER_PORT": str(port)})
    with listen_for_ranks(leader):
        with pytest.raises(ConfigError, match=rf"MASTER_PORT={port}: rank 0 cannot listen there on .*already in use"):
            listen_for_ranks(leader)
        monkeypatch.setenv("COATNET_CAUSE_FILE", "x")
        with pytest.raises(PortTaken):  # the job is requeued
            listen_for_ranks(leader)


# An address of a name, where rank 0 then listens, and what the warning says.
@pytest.mark.parametrize(
    ("resolved", "listens", "warning"),
    [
        ("127.0.0.1", "127.0.0.1", ""),
        ("localhost", "127.0.0.1", ""),
        ("first-node 192.0.2.1", "", "MASTER_ADDR=first-node is no address of this machine: rank 0 listens on all"),
        ("first-node 127.0.1.1", "", "first-node means 127.0.1.1 here, where no other machine can connect: rank 0 lis"),
        ("first-node 192.0.2.1 127.0.0.1", "", "where no other machine can connect"),
    ],
)
def test_rank_0_listens_on_the_address_of_its_name_alone(
    resolved: str, listens: str, warning: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, *addresses = resolved.split()
    port = free_ports(1)[0]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses or ["127.0.0.1"]]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: found)
    with listen_for_ranks(read_rendezvous(RANK | {"MASTER_ADDR": name, "MASTER_PORT": str(port)})) as listener:
        assert listener.getsockname()[0].strip(":.0") == listens.strip("0")
        assert listener.getsockname()[1] == port
    assert warning in caplog.text
    assert bool(warning) == bool(caplog.records)


def test_ranks_of_one_machine_need_no_address_but_a_folder_of_their_own(tmp_path: Path) -> None:
    own = {name: value for name, value in RANK.items() if not name.startswith("MASTER")}
    found = read_rendezvous(own | {"COATNET_STORE_FOLDER": str(tmp_path)})
    assert found == Rendezvous(1, 2, 1, folder=str(tmp_path))
    tmp_path.chmod(0o750)
    with pytest.raises(
        ConfigError, match=r"COATNET_STORE_FOLDER=.*: other accounts can use this folder; give it mode 7"
    ):
        check_reachable(found, "gloo")
    lost = read_rendezvous(own | {"COATNET_STORE_FOLDER": f"{tmp_path}/absent"})
    with pytest.raises(ConfigError, match=r"absent: No such file .* meet there, so that a container has to mount it"):
        check_reachable(lost, "gloo")


@pytest.mark.parametrize(("chosen", "gloo", "nccl"), [("", NIC, f"={NIC}"), ("eth7", "eth7", "eth7")])
def test_ranks_of_one_machine_use_its_loopback_interface_unless_another_is_chosen(
    chosen: str, gloo: str, nccl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("GLOO", "NCCL"):
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", chosen)
    keep_to_this_machine()
    assert [os.environ[f"{library}_SOCKET_IFNAME"] for library in ("GLOO", "NCCL")] == [gloo, nccl]


def test_a_name_that_does_not_resolve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_RESOLVE_SECONDS", 0.0)
    lost = read_rendezvous(RANK | {"MASTER_ADDR": "no..such-host.invalid"})
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=no\.\.such-host\.invalid: .* cannot resolve this name"):
        check_reachable(lost, "gloo")


@pytest.mark.parametrize(
    ("backend", "value", "is_there"),
    [
        ("nccl", "{nic}", True),
        ("nccl", "ib,{nic}", True),  # prefixes, of which one is enough
        ("nccl", "{nic_1}", True),
        ("nccl", "={nic_1}", False),
        ("nccl", "={nic}:5000", True),
        ("nccl", "ib", False),
        ("nccl", "^ib,docker", True),
        ("nccl", "^{all}", False),
        ("nccl", "", True),
        ("gloo", "{nic}", True),
        ("gloo", "{nic},ib0", False),  # Gloo uses them all
        ("gloo", "{nic_1}", False),
        ("gloo", "", True),
    ],
)
def test_interfaces_are_selected_as_nccl_and_gloo_do(
    backend: str, value: str, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    value = value.format(nic=NIC, nic_1=NIC[:1], all=",".join(psutil.net_if_addrs()))
    monkeypatch.setenv(variable, value)
    if is_there:
        check_interface(backend)
        return
    with pytest.raises(
        ConfigError, match=rf"{variable}={re.escape(value)}: there is no .* with an address are .*{NIC}"
    ):
        check_interface(backend)


def test_an_interface_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = psutil.net_if_addrs() | {"ib0": []}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME=ib0: ib0 has no address on"):
        check_interface("gloo")

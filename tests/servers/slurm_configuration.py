"""Configuration of the tests' Slurm cluster: fast scheduling, preemption by partition, simulated GPUs.

Time limits are far above what a busy machine needs: Slurm restarts a job whose node seems to be down, whose script did
not start in time, or whose credential has expired before it was used.
"""

import os
import secrets
from pathlib import Path

GPUS = 4
"""Per node."""

_CONFIGURATION = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort={ports[controller]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_delay}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdTimeout=600
BatchStartTimeout=600
UnkillableStepTimeout=600
TCPTimeout=10
KillWait=20
PropagatePrioProcess=1
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0,nohold_on_prolog_fail
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
GresTypes=gpu
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=main PriorityTier=10 PreemptMode=OFF Default=YES
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=lowgrace PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high PriorityTier=20 PreemptMode=OFF
NodeName=DEFAULT CPUs=4 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
"""

# Connections to slurmdbd take the socket of munge from AccountingStoragePass, not from AuthInfo.
_WITH_ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[accounting]}
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu
"""

_ACCOUNTING = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=accounting
DbdAddr=127.0.0.1
DbdPort={ports[accounting]}
SlurmUser=root
LogFile={folder}/log/slurmdbd
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[database]}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
CommunicationParameters=NoInAddrAny
"""


def write_configuration(
    folder: Path, seen_as: Path, nodes: list[str], ports: dict[str, int], requeue_delay: int, accounting: bool
) -> None:
    """Write the configuration files into `folder`, which the daemons see as `seen_as`."""
    # The port of a job's ranks depends on its number: clusters on this machine must use different numbers.
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first_job = 1 + 3000 * (worker % 3) + 1000 * secrets.randbelow(3) + 500 * accounting
    values = {
        "folder": seen_as, "ports": ports, "gpus": GPUS, "requeue_delay": requeue_delay, "first_job": first_job,
    }  # fmt: skip
    lines = [f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={ports[node]}\n" for node in nodes]
    configuration = _CONFIGURATION + (_WITH_ACCOUNTING if accounting else "")
    (folder / "slurm.conf").write_text(configuration.format(**values) + "".join(lines))
    (folder / "gres.conf").write_text(f"Name=gpu File={seen_as}/dev/gpu[0-{GPUS - 1}]\n")
    (folder / "cgroup.conf").write_text("ConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n")
    if accounting:
        password = secrets.token_hex()
        file = folder / "slurmdbd.conf"
        file.touch(mode=0o600)
        file.write_text(_ACCOUNTING.format(**values, password=password))
        user = "slurm@127.0.0.1"
        (folder / "grant.sql").write_text(
            f"CREATE OR REPLACE USER {user} IDENTIFIED BY '{password}';\nGRANT ALL ON slurm.* TO {user};\n"
        )

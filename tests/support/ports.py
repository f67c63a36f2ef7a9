"""Ports for servers and ranks that tests start."""

import random
import socket


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens, and which are never assigned to clients or to ranks of commands and Slurm jobs.

    Clients get ports of the system's ephemeral range, which is higher; those of jobs start at 20,000.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(12000, 20000), 1000):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError("no free ports")

"""Ports of this machine: where the ranks of a run meet, and where its servers listen."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_mega.errors import UserError

LOOPBACK = "127.0.0.1"
SERVERS_PORTS = range(10_000, 20_000)
"""Below those at which the ranks of Slurm jobs meet."""
PORTS_TRIED = 50
_GIVEN_TO_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that the system gives to nobody who asks for a free one. Ranks may listen there all the same:
    their store shares the address, as this socket does, and this one does not listen."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def free_port(host: str = LOOPBACK) -> int:
    """A port that a server can listen at, also half a minute from now, when it is up: of those that the
    system gives to no connection by itself, where it keeps some back."""
    kept_back = _kept_back()
    ports = random.SystemRandom().sample(kept_back, min(PORTS_TRIED, len(kept_back)))
    for port in [*ports, 0]:
        try:
            with socket.create_server((host, port)) as probe:
                return probe.getsockname()[1]
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port:
                continue
            raise UserError(
                f"no server can listen at {host}: {error.strerror or error}",
                where="--host",
                law="a server listens at an address of the machine that it runs on",
                remedy="give the name or address of a network interface of this machine, or 0.0.0.0 for all",
            ) from None
    raise AssertionError("the last port tried is any")


def _kept_back() -> range:
    """The ports that no connection gets. On a system that does not say, or gives all: none."""
    try:
        first = int(_GIVEN_TO_CONNECTIONS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return range(0)
    return range(SERVERS_PORTS.start, min(first, SERVERS_PORTS.stop))

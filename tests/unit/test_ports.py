"""A port stays whose it is between its choice and their coming: of ranks that meet, of servers that start."""

from __future__ import annotations

import socket

import pytest
from torch._C._distributed_c10d import TCPStore

from grpo_mega import ports
from grpo_mega.ports import free_port, reserved_port


def test_a_port_is_kept_for_the_ranks():
    with reserved_port() as port:
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        for _ in range(2):  # and again, once they have met
            store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
            store.set("rank 0", "here")
            assert TCPStore("127.0.0.1", port).get("rank 0") == b"here"
            del store


def test_a_server_is_still_free_to_listen_when_it_is_up_at_last(monkeypatch):
    """It takes half a minute, and what connects to somewhere meanwhile gets a port of the system's choice."""
    low, high = (int(bound) for bound in ports._GIVEN_TO_CONNECTIONS.read_text().split())
    assert not any(low <= free_port() <= high for _ in range(50))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "_kept_back", lambda: range(port, port + 1))
        assert free_port() != port

"""The port at which ranks meet is theirs between its choice and their coming."""

from __future__ import annotations

import socket

import pytest
from torch._C._distributed_c10d import TCPStore

from grpo_mega.ports import reserved_port


def test_a_port_is_kept_for_the_ranks():
    with reserved_port() as port:
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        for _ in range(2):  # and again, once they have met
            store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
            store.set("rank 0", "here")
            assert TCPStore("127.0.0.1", port).get("rank 0") == b"here"
            del store

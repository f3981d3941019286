"""A process group between one trainer rank and the servers, beside the trainer's own world."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d as c10d


def lead_group(address: str, port: int, size: int, name: str, backend: str, limit_seconds: float) -> Any:
    """Rank 0 of a new group, and the store it meets at; waits for the other ranks.

    torch makes groups only out of members of its world, and servers are none: this group is made the way
    torch makes its world, under a name of its own, as SGLang's side does it too.
    """
    limit = timedelta(seconds=limit_seconds)
    # Not by `rendezvous`: under torchrun that would look for the store of the launcher.
    store = TCPStore(address, port, size, is_master=True, timeout=limit, multi_tenant=True)
    group, _ = c10d._new_process_group_helper(
        size,
        0,
        [],
        dist.Backend(backend),
        PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=limit,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group

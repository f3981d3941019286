"""Where a run's servers are: those that it starts and ends, with or without a router, or those of others."""

from __future__ import annotations

import atexit
from dataclasses import dataclass, field
from pathlib import Path

from grpo_mega.recipe.rollout_block import SglangBlock
from grpo_mega.rollout.addresses import wait_for_addresses, wait_for_workers
from grpo_mega.rollout.managed import ModelFacts, server_pool
from grpo_mega.rollout.router import Router, check_router
from grpo_mega.rollout.server import ServerPool, server_python


@dataclass(frozen=True, slots=True)
class Addresses:
    """Example: Addresses(("http://127.0.0.1:30000", "http://127.0.0.1:30001"), "http://127.0.0.1:29999")"""

    servers: tuple[str, ...] = ()
    router: str | None = None


@dataclass(eq=False)
class Fleet:
    """Of the rank that owns the servers; nothing is started before it is asked where they are."""

    block: SglangBlock
    model: ModelFacts
    folder: Path
    seed: int = 0
    pool: ServerPool | None = field(default=None, init=False)
    router: Router | None = field(default=None, init=False)

    @property
    def restarts(self) -> int:
        return self.pool.restarts if self.pool else 0

    def ready(self, *, thoroughly: bool) -> Addresses:
        """Servers that run. `thoroughly`: look first whether those that answer can also sample."""
        if self.block.mode == "external":
            return Addresses(self._external(), self.block.router)
        if self.pool is None:
            self._start()
        else:
            self.pool.revive(thoroughly=thoroughly)
        assert self.pool is not None
        return Addresses(self.pool.urls, self.router.before(self.pool.urls) if self.router else None)

    def close(self) -> None:
        """Safe to call twice."""
        if self.router is not None:
            self.router.stop()
        if self.pool is not None:
            self.pool.stop()

    def _external(self) -> tuple[str, ...]:
        """A file or a router is asked before each sync: servers started again have other addresses."""
        block = self.block
        if block.urls_file is not None:
            return wait_for_addresses(block.urls_file, block.urls_wait_seconds)
        if block.router is not None and not block.urls:
            return wait_for_workers(block.router, block.urls_wait_seconds)
        return block.urls

    def _start(self) -> None:
        block, model = self.block, self.model
        if block.mode == "router":
            python = server_python(block.python)
            check_router(python)
            self.router = Router(python, self.folder, block.concurrency, block.timeout_seconds)
        self.pool = server_pool(
            block, model.hf, model.dtype, self.folder, on_gpu=model.on_gpu, seed=self.seed
        )
        atexit.register(self.close)
        self.pool.start()

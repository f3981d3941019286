"""`grpo-mega serve`: the servers of a recipe without its trainer, for a component of a job or another host.

They start with random weights; the trainer that uses them (rollout.sglang.mode external) brings its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from grpo_mega.data.tokenizer import load_tokenizer
from grpo_mega.engine.device import has_gpu
from grpo_mega.engine.scratch import scratch_config
from grpo_mega.errors import UserError
from grpo_mega.model_shape import local_model_directory
from grpo_mega.recipe.schema import Recipe
from grpo_mega.rollout.addresses import write_addresses
from grpo_mega.rollout.managed import server_pool
from grpo_mega.rollout.server import ServerPool

LOOK_EVERY_SECONDS = 0.5


def serve(recipe: Recipe, addresses: Path | None, host: str, say: Callable[[str], None]) -> None:
    """Until a signal, or until servers died more often than the recipe lets them. Ends them in any case."""
    if recipe.rollout.sglang.mode == "router":
        raise UserError(
            "grpo-mega serve starts servers without a router",
            where="rollout.sglang.mode router",
            law="a router belongs to the run that samples through it",
            remedy="add rollout.sglang.mode=managed; the trainer shares its requests out itself",
        )
    pool = server_pool(
        recipe.rollout.sglang,
        _model_config(recipe),
        recipe.model.dtype,
        recipe.run.dir / "servers",
        on_gpu=has_gpu(),
        seed=recipe.seed,
        host=host,
    )
    keep_serving(pool, addresses, say)


def keep_serving(pool: ServerPool, addresses: Path | None, say: Callable[[str], None]) -> None:
    try:
        _withdraw(addresses)  # of servers that are gone
        pool.start()
        _publish(pool, addresses, say)
        while True:
            time.sleep(LOOK_EVERY_SECONDS)
            dead = [server.index for server in pool.servers if not server.is_running]
            if dead:
                _withdraw(addresses)
                say(f"server {', '.join(map(str, dead))} died: starting it again")
                pool.revive()
                _publish(pool, addresses, say)
    finally:
        _withdraw(addresses)
        pool.stop()


def _publish(pool: ServerPool, addresses: Path | None, say: Callable[[str], None]) -> None:
    for server in pool.servers:
        say(f"server {server.index}: {server.url}  (log {server.log})")
    if addresses is not None:
        write_addresses(addresses, pool.urls)
        say(f"addresses: {addresses}")


def _withdraw(addresses: Path | None) -> None:
    if addresses is not None:
        addresses.unlink(missing_ok=True)


def _model_config(recipe: Recipe) -> PretrainedConfig:
    if recipe.model.hf is not None:
        return AutoConfig.from_pretrained(local_model_directory(recipe.model.hf), local_files_only=True)
    assert recipe.model.scratch is not None
    return scratch_config(recipe.model.scratch, load_tokenizer(recipe.model))

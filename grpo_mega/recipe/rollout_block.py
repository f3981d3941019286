"""Where samples come from, and how many."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from grpo_mega.block import Block, NotNegative, Positive, Probability


class SglangBlock(Block):
    """rollout.engine sglang: servers that sample, and how weights get there."""

    mode: Literal["managed", "external"] = "managed"
    """managed: the run starts its servers and ends them; external: they are at `urls` already."""
    urls: tuple[str, ...] = ()
    """external: http://host:port of each server."""
    urls_file: Path | None = None
    """external, in place of urls: a file with one on each line, which `grpo-mega serve` writes; read before
    each sync, so that it may come later and change."""
    urls_wait_seconds: float = Field(default=600.0, gt=0)
    """external: how long to wait for urls_file and the servers in it."""
    servers: Positive = 1
    """managed, and `grpo-mega serve`, as for the keys below that say managed: how many."""
    tp: Positive = 1
    """Tensor-parallel ranks of each server."""
    colocate: bool = False
    """The servers share GPUs with the trainer: they give their memory back while it trains, and take it again
    with the next weights. Managed ones are started with --enable-memory-saver."""
    python: str | None = None
    """managed: the Python of the environment with sglang; null = environment GRPO_MEGA_SGLANG_PYTHON."""
    transport: Literal["disk", "tensor", "distributed"] = "disk"
    """How weights travel. disk: files under run.dir, which servers must see; tensor: over HTTP; distributed:
    a broadcast in a process group with the servers."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Of one request; a slower one is aborted and sent again."""
    retries: NotNegative = 5
    """Of a request, and of a weight sync, after the first attempt."""
    max_restarts: NotNegative = 3
    """managed: of all servers together, in one run."""
    concurrency: Positive = 256
    """Requests in flight, over all servers."""
    startup_seconds: float = Field(default=300.0, gt=0)
    """managed: until a server must answer."""
    extra_args: tuple[str, ...] = ()
    """managed: more arguments of sglang.launch_server; they come last."""

    @model_validator(mode="after")
    def external_servers_have_urls(self) -> SglangBlock:
        if self.mode == "external" and bool(self.urls) == bool(self.urls_file):
            raise ValueError(
                "rollout.sglang.mode external needs rollout.sglang.urls or urls_file, and not both"
            )
        if self.mode == "managed" and (self.urls or self.urls_file):
            raise ValueError(
                "rollout.sglang.urls and urls_file are of external servers: set rollout.sglang.mode to "
                "external, or remove them"
            )
        return self

    @model_validator(mode="after")
    def urls_are_whole_and_distinct(self) -> SglangBlock:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"rollout.sglang.urls: {url!r} must begin with http:// or https://")
        if len(set(self.urls)) != len(self.urls):
            raise ValueError("rollout.sglang.urls names a server twice")
        return self


class RolloutBlock(Block):
    engine: Literal["local", "sglang"] = "local"
    """local: a transformers model inside the trainer, on every rank; sglang: servers of their own."""
    sglang: SglangBlock = SglangBlock()
    prompts_per_step: Positive = 16
    group_size: Positive = 8
    """Samples of each prompt; the advantage is relative to their mean."""
    max_new_tokens: Positive = 16
    temperature: float = Field(default=1.0, ge=0.0)
    """0 = greedy (evaluation only: a greedy group has no variance)."""
    top_p: Probability = 1.0
    top_k: NotNegative = 0
    """0 = off."""
    stop: tuple[str, ...] = ()
    """Extra stop tokens, each one token of the tokenizer; the end-of-sequence token always stops."""
    prompts_per_batch: Positive = 8
    """local: prompts generated together. Fixed for any number of ranks: samples do not depend on the
    layout."""
    generate: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """module:function, an `async def generate(sample, client)` that makes a sample of several turns; null:
    one turn. See docs/rollouts.md."""
    max_staleness: NotNegative = 0
    """Policy versions a sample may lie behind; both engines are synchronous: 0."""

    @model_validator(mode="after")
    def engines_are_synchronous(self) -> RolloutBlock:
        if self.max_staleness:
            raise ValueError(
                f"rollout.engine {self.engine} generates between updates: max_staleness must be 0"
            )
        return self

    @model_validator(mode="after")
    def servers_tell_the_logprobs_of_whole_distributions(self) -> RolloutBlock:
        """SGLang's log-probs are those before top_p and top_k cut: not of what was sampled from."""
        if self.engine == "sglang" and (self.top_p < 1.0 or self.top_k):
            raise ValueError(
                "rollout.engine sglang reports log-probs before top_p and top_k cut the distribution: set "
                "rollout.top_p to 1 and rollout.top_k to 0, or take rollout.engine local"
            )
        return self

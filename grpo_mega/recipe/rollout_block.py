"""Where samples come from, and how many."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from grpo_mega.block import Block, NotNegative, Positive, Probability

Truncated = Literal["keep", "drop", "mask"]


class SglangBlock(Block):
    """rollout.engine sglang: servers that sample, and how weights get there."""

    mode: Literal["managed", "router", "external"] = "managed"
    """managed: the run starts its servers and ends them; router: managed, and a router before them sends
    requests to the server that has read most of them; external: they are at `urls` already."""
    urls: tuple[str, ...] = ()
    """external: http://host:port of each server."""
    urls_file: Path | None = None
    """external, in place of urls: a file with one on each line, which `grpo-mega serve` writes; read before
    each sync, so that it may come later and change."""
    router: str | None = None
    """external: http://host:port of a router in front of the servers, which is asked for samples first.
    Without urls and urls_file the servers are those that it lists, asked before each sync."""
    urls_wait_seconds: float = Field(default=600.0, gt=0)
    """external: how long to wait for urls_file or the router, and the servers they name."""
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
    deterministic: bool = False
    """managed, GPU: kernels whose results do not depend on the batch, so that sampling seeds are honoured
    (--enable-deterministic-inference)."""
    on_policy_target: Literal["fsdp"] | None = None
    """managed, GPU: the training arithmetic that the server is to match; implies deterministic
    (--rl-on-policy-target)."""
    extra_args: tuple[str, ...] = ()
    """managed: more arguments of sglang.launch_server; they come last."""

    @model_validator(mode="after")
    def external_servers_have_urls(self) -> SglangBlock:
        known = bool(self.urls) + bool(self.urls_file)
        if self.mode == "external" and (known > 1 or not (known or self.router)):
            raise ValueError(
                "rollout.sglang.mode external needs rollout.sglang.urls or urls_file, and not both, or a "
                "router that lists its servers"
            )
        if self.mode != "external" and (known or self.router):
            raise ValueError(
                "rollout.sglang.urls, urls_file and router are of external servers: set rollout.sglang.mode "
                "to external, or remove them (mode router starts a router of its own)"
            )
        return self

    @model_validator(mode="after")
    def a_router_has_servers_to_choose_from(self) -> SglangBlock:
        if self.mode == "router" and self.servers < 2:
            raise ValueError(
                "rollout.sglang.mode router chooses among servers, and there is one: raise "
                "rollout.sglang.servers, or set the mode to managed"
            )
        return self

    @model_validator(mode="after")
    def arguments_are_of_managed_servers(self) -> SglangBlock:
        if self.mode == "external" and (self.deterministic or self.on_policy_target):
            raise ValueError(
                "rollout.sglang.deterministic and on_policy_target are arguments of servers that the run "
                "starts: give them to the external ones yourself, and remove the keys"
            )
        return self

    @model_validator(mode="after")
    def urls_are_whole_and_distinct(self) -> SglangBlock:
        named = [("urls", url) for url in self.urls] + [("router", self.router)] * (self.router is not None)
        for key, url in named:
            if not str(url).startswith(("http://", "https://")):
                raise ValueError(f"rollout.sglang.{key}: {url!r} must begin with http:// or https://")
        if len(set(self.urls)) != len(self.urls):
            raise ValueError("rollout.sglang.urls names a server twice")
        return self


class DynamicSamplingBlock(Block):
    """rollout.dynamic_sampling: groups whose samples all earned the same teach nothing; others take their
    place."""

    over_sample: float = Field(default=1.5, ge=1.0)
    """Prompts asked for each group that is missing."""
    max_extra_rounds: NotNegative = 3
    """Rounds after a step's first; then it trains on the groups there are."""
    spare_steps: NotNegative = 1
    """Steps that a good group which was not needed may wait, with the log-probs it was sampled with; 0 =
    none."""


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
    dynamic_sampling: DynamicSamplingBlock | None = None
    """null: train on every group that was sampled; {}: only on those whose rewards differ."""
    truncated: Truncated = "keep"
    """Samples cut at max_new_tokens. keep: like others; mask: they count in their group's mean but are not
    trained on; drop: neither."""
    max_staleness: NotNegative = 0
    """sglang: updates of the policy that samples may lie behind: so many steps' samples are under way while a
    step trains. 0: no sampling while weights change."""

    @model_validator(mode="after")
    def servers_that_rest_do_not_sample_ahead(self) -> RolloutBlock:
        if self.max_staleness and self.sglang.colocate:
            raise ValueError(
                f"rollout.max_staleness ({self.max_staleness}) samples while the trainer trains, and "
                "rollout.sglang.colocate has servers rest then: set one of them to 0 or false"
            )
        return self

    @model_validator(mode="after")
    def only_servers_sample_ahead(self) -> RolloutBlock:
        if self.max_staleness and self.engine == "local":
            raise ValueError(
                f"rollout.max_staleness ({self.max_staleness}): engine local shares the trainer's processor "
                "and samples between updates; set it to 0, or rollout.engine to sglang"
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

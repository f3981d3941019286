"""Sampling from SGLang servers, with the interface of the embedded engine.

Every sample has a seed of its own, from the run's seed and its uid. Servers started with
--enable-deterministic-inference honour it (it needs a GPU); others, those without a GPU among them, draw
independent numbers, and a run repeated is another run.

Samples are only taken from servers whose weights were proved to be those sent last. Whoever dies is started
again and gets the weights again, and what was sampled before stays.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from grpo_mega.errors import UserError
from grpo_mega.recipe.rollout_block import RolloutBlock
from grpo_mega.rollout.addresses import wait_for_addresses
from grpo_mega.rollout.client import Ask, Completion, Patience, ServersGone, SglangClient
from grpo_mega.rollout.managed import describe_model, server_pool
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.rollout.server import ServerPool, free_port
from grpo_mega.rollout.turns import Draft, Generate, converse
from grpo_mega.sync.proof import Probe, Proof
from grpo_mega.sync.servers import ControlPlane, SyncFailed
from grpo_mega.sync.transport import (
    DiskTransport,
    DistributedTransport,
    SyncReport,
    TensorTransport,
    Transport,
    push,
)
from grpo_mega.types import Group, Prompt, Sample

ValueT = TypeVar("ValueT")
Tensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among those that sample. Rank 0 owns the servers and sends the weights."""

    rank: int = 0
    ranks: int = 1

    @property
    def is_lead(self) -> bool:
        return self.rank == 0

    def lead_says(self, value: ValueT) -> ValueT:
        """Rank 0's value, on every rank."""
        if self.ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first_trouble(self, trouble: str | None) -> str | None:
        """What some rank says; None when all are content."""
        if self.ranks == 1:
            return trouble
        said: list[str | None] = [None] * self.ranks
        dist.all_gather_object(said, trouble)
        return next((text for text in said if text is not None), None)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a server must know of the model, and how its tokens are shown."""

    hf: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    on_gpu: bool


@dataclass(eq=False)
class SglangEngine:
    """Example:
    engine = SglangEngine(recipe.rollout, ModelFacts(hf, tokenizer, "float32", on_gpu=False), Path("runs/a"))
    engine.load(weights)  # named tensors, best something that can be iterated again
    groups = engine.generate(prompts, group_size=8, params=params, seed=0)
    """

    block: RolloutBlock
    model: ModelFacts
    run_dir: Path
    rank: Rank = Rank()
    probe: Callable[[], Probe] | None = None  # a collective; where checksums cannot be compared
    seed: int = 0
    function: Generate | None = None  # of samples of several turns
    report: SyncReport | None = field(default=None, init=False)  # of the last sync
    _pool: ServerPool | None = field(default=None, init=False)
    _urls: tuple[str, ...] = field(default=(), init=False)
    _client: SglangClient | None = field(default=None, init=False)
    _control: ControlPlane | None = field(default=None, init=False)
    _transport: Transport | None = field(default=None, init=False)
    _version: str | None = field(default=None, init=False)  # None: nothing is proved
    _tensors: Tensors | None = field(default=None, init=False)
    _syncs: int = field(default=0, init=False)
    _asleep: set[str] = field(default_factory=set[str], init=False)  # servers whose memory was given back
    _token: str = field(default_factory=lambda: uuid.uuid4().hex[:8], init=False)
    _loop: asyncio.Runner | None = field(default=None, init=False)

    def share(self, prompts: Sequence[Prompt], rank: int, ranks: int) -> list[tuple[int, Prompt]]:
        return [(place, prompt) for place, prompt in enumerate(prompts) if place % ranks == rank]

    @property
    def version(self) -> str | None:
        """Of the weights that samples come from now."""
        return self._version

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last sync, and of what went wrong so far (on this rank)."""
        metrics = self.report.metrics() if self.report else {}
        metrics["rollout/retried_requests"] = float(self._client.retried if self._client else 0)
        metrics["rollout/server_restarts"] = float(self._pool.restarts if self._pool else 0)
        return metrics

    # ---- weights ----

    def load(self, tensors: Tensors) -> None:
        """Bring new weights to all servers. What can be iterated only once is tried only once."""
        self._load(tensors, thoroughly=False)

    def rest(self) -> None:
        """Where the servers share the trainer's GPUs: give their memory back until the next sync. All ranks
        call it, when nobody samples any more."""
        if not self.block.sglang.colocate or self._asleep:
            return
        trouble: str | None = None
        if self.rank.is_lead and self._control is not None:
            try:
                self._control.post("flush_cache", {})  # refused while a request is left
                self._control.post("release_memory_occupation", {})
            except SyncFailed as failure:
                trouble = str(failure)
        trouble = self.rank.lead_says(trouble)
        if trouble is not None:
            raise UserError(
                f"a server keeps its memory: {trouble}",
                where="rollout.sglang.colocate",
                law="servers on the trainer's GPUs give their memory back while it trains",
                remedy="read the server's log; one that was started by hand needs --enable-memory-saver",
            )
        self._asleep = set(self._urls)
        self._version = None

    def _wake(self, control: ControlPlane) -> None:
        """A server that was started again since has never slept."""
        for url in self._asleep & set(self._urls):
            control.call(url, "resume_memory_occupation", {})
            self._asleep.discard(url)

    def _load(self, tensors: Tensors, *, thoroughly: bool) -> None:
        """`thoroughly`: look first whether servers that answer can also sample."""
        self._version = None
        once = iter(tensors) is tensors
        self._tensors = None if once else tensors
        probe = self.probe() if self.probe else None
        attempts = 1 if once else self.block.sglang.retries + 1
        trouble: str | None = None
        for attempt in range(attempts):
            if attempt:
                time.sleep(Patience().delay(attempt))
            self._make_ready(thoroughly or attempt > 0)
            began = time.perf_counter()
            self._syncs += 1
            version = self.rank.lead_says(f"{self._token}-{self._syncs}")
            trouble, size = self.rank.lead_says(self._send(tensors, version, probe))
            if trouble is None:
                self._asleep = set()
                self.report = SyncReport(version, time.perf_counter() - began, size, attempt + 1)
                self._version = version
                return
        raise UserError(
            f"the servers did not get the new weights in {attempts} attempts: {trouble}",
            where=f"rollout.sglang.transport {self.block.sglang.transport}",
            law="samples come only from servers that have the trainer's weights, proved",
            remedy="look into the servers' logs; another transport may suit: disk needs a folder that they "
            "can read, distributed a network between rank 0 and them, tensor neither",
        )

    def _send(self, tensors: Tensors, version: str, probe: Probe | None) -> tuple[str | None, int]:
        """Trouble, if there was any, and the bytes sent."""
        stream = iter(tensors)
        if not self.rank.is_lead:
            for _ in stream:
                pass
            return None, 0
        assert self._transport is not None and self._control is not None
        control = self._control
        try:
            self._wake(control)
        except SyncFailed as failure:
            for _ in stream:  # a collective: the other ranks must not wait for this one
                pass
            return str(failure), 0
        try:
            size = push(stream, version, self._transport, Proof(control, probe))
            control.post("update_weight_version", {"new_version": version, "abort_all_requests": False})
        except SyncFailed as failure:
            return str(failure), 0
        return None, size

    def _make_ready(self, thoroughly: bool) -> None:
        """Servers run, and every rank knows where."""
        urls = self._urls
        if self.rank.is_lead:
            managed = self.block.sglang.mode == "managed"
            urls = self._managed_urls(thoroughly) if managed else self._external_urls()
        urls = self.rank.lead_says(urls)
        if urls != self._urls:
            self._urls = urls
            self._connect()
        elif self._client is not None:
            self._client.expect_fresh_servers()

    def _external_urls(self) -> tuple[str, ...]:
        """A file is read before each sync: servers that were started again have other addresses."""
        block = self.block.sglang
        if block.urls_file is None:
            return block.urls
        return wait_for_addresses(block.urls_file, block.urls_wait_seconds)

    def _managed_urls(self, thoroughly: bool) -> tuple[str, ...]:
        block, model = self.block.sglang, self.model
        if self._pool is None:
            folder = self.run_dir / "servers"
            self._pool = server_pool(
                block, model.hf, model.dtype, folder, on_gpu=model.on_gpu, seed=self.seed
            )
            atexit.register(self.close)
            self._pool.start()
        else:
            self._pool.revive(thoroughly=thoroughly)
        return self._pool.urls

    def _connect(self) -> None:
        """Clients of the servers where they are now."""
        block = self.block.sglang
        retried = self._client.retried if self._client else 0
        self._close_clients()
        concurrency = math.ceil(block.concurrency / self.rank.ranks)
        patience = Patience(block.timeout_seconds, block.retries)
        self._client = SglangClient(self._urls, concurrency, patience, retried)
        self._loop = asyncio.Runner()
        if self.rank.is_lead:
            self._control = ControlPlane(self._urls, block.tp, block.timeout_seconds)
            self._transport = self._new_transport(self._control)

    def _new_transport(self, control: ControlPlane) -> Transport:
        match self.block.sglang.transport:
            case "disk":
                folder = self.run_dir / "servers"
                model = describe_model(self.model.hf, self.model.dtype, folder / "model")
                return DiskTransport(control, folder, model)
            case "tensor":
                return TensorTransport(control)
            case "distributed":
                address = "127.0.0.1" if self._pool else os.environ.get("MASTER_ADDR", "127.0.0.1")
                backend = "nccl" if self.model.on_gpu else "gloo"
                return DistributedTransport(control, address, free_port, backend)

    # ---- samples ----

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        params: SamplingParams,
        seed: int,
        advance: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """A group for each prompt, in order. All ranks call it: should the servers need the weights again,
        all send them."""
        if self._asleep and self._tensors is not None:
            self.load(self._tensors)
        done: dict[str, Sample] = {}
        for _ in range(self.block.sglang.retries + 1):
            missing = [
                Draft(prompt, uid, index, params, seed, self.model.tokenizer)
                for prompt in prompts
                for index in range(group_size)
                if (uid := f"{prompt.uid}/{index}") not in done
            ]
            trouble = self.rank.first_trouble(self._complete(missing, done, advance))
            if trouble is None:
                return [
                    Group(prompt, tuple(done[f"{prompt.uid}/{index}"] for index in range(group_size)))
                    for prompt in prompts
                ]
            self._recover(trouble)
        raise UserError(
            f"the servers were lost again and again: {trouble}",
            where="rollout.sglang",
            law=f"servers that come back get the weights again, {self.block.sglang.retries} times a batch",
            remedy="read the servers' logs",
        )

    def _complete(
        self,
        drafts: Sequence[Draft],
        done: dict[str, Sample],
        advance: Callable[[int], None] | None,
    ) -> str | None:
        """Trouble, when no server was left."""
        if self._version is None or self._client is None or self._loop is None:
            raise UserError(
                "the servers have no weights that were proved to be the trainer's",
                where="rollout.sglang",
                law="samples come only from the trainer's weights",
                remedy="sync the weights first; after a failed sync, see its message",
            )
        left = {}  # samples of a group still missing, by prompt
        for draft in drafts:
            left[draft.prompt.uid] = left.get(draft.prompt.uid, 0) + 1

        def accept(sample: Sample) -> None:
            assert sample.uid not in done, f"{sample.uid} was sampled twice"
            done[sample.uid] = sample
            prompt_uid = sample.uid.rpartition("/")[0]
            left[prompt_uid] -= 1
            if advance and not left[prompt_uid]:
                advance(1)

        try:
            self._loop.run(self._ask_all(self._client, self._version, drafts, accept))
        except ServersGone as gone:
            return str(gone)
        return None

    def _recover(self, trouble: str) -> None:
        if self._tensors is None:
            raise UserError(
                f"no server is left: {trouble}",
                where="rollout.sglang",
                law="a server that comes back has no weights of this run; they were given only once",
                remedy="look into the servers' logs, start again from the last checkpoint",
            )
        self._load(self._tensors, thoroughly=True)

    async def _ask_all(
        self,
        client: SglangClient,
        version: str,
        drafts: Sequence[Draft],
        accept: Callable[[Sample], None],
    ) -> None:
        if self.function is not None:
            gate = asyncio.Semaphore(client.concurrency)

            async def answer(ask: Ask) -> Completion:
                async with gate:
                    return await client.answer(ask, version)

            try:
                return await converse(self.function, drafts, answer, accept)
            finally:
                await client.finish_background()
        by_uid = {draft.uid: draft for draft in drafts}

        def finish(completion: Completion) -> None:
            draft = by_uid[completion.uid]
            draft.said(completion)
            accept(draft.sample())

        asks = [draft.next_ask(frozenset(), draft.room) for draft in drafts]
        return await client.complete(asks, version, finish)

    # ---- the end ----

    def close(self) -> None:
        """Stop servers that belong to the run. Safe to call twice."""
        self._version = None
        self._close_clients()
        if self._pool is not None:
            self._pool.stop()

    def _close_clients(self) -> None:
        if self._loop is not None and self._client is not None:
            self._loop.run(self._client.close())
            self._loop.close()
        if self._control is not None:
            self._control.close()
        self._client = self._loop = self._control = self._transport = None

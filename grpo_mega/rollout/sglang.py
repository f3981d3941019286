"""Sampling from SGLang servers, with the interface of the embedded engine.

Every sample has a seed of its own, from the run's seed and its uid. Servers started with
--enable-deterministic-inference honour it (it needs a GPU); others, those without a GPU among them, draw
independent numbers, and a run repeated is another run.

Samples are only taken from servers whose weights were proved to be those sent last. Whoever dies is started
again and gets the weights again, and what was sampled before stays.
"""

from __future__ import annotations

import atexit
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from grpo_mega.errors import UserError
from grpo_mega.ports import free_port
from grpo_mega.recipe.rollout_block import RolloutBlock
from grpo_mega.rollout.client import Completion, Patience, SglangClient
from grpo_mega.rollout.fleet import Addresses, Fleet
from grpo_mega.rollout.managed import ModelFacts, describe_model
from grpo_mega.rollout.pending import LoopThread, Pending
from grpo_mega.rollout.rank import ALONE, Rank
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.rollout.turns import Draft, Generate, converse
from grpo_mega.sync.fingerprint import Fingerprint
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

Tensors = Iterable[tuple[str, torch.Tensor]]


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
    rank: Rank = ALONE
    probe: Callable[[], Probe] | None = None  # a collective; where checksums cannot be compared
    seed: int = 0
    function: Generate | None = None  # of samples of several turns
    report: SyncReport | None = field(default=None, init=False)  # of the last sync
    updates: int = field(default=0, init=False)  # weights taken so far
    fleet: Fleet = field(init=False)
    _at: Addresses = field(default=Addresses(), init=False)
    _client: SglangClient | None = field(default=None, init=False)
    _control: ControlPlane | None = field(default=None, init=False)
    _transport: Transport | None = field(default=None, init=False)
    _version: str | None = field(default=None, init=False)  # None: nothing is proved
    _tensors: Tensors | None = field(default=None, init=False)
    _syncs: int = field(default=0, init=False)
    _asleep: set[str] = field(default_factory=set[str], init=False)  # servers whose memory was given back
    _token: str = field(default_factory=lambda: uuid.uuid4().hex[:8], init=False)
    _loop: LoopThread | None = field(default=None, init=False)
    _pending: list[Pending] = field(default_factory=list[Pending], init=False)  # begun and not finished
    _numbers: dict[str, int] = field(default_factory=dict[str, int], init=False)
    """Of the versions that samples may come from: how many weights had been taken with them."""

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.block.sglang, self.model, self.run_dir / "servers", self.seed)

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
        metrics["rollout/server_restarts"] = float(self.fleet.restarts)
        return metrics

    # ---- weights ----

    def load(self, tensors: Tensors) -> None:
        """Bring new weights to all servers. What can be iterated only once is tried only once."""
        oldest = self.updates + 1 - self.block.max_staleness
        for version in [version for version, number in self._numbers.items() if number < oldest]:
            del self._numbers[version]  # in place: requests in flight look into it
        self._load(tensors, self.updates + 1, thoroughly=False)
        self.updates += 1

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
        self._asleep = set(self._at.servers)
        self._version = None

    def _wake(self, control: ControlPlane) -> None:
        """A server that was started again since has never slept."""
        for url in self._asleep & set(self._at.servers):
            control.call(url, "resume_memory_occupation", {})
            self._asleep.discard(url)

    def _load(self, tensors: Tensors, number: int, *, thoroughly: bool) -> None:
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
            self._numbers[version] = number  # before it is proved: requests in flight go on with it at once
            trouble, size = self.rank.lead_says(self._send(tensors, version, probe))
            if trouble is None:
                self._asleep = set()
                self.report = SyncReport(version, time.perf_counter() - began, size, attempt + 1)
                self._version = version
                for pending in self._pending:
                    if not pending.is_running and pending.missing and not pending.is_cancelled:
                        self._launch(pending)
                return
            del self._numbers[version]
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
        proof, later = Proof(control, probe), list[Fingerprint]()
        try:
            self._wake(control)
        except SyncFailed as failure:
            for _ in stream:  # a collective: the other ranks must not wait for this one
                pass
            return str(failure), 0
        try:
            with control.paused() if self._goes_on else nullcontext():
                # a probe is a request too, and would wait for ever
                prove = later.append if self._goes_on and not proof.is_by_checksum else proof
                size = push(stream, version, self._transport, prove)
                control.post("update_weight_version", {"new_version": version, "abort_all_requests": False})
            for fingerprint in later:
                proof(fingerprint)
        except SyncFailed as failure:
            return str(failure), 0
        return None, size

    @property
    def _goes_on(self) -> bool:
        """Whether requests are in flight while the weights change."""
        return self.block.max_staleness > 0

    def _make_ready(self, thoroughly: bool) -> None:
        """Servers run, and every rank knows where."""
        at = self.fleet.ready(thoroughly=thoroughly) if self.rank.is_lead else self._at
        at = self.rank.lead_says(at)
        if at != self._at:
            self._at = at
            self._connect()
        elif self._client is not None:
            self._client.expect_fresh_servers()

    def _connect(self) -> None:
        """Clients of the servers where they are now."""
        block = self.block.sglang
        retried = self._client.retried if self._client else 0
        self._close_clients()
        concurrency = math.ceil(block.concurrency / self.rank.ranks)
        patience = Patience(block.timeout_seconds, block.retries)
        self._client = SglangClient(self._at.servers, concurrency, patience, retried, self._at.router)
        if self._loop is None:
            self._loop = LoopThread()
            atexit.register(self.close)
        if self.rank.is_lead:
            self._control = ControlPlane(self._at.servers, block.tp, block.timeout_seconds)
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
                address = "127.0.0.1" if self.fleet.pool else os.environ.get("MASTER_ADDR", "127.0.0.1")
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
            self._load(self._tensors, self.updates, thoroughly=False)
        return self.finish(self.begin(prompts, group_size, params, seed, advance))

    def begin(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        params: SamplingParams,
        seed: int,
        advance: Callable[[int], None] | None = None,
    ) -> Pending:
        """Ask the servers, and return at once: they sample through changes of their weights until `finish`.
        Every token knows which weights it came from."""
        if self._version is None or self._client is None:
            raise UserError(
                "the servers have no weights that were proved to be the trainer's",
                where="rollout.sglang",
                law="samples come only from the trainer's weights",
                remedy="sync the weights first; after a failed sync, see its message",
            )

        def draft(prompt: Prompt, index: int) -> Draft:
            uid = f"{prompt.uid}/{index}"
            return Draft(prompt, uid, index, params, seed, self.model.tokenizer)

        pending = Pending(tuple(prompts), group_size, draft, advance)
        self._launch(pending)
        self._pending = [p for p in self._pending if not p.is_cancelled] + [pending]
        return pending

    def finish(self, pending: Pending) -> list[Group]:
        """Wait for what was begun. All ranks call it."""
        trouble: str | None = None
        for _ in range(self.block.sglang.retries + 1):
            trouble = self.rank.first_trouble(self._settle(pending))
            if trouble is None:
                self._pending.remove(pending)
                return pending.groups(self._numbers)
            self._recover(trouble)
        raise UserError(
            f"the servers were lost again and again: {trouble}",
            where="rollout.sglang",
            law=f"servers that come back get the weights again, {self.block.sglang.retries} times a batch",
            remedy="read the servers' logs",
        )

    def _launch(self, pending: Pending) -> None:
        assert self._client is not None and self._loop is not None
        pending.launch(self._loop, partial(self._ask_all, self._client))

    def _settle(self, pending: Pending) -> str | None:
        """Trouble, when no server was left. What came from weights that were then not proved is asked
        again."""
        while (trouble := pending.wait()) is None and pending.forget(self._numbers):
            self._launch(pending)
        return trouble

    def _recover(self, trouble: str) -> None:
        if self._tensors is None:
            raise UserError(
                f"no server is left: {trouble}",
                where="rollout.sglang",
                law="a server that comes back has no weights of this run; they were given only once",
                remedy="look into the servers' logs, start again from the last checkpoint",
            )
        self._load(self._tensors, self.updates, thoroughly=True)

    async def _ask_all(
        self, client: SglangClient, drafts: Sequence[Draft], accept: Callable[[Sample], None]
    ) -> None:
        if self.function is not None:
            try:
                return await converse(
                    self.function, drafts, lambda ask: client.one(ask, self._numbers), accept
                )
            finally:
                await client.finish_background()
        by_uid = {draft.uid: draft for draft in drafts}

        def finish(completion: Completion) -> None:
            draft = by_uid[completion.uid]
            draft.said(completion)
            accept(draft.sample())

        asks = [draft.next_ask(frozenset(), draft.room) for draft in drafts]
        return await client.complete(asks, self._numbers, finish)

    # ---- the end ----

    def close(self) -> None:
        """Stop servers that belong to the run. Safe to call twice."""
        self._version = None
        self._close_clients()
        self._pending.clear()
        if self._loop is not None:
            self._loop.close()
            self._loop = None
        self.fleet.close()

    def _close_clients(self) -> None:
        for pending in self._pending:
            pending.break_off()
        if self._loop is not None and self._client is not None:
            self._loop.run(self._client.close())
        if self._control is not None:
            self._control.close()
        self._client = self._control = self._transport = None

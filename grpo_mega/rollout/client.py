"""Token in, token out: samples from SGLang servers over HTTP, each asked for once and accepted once.

A request that fails is tried again elsewhere: after 5xx, a broken connection, a timeout or an abort, with a
delay that doubles. A server that cannot be reached, or has other weights than it should, is left alone until
it is well again. Every attempt has a request id of its own, and an attempt given up is aborted on its server.

A router is asked first, if there is one. What fails there is asked of a server; and a router that broke a
connection, took too long or led to other weights is left alone until the next sync.

Log-probs are those of softmax(logits / temperature), the server's default (greedy: of softmax(logits)).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from grpo_mega.errors import UserError
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.types import FinishReason

CONNECT_SECONDS = 5.0
PROBE_SECONDS = 5.0
"""A server that is up answers /health within about one second."""
PROBE_EVERY_SECONDS = 1.0
ABORT_SECONDS = 2.0
IDLE_SECONDS = 3.0
"""After which a connection is not used again: the servers close theirs after five."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One sample wanted.

    Example: Ask(uid="train-17/3", token_ids=(19, 7), params=SamplingParams(8), seed=2531011)
    """

    uid: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int

    def body(self, rid: str) -> dict[str, Any]:
        params = self.params
        return {
            "rid": rid,
            "input_ids": self.token_ids,
            "sampling_params": {
                "max_new_tokens": params.max_new_tokens,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k or -1,
                "stop_token_ids": sorted(params.stop_ids),
                "sampling_seed": self.seed,
            },
            "return_logprob": True,
        }


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server sampled.

    Example: Completion(uid="train-17/3", token_ids=(4, 1), logprobs=(-.1, -.2), finish_reason="stop",
                        versions=("a3-7", "a3-7"), attempts=1)
    """

    uid: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[str, ...]  # of the weights, one per token
    attempts: int


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, and how often to try again."""

    timeout_seconds: float = 600.0  # of one attempt
    retries: int = 5  # after the first attempt
    first_delay_seconds: float = 0.1  # before the first retry; doubles
    longest_delay_seconds: float = 5.0
    unreachable_seconds: float = 10.0  # how long no server at all may be usable

    def delay(self, attempt: int) -> float:
        """Between half of and the whole of the doubling delay: many retries do not arrive together."""
        whole = min(self.longest_delay_seconds, self.first_delay_seconds * 2**attempt)
        return whole * random.uniform(0.5, 1.0)


class ServersGone(Exception):
    """No server is usable. What was accepted before stays accepted."""


class _AttemptFailed(Exception):
    """One attempt brought nothing; another may."""


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    text: str


@dataclass(eq=False, slots=True)
class _Server:
    url: str
    in_flight: int = 0
    up: bool = True
    stale: bool = False  # it has other weights than those expected
    next_probe: float = 0.0
    trouble: str = ""

    @property
    def usable(self) -> bool:
        return self.up and not self.stale

    def down(self, trouble: str) -> None:
        self.up, self.trouble, self.next_probe = False, trouble, 0.0


@dataclass(eq=False)
class SglangClient:
    """Shares requests out over servers. Its coroutines run in one event loop, which keeps connections open.

    Example:
        client = SglangClient(("http://127.0.0.1:30000",), concurrency=64)
        await client.complete(asks, versions={"a3-7"}, accept=done.append)
    """

    urls: Sequence[str]
    concurrency: int
    patience: Patience = Patience()
    retried: int = 0  # attempts so far that were not the first
    router: str | None = None  # who shares out first attempts; others go to servers themselves
    _servers: list[_Server] = field(init=False)
    _router: _Server | None = field(init=False)
    _http: aiohttp.ClientSession | None = field(default=None, init=False)
    _room: asyncio.Semaphore = field(init=False)
    _background: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]], init=False)

    def __post_init__(self) -> None:
        self._servers = [_Server(url.rstrip("/")) for url in self.urls]
        self._router = _Server(self.router.rstrip("/")) if self.router else None
        self._room = asyncio.Semaphore(self.concurrency)

    def expect_fresh_servers(self) -> None:
        """After a sync every server has what it should, as far as is known."""
        for server in (*self._servers, self._router) if self._router else self._servers:
            server.up, server.stale, server.trouble = True, False, ""

    async def complete(
        self, asks: Sequence[Ask], versions: Container[str] | None, accept: Callable[[Completion], None]
    ) -> None:
        """Answer every ask, once, in any order. Tokens sampled with weights other than `versions` are not
        accepted (None: with any). Raises ServersGone when no server can be used."""
        waiting = deque(asks)

        async def work() -> None:
            while waiting:
                async with self._room:
                    if waiting:
                        accept(await self.answer(waiting.popleft(), versions))

        workers = [asyncio.create_task(work()) for _ in range(min(self.concurrency, len(asks)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self.finish_background()

    async def close(self) -> None:
        await self.finish_background()
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def one(self, ask: Ask, versions: Container[str] | None) -> Completion:
        """Like one of `complete`: with room among the requests in flight."""
        async with self._room:
            return await self.answer(ask, versions)

    async def answer(self, ask: Ask, versions: Container[str] | None) -> Completion:
        """One sample, with as many attempts as it takes. Who calls this bounds how many are in flight."""
        trouble = ""
        for attempt in range(self.patience.retries + 1):
            router = None if attempt else self._router
            server = router if router and router.usable else await self._pick(versions)
            if attempt:
                self.retried += 1
            server.in_flight += 1
            try:
                return await self._attempt(server, ask, versions, attempt)
            except _AttemptFailed as failure:
                trouble = f"{server.url}: {failure}"
            finally:
                server.in_flight -= 1
            await asyncio.sleep(self.patience.delay(attempt))
        raise UserError(
            f"sample {ask.uid} failed {self.patience.retries + 1} times, the last time at {trouble}",
            where="rollout.sglang",
            law="every sample asked for is returned",
            remedy="look into the server's log; raise rollout.sglang.timeout_seconds if it is only slow, "
            "rollout.sglang.retries if it recovers later",
        )

    async def _attempt(
        self, server: _Server, ask: Ask, versions: Container[str] | None, attempt: int
    ) -> Completion:
        rid = f"{ask.uid}#{attempt}-{uuid.uuid4().hex}"
        try:
            async with asyncio.timeout(self.patience.timeout_seconds):
                reply = await self._post(f"{server.url}/generate", ask.body(rid))
        except aiohttp.ClientError as error:  # first: to connect too slowly is a TimeoutError too
            server.down(type(error).__name__)
            if server is self._router:  # the server behind it may not have noticed
                self._in_background(self._abort(server, rid))
            raise _AttemptFailed(f"{type(error).__name__}: {error}") from None
        except TimeoutError:
            server.down("timed out")  # until a probe finds it well
            self._in_background(self._abort(server, rid))
            raise _AttemptFailed(f"no answer in {self.patience.timeout_seconds:g} s") from None
        except asyncio.CancelledError:
            self._in_background(self._abort(server, rid))
            raise
        if 400 <= reply.status < 500 and reply.status not in (408, 429):
            raise _refused(ask, server, reply)
        if reply.status != 200:
            raise _AttemptFailed(f"status {reply.status}: {reply.text[:200]}")
        try:
            completion = _completion(ask, json.loads(reply.text), attempt + 1)
        except (KeyError, TypeError, ValueError) as error:
            raise _AttemptFailed(f"not a completion ({error!r}): {reply.text[:200]}") from None
        strangers = {found for found in completion.versions if versions is not None and found not in versions}
        if strangers:
            server.stale, server.trouble = True, f"has weights {strangers.pop()!r}, not those expected"
            raise _AttemptFailed(server.trouble)
        return completion

    async def _pick(self, versions: Container[str] | None) -> _Server:
        """The usable server with the fewest requests in flight; waits a little for one to come back."""
        deadline = time.monotonic() + self.patience.unreachable_seconds
        while True:
            for server in self._servers:
                if not server.up and time.monotonic() >= server.next_probe:
                    server.next_probe = time.monotonic() + PROBE_SECONDS + PROBE_EVERY_SECONDS
                    self._in_background(self._probe(server, versions))
            usable = [server for server in self._servers if server.usable]
            if usable:
                return min(usable, key=lambda server: server.in_flight)
            hopeless = all(server.up and server.stale for server in self._servers)
            if hopeless or time.monotonic() >= deadline:
                raise ServersGone("; ".join(f"{s.url}: {s.trouble}" for s in self._servers))
            await asyncio.sleep(min(0.1, self.patience.unreachable_seconds / 4))

    async def _probe(self, server: _Server, versions: Container[str] | None) -> None:
        """Find out whether a server that was down is back, and with which weights."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self._get(f"{server.url}/health")
                info = json.loads(await self._get(f"{server.url}/model_info"))
        except (TimeoutError, aiohttp.ClientError, ValueError) as error:
            server.trouble = f"{server.trouble.split(',')[0]}, not well: {type(error).__name__}"
            server.next_probe = time.monotonic() + PROBE_EVERY_SECONDS
            return
        found = info.get("weight_version")
        server.stale = versions is not None and found not in versions
        server.trouble = f"came back with weights {found!r}, not those expected" if server.stale else ""
        server.up = True

    async def _abort(self, server: _Server, rid: str) -> None:
        """Best effort: the server may be gone. Which one a router took is not known: all are told."""
        targets = self._servers if server is self._router else [server]
        posts = [self._post(f"{target.url}/abort_request", {"rid": rid}) for target in targets]
        with suppress(TimeoutError):
            async with asyncio.timeout(ABORT_SECONDS):
                await asyncio.gather(*posts, return_exceptions=True)

    def _in_background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def finish_background(self) -> None:
        """Each piece of background work has its own short limit."""
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _post(self, url: str, body: Mapping[str, Any]) -> _Reply:
        async with self._connection().post(url, json=body) as response:
            return _Reply(response.status, await response.text(errors="replace"))

    async def _get(self, url: str) -> str:
        async with self._connection().get(url, raise_for_status=True) as response:
            return await response.text(errors="replace")

    def _connection(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                # no limit of its own: `concurrency` bounds requests; probes and aborts do not wait for them
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            )
        return self._http


def _refused(ask: Ask, server: _Server, reply: _Reply) -> UserError:
    return UserError(
        f"{server.url} refuses sample {ask.uid}: status {reply.status}: {reply.text[:300]}",
        where="rollout",
        law=f"a prompt ({len(ask.token_ids)} tokens here) and rollout.max_new_tokens "
        f"({ask.params.max_new_tokens}) fit into the server's context, and its API is SGLang's",
        remedy="shorten prompts or rollout.max_new_tokens, or start the server with a longer context",
    )


def _completion(ask: Ask, answer: Mapping[str, Any], attempts: int) -> Completion:
    meta = answer["meta_info"]
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise ValueError(f"finished by {reason}: {meta['finish_reason'].get('message')}")
    tokens = tuple(int(token) for _, token, *_ in meta["output_token_logprobs"])
    if not tokens or tokens != tuple(answer["output_ids"]):
        raise ValueError(f"{len(tokens)} log-probs for {len(answer['output_ids'])} tokens")
    return Completion(
        uid=ask.uid,
        token_ids=tokens,
        logprobs=tuple(float(logprob) for logprob, *_ in meta["output_token_logprobs"]),
        finish_reason=reason,
        versions=_versions(meta, len(tokens)),
        attempts=attempts,
    )


def _versions(meta: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Spans where the server tells them; older ones tell one version for all tokens."""
    spans = meta.get("weight_versions")
    if not spans:
        return (str(meta["weight_version"]),) * count
    versions = tuple(str(s["version"]) for s in spans for _ in range(int(s["start"]), int(s["end"])))
    if len(versions) != count:
        raise ValueError(f"weight versions of {len(versions)} tokens for {count}")
    return versions

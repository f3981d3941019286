"""The real router; before made-up servers, which tell who was asked what, and before a real one."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.rollout.client import Ask, Completion, Patience, SglangClient
from grpo_mega.rollout.router import Router
from grpo_mega.rollout.sampling import SamplingParams
from tests.fake_sglang import FakeServer, slowly
from tests.sglang.conftest import Model, Owner, members
from tests.sglang.test_sampling_and_sync import Engines, greedy_of, greedy_of_trainer, prompts

pytestmark = pytest.mark.sglang

TURNS = 4
SAMPLES = 16
PATIENCE = Patience(timeout_seconds=20, retries=3, first_delay_seconds=0.01)


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with FakeServer(lambda *_: slowly(0.05)) as first, FakeServer(lambda *_: slowly(0.05)) as second:
        yield [first, second]


@pytest.fixture
def router(sglang_python: str, tmp_path: Path) -> Iterator[Router]:
    # so many that no server ever has too much to do, and what it has read alone decides
    router = Router(sglang_python, tmp_path, concurrency=4 * SAMPLES, timeout_seconds=20)
    yield router
    router.stop()


def _talk(url: str, servers: list[FakeServer], name: str) -> list[int]:
    """Samples of several turns, side by side, each turn reading all that was said before; how many attempts
    each of them took."""

    async def one(client: SglangClient, sample: int) -> int:
        ids, attempts = tuple(range(sample * 1000, sample * 1000 + 20)), 0
        for turn in range(TURNS):
            ask = Ask(f"{name}{sample}~{turn}", ids, SamplingParams(4), seed=sample)
            attempts += (await client.one(ask, {"v1"})).attempts
            ids += tuple(range(sample * 1000 + 500 + turn * 20, sample * 1000 + 520 + turn * 20))
        return attempts

    async def run() -> list[int]:
        client = SglangClient([s.url for s in servers], SAMPLES, PATIENCE, router=url)
        try:
            return await asyncio.gather(*(one(client, sample) for sample in range(SAMPLES)))
        finally:
            await client.close()

    return asyncio.run(run())


def _samples_at(server: FakeServer, name: str) -> set[str]:
    return {rid.split("~")[0] for body in server.generated if (rid := body["rid"]).startswith(name)}


def test_the_turns_of_a_sample_meet_one_servers_cache(router: Router, servers: list[FakeServer]):
    url = router.before([s.url for s in servers])
    assert _talk(url, servers, "a") == [TURNS] * SAMPLES
    first, second = (_samples_at(server, "a") for server in servers)
    assert first and second and not first & second
    sent = servers[0].generated[0]["sampling_params"]
    assert sent["sampling_seed"] == int(next(iter(servers[0].generated))["rid"].split("~")[0][1:])
    assert sent["top_k"] == -1 and sent["max_new_tokens"] == 4


def test_neither_a_dead_server_nor_a_dead_router_costs_a_sample(router: Router, servers: list[FakeServer]):
    urls = [s.url for s in servers]
    url = router.before(urls)
    servers[0].misbehave = lambda *_: (0, "")
    servers[0].healthy = False
    attempts = _talk(url, servers, "b")
    assert max(attempts) > TURNS  # the router led to it, until it knew
    servers[0].misbehave, servers[0].healthy = (lambda *_: None), True
    pid = router.pid
    assert pid is not None
    os.killpg(pid, signal.SIGKILL)
    assert min(_talk(url, servers, "c")) >= TURNS
    assert router.before(urls) != url and router.pid != pid
    assert _talk(router.url, servers, "d") == [TURNS] * SAMPLES


def test_other_servers_get_another_router_and_the_old_one_is_gone(router: Router, servers: list[FakeServer]):
    url = router.before([servers[0].url])
    pid = router.pid
    assert pid is not None and router.before([servers[0].url]) == url and router.pid == pid
    assert router.before([s.url for s in servers]) != url
    router.stop()
    deadline = time.monotonic() + 10
    while left := members(pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_real_server_says_through_a_router_what_it_says_itself(router: Router, owner: Owner, model: Model):
    """Tokens, log-probs and the version of the weights."""
    owner.engine.load(model.second)
    url = router.before([owner.url])
    ask = Ask("train-0/0", prompts(1)[0].token_ids, SamplingParams(8, temperature=0.0), seed=3)

    async def run() -> tuple[Completion, Completion]:
        through = SglangClient([owner.url], 1, PATIENCE, router=url)
        direct = SglangClient([owner.url], 1, PATIENCE)
        versions = {owner.engine.version}
        try:
            return await through.one(ask, versions), await direct.one(ask, versions)
        finally:
            await through.close()
            await direct.close()

    through, direct = asyncio.run(run())
    assert through.attempts == 1 and len(through.token_ids) == 8
    assert (through.token_ids, through.versions) == (direct.token_ids, direct.versions)
    assert through.logprobs == pytest.approx(direct.logprobs, abs=1e-4)


def test_a_router_of_somebody_elses_is_all_that_a_run_needs_to_know(
    router: Router, owner: Owner, model: Model, external: Engines, monkeypatch: pytest.MonkeyPatch
):
    """The server behind it is found, gets weights and proves them; samples come through the router."""
    engine = external(urls=(), router=router.before([owner.url]))
    asked: list[str] = []
    whole = SglangClient._post

    async def seen(self: SglangClient, url: str, body: Any) -> Any:
        asked.append(url)
        return await whole(self, url, body)

    monkeypatch.setattr(SglangClient, "_post", seen)
    for weights in (model.second, model.first):
        engine.load(weights)
        assert greedy_of(engine) == greedy_of_trainer(model, weights)
    assert set(asked) == {f"{router.url}/generate"}

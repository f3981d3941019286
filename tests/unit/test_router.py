"""Requests through a router: it comes first and is never needed; and what is refused before servers start."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from grpo_mega.errors import UserError
from grpo_mega.recipe.rollout_block import SglangBlock
from grpo_mega.recipe.schema import Recipe
from grpo_mega.rollout.client import Ask, Completion, Patience, SglangClient
from grpo_mega.rollout.fleet import Addresses, Fleet
from grpo_mega.rollout.managed import ModelFacts
from grpo_mega.rollout.router import Router, check_router
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.serve import serve
from tests import tiny
from tests.fake_sglang import Answer, FakeServer, completion, slowly

QUICK = Patience(timeout_seconds=5, retries=3, first_delay_seconds=0.01, unreachable_seconds=0.5)
TWICE = 2


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeServer()) for _ in range(TWICE)]


def _asks(count: int) -> list[Ask]:
    return [Ask(f"p{i}/0", (i + 1, i + 2), SamplingParams(4), seed=i) for i in range(count)]


def _sample(
    router: FakeServer, servers: list[FakeServer], batches: int = 1, patience: Patience = QUICK
) -> list[Completion]:
    """Ten samples a batch, one after the other; every batch is after a sync."""
    done: list[Completion] = []

    async def run() -> None:
        client = SglangClient([s.url for s in servers], 1, patience, router=router.url)
        try:
            for _ in range(batches):
                client.expect_fresh_servers()
                await client.complete(_asks(10), {"v1"}, done.append)
        finally:
            await client.close()

    asyncio.run(run())
    assert sorted(c.uid for c in done) == sorted(ask.uid for ask in _asks(10) * batches)
    return done


def _asked(servers: list[FakeServer]) -> int:
    return sum(len(server.generated) for server in servers)


def test_a_router_is_asked_first(servers: list[FakeServer]):
    with FakeServer() as router:
        _sample(router, servers)
    assert len(router.generated) == 10 and _asked(servers) == 0


def test_what_a_router_cannot_pass_on_is_asked_of_a_server(servers: list[FakeServer]):
    """One of the servers behind it is dead; the router goes on being asked."""
    with FakeServer(lambda number, body: (500, "upstream") if number % 3 == 0 else None) as router:
        done = _sample(router, servers)
    assert len(router.generated) == 10 and _asked(servers) == 4
    assert max(c.attempts for c in done) == 2


@pytest.mark.parametrize("trouble", ["broken", "slow", "other weights"])
def test_a_router_that_fails_is_left_alone_until_the_next_sync(servers: list[FakeServer], trouble: str):
    def misbehave(number: int, body: dict[str, Any]) -> Answer | None:
        if trouble == "broken":
            return 0, ""
        if trouble == "slow":
            slowly(4)
        return 200, completion(body, "v0" if trouble == "other weights" else "v1")

    with FakeServer(misbehave) as router:
        impatient = replace(QUICK, timeout_seconds=1.5 if trouble == "slow" else 5)
        _sample(router, servers, batches=2, patience=impatient)
    assert len(router.generated) == 2  # one in each batch
    assert _asked(servers) == 20
    if trouble != "other weights":  # which server took it is not known
        given_up = [body["rid"] for body in router.generated]
        assert all(server.aborted == given_up for server in servers)


def test_an_environment_without_the_router_is_told_what_to_install():
    with pytest.raises(UserError, match="No module named 'sglang_router'") as caught:
        check_router(sys.executable)
    assert caught.value.remedy and f"{sys.executable} -m pip install sglang-router==" in caught.value.remedy


def test_a_router_takes_the_idler_server_before_one_has_half_of_all_requests_more():
    router = Router(sys.executable, Path(), concurrency=64, timeout_seconds=0.5)
    settings = router.settings(("http://a", "http://b"), 1)
    assert settings["balance_abs_threshold"] == 16 and settings["request_timeout_secs"] == 1


def test_a_router_in_front_of_one_server_is_refused():
    with pytest.raises(ValidationError, match="chooses among servers, and there is one"):
        SglangBlock(mode="router")
    with pytest.raises(ValidationError, match="are of external servers"):
        SglangBlock(mode="router", servers=2, urls=("http://a",))


def test_serve_has_no_router(tmp_path: Path):
    rollout = {"engine": "sglang", "sglang": {"mode": "router", "servers": 2}}
    recipe = Recipe.model_validate(tiny.recipe_dict(tmp_path, rollout=rollout))
    with pytest.raises(UserError, match="without a router"):
        serve(recipe, None, "127.0.0.1", print)


def _external(tmp_path: Path, router: str, **more: Any) -> Fleet:
    sglang = SglangBlock(mode="external", router=router, **more)
    return Fleet(sglang, ModelFacts(tiny.hf_config("qwen2"), None, "float32", on_gpu=False), tmp_path)


def test_a_router_that_is_there_already_tells_its_servers(servers: list[FakeServer], tmp_path: Path):
    first, second = sorted(server.url for server in servers)
    with FakeServer(workers={second: True, first: True, "http://127.0.0.1:9": False}) as router:
        fleet = _external(tmp_path, f"{router.url}/")
        assert fleet.ready(thoroughly=False) == Addresses((first, second), f"{router.url}/")
        router.workers = {first: True, second: False}  # before each sync anew
        assert fleet.ready(thoroughly=False).servers == (first,)
        known = _external(tmp_path, router.url, urls=(second,))
        assert known.ready(thoroughly=False) == Addresses((second,), router.url)


def test_a_router_without_servers_that_answer_is_named(tmp_path: Path):
    with FakeServer() as router:
        fleet = _external(tmp_path, router.url, urls_wait_seconds=0.01)
        with pytest.raises(UserError, match=f"{router.url} names no servers"):
            fleet.ready(thoroughly=False)
        router.answer = lambda path, body: (200, ["something", "else"])  # some other program's server
        with pytest.raises(UserError, match=f"{router.url} names no servers"):
            fleet.ready(thoroughly=False)
        del router.answer
        router.workers = {"http://127.0.0.1:9": True}
        with pytest.raises(UserError, match=r"names http://127\.0\.0\.1:9, which does not answer"):
            fleet.ready(thoroughly=False)


def test_a_router_of_somebody_elses_is_of_external_servers():
    with pytest.raises(ValidationError, match="mode router starts a router of its own"):
        SglangBlock(mode="router", servers=2, router="http://a")
    with pytest.raises(ValidationError, match=r"rollout\.sglang\.router: 'a:1' must begin with http"):
        SglangBlock(mode="external", router="a:1")

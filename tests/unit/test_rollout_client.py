"""The client against a server that fails in every way: each sample is returned, once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

from grpo_mega.errors import UserError
from grpo_mega.rollout.client import Ask, Completion, Patience, ServersGone, SglangClient
from grpo_mega.rollout.sampling import SamplingParams
from tests.fake_sglang import FakeServer, Misbehaviour, completion, slowly

QUICK = Patience(timeout_seconds=5, retries=3, first_delay_seconds=0.01, unreachable_seconds=0.5)


def _asks(count: int) -> list[Ask]:
    params = SamplingParams(max_new_tokens=4, temperature=0.7, stop_ids=frozenset({9, 3}))
    return [Ask(f"p{i}/0", (i + 1, i + 2), params, seed=i) for i in range(count)]


def _complete(
    urls: list[str],
    asks: list[Ask],
    *,
    patience: Patience = QUICK,
    concurrency: int = 8,
    version: str | None = "v1",
    done: list[Completion] | None = None,
) -> list[Completion]:
    done = [] if done is None else done

    async def run() -> None:
        client = SglangClient(urls, concurrency, patience)
        try:
            await client.complete(asks, None if version is None else {version}, done.append)
        finally:
            await client.close()

    asyncio.run(run())
    return done


def _all_once(done: list[Completion], asks: list[Ask]) -> bool:
    return Counter(c.uid for c in done) == Counter(ask.uid for ask in asks)


def test_a_completion_has_tokens_logprobs_and_versions():
    with FakeServer() as server:
        (only,) = _complete([server.url], _asks(1))
    assert only == Completion("p0/0", (1, 2), (-0.1, -0.2), "length", ("v1", "v1"), attempts=1)
    body = server.generated[0]
    assert body["sampling_params"] == {
        "max_new_tokens": 4,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,  # SGLang's word for off
        "stop_token_ids": [3, 9],
        "sampling_seed": 0,
    }
    assert body["return_logprob"] is True


def test_connections_are_reused_and_bounded():
    def slow(number: int, body: dict[str, Any]) -> None:
        slowly(0.01)

    with FakeServer(slow) as server:
        asks = _asks(60)
        assert _all_once(_complete([server.url], asks, concurrency=5), asks)
    assert server.most_at_once == 5
    assert server.connections <= 6


@pytest.mark.parametrize(
    "misbehave",
    [
        lambda number, body: (503, "busy") if number % 2 == 0 else None,
        lambda number, body: (500, {"error": "x"}) if number % 3 == 0 else None,
        lambda number, body: (200, "not json") if number % 3 == 0 else None,
        lambda number, body: (200, completion(body, "v1", "abort")) if number % 3 == 0 else None,
        lambda number, body: (200, completion(body, "v1") | {"output_ids": []}) if number % 3 == 0 else None,
    ],
    ids=["503", "500", "not-json", "aborted", "tokens-without-logprobs"],
)
def test_failed_attempts_are_repeated(misbehave: Misbehaviour):
    with FakeServer(misbehave) as server:
        asks = _asks(12)
        # one after the other, so that no ask meets more failures in a row than it has retries
        assert _all_once(_complete([server.url], asks, concurrency=1), asks)
    assert len(server.generated) > 12
    assert len({body["rid"] for body in server.generated}) == len(server.generated)


def test_a_broken_connection_is_no_lost_sample():
    with FakeServer(lambda number, body: (0, "") if number in (2, 5, 6) else None) as server:
        asks = _asks(12)
        assert _all_once(_complete([server.url], asks, concurrency=3), asks)


def test_a_timeout_aborts_the_attempt_and_its_late_answer_is_not_taken():
    def late(number: int, body: dict[str, Any]) -> None:
        slowly(0.6 if number == 0 else 0)

    with FakeServer(late) as server:
        patience = Patience(timeout_seconds=0.2, retries=3, first_delay_seconds=0.01)
        done = _complete([server.url], _asks(3), patience=patience, concurrency=1)
        time.sleep(0.6)  # the late answer comes now
    assert _all_once(done, _asks(3))
    assert server.aborted == [server.generated[0]["rid"]]
    assert max(c.attempts for c in done) == 2


def test_retries_end_in_an_error_that_says_where_and_why():
    with FakeServer(lambda number, body: (503, "overloaded")) as server:
        with pytest.raises(UserError) as caught:
            _complete([server.url], _asks(4))
        assert "4 times" in caught.value.what and "overloaded" in caught.value.what
        assert server.url in caught.value.what and caught.value.remedy


def test_a_refused_request_is_not_repeated():
    server = FakeServer(lambda number, body: (400, "too long"))
    with server, pytest.raises(UserError, match="too long"):
        _complete([server.url], _asks(1))
    assert len(server.generated) == 1


def test_delays_double_up_to_a_limit():
    patience = Patience(first_delay_seconds=0.1, longest_delay_seconds=0.5)
    for attempt, whole in enumerate((0.1, 0.2, 0.4, 0.5, 0.5)):
        assert whole / 2 <= patience.delay(attempt) <= whole


def test_load_is_balanced_over_servers():
    def slow(number: int, body: dict[str, Any]) -> None:
        slowly(0.01)

    with FakeServer(slow) as first, FakeServer(slow) as second:
        asks = _asks(40)
        assert _all_once(_complete([first.url, second.url], asks), asks)
    assert len(first.generated) > 10 and len(second.generated) > 10


def test_a_dead_server_is_skipped():
    with FakeServer() as gone:
        dead = gone.url
    with FakeServer() as alive:
        asks = _asks(20)
        assert _all_once(_complete([dead, alive.url], asks), asks)
    assert len(alive.generated) == 20


def test_without_a_server_what_was_accepted_stays():
    def dies(number: int, body: dict[str, Any]) -> tuple[int, str] | None:
        server.healthy = number < 5
        return (0, "") if number >= 5 else None

    done: list[Completion] = []
    with FakeServer(dies) as server, pytest.raises(ServersGone, match=server.url):
        _complete([server.url], _asks(9), concurrency=1, done=done)
    assert [c.uid for c in done] == [f"p{i}/0" for i in range(5)]


def test_a_server_with_other_weights_is_not_sampled_from():
    with FakeServer(version="old") as old, FakeServer(version="v1") as new:
        asks = _asks(20)
        done = _complete([old.url, new.url], asks)
        assert _all_once(done, asks)
        assert {version for c in done for version in c.versions} == {"v1"}
    assert len(old.generated) <= 8  # what was in flight when it was found out


def test_weights_that_change_during_a_sample_are_noticed():
    def change(number: int, body: dict[str, Any]) -> tuple[int, Any] | None:
        answer = completion(body, "v1")
        answer["meta_info"]["weight_versions"] = [
            {"version": "v0", "start": 0, "end": 1},
            {"version": "v1", "start": 1, "end": 2},
        ]
        return 200, answer

    with FakeServer(change) as server:
        (done,) = _complete([server.url], _asks(1), version=None)
        assert done.versions == ("v0", "v1")
        with pytest.raises(ServersGone, match="v0"):
            _complete([server.url], _asks(1))


def test_older_servers_tell_one_version():
    def older(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        answer = completion(body, "v1")
        del answer["meta_info"]["weight_versions"]
        return 200, answer

    with FakeServer(older) as server:
        assert _complete([server.url], _asks(1))[0].versions == ("v1", "v1")


def test_giving_up_aborts_what_is_in_flight():
    def hang_or_refuse(number: int, body: dict[str, Any]) -> tuple[int, str] | None:
        slowly(0.3)
        return (400, "refused") if body["input_ids"][0] == 1 else (slowly(0.5), None)[1]

    with FakeServer(hang_or_refuse) as server:
        with pytest.raises(UserError, match="refused"):
            _complete([server.url], _asks(4), concurrency=4)
        assert len(server.aborted) == 3

"""Sampling ahead with a real server: requests go on through a change of weights, and every token knows which
weights it came from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch

from grpo_mega.rollout.pending import Pending
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.rollout.sglang import SglangEngine
from grpo_mega.types import Group
from tests import tiny
from tests.processes import run_ranks
from tests.sglang.conftest import Model, Owner, Weights, assert_all_gone
from tests.sglang.test_sampling_and_sync import TRANSPORTS, prompts

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

Engines = Callable[..., SglangEngine]
LONG, SHORT = SamplingParams(max_new_tokens=100), SamplingParams(max_new_tokens=9)
PROMPTS, GROUP = 24, 4


def some_have_come(pending: Pending, count: int = 8) -> None:
    deadline = time.monotonic() + 120
    while len(pending.done) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def logprobs_of(model: Model, weights: Weights, group: Group) -> list[torch.Tensor]:
    """Of each sample's tokens, as the trainer computes them with these weights."""
    reference = tiny.load_model(model.directory)
    reference.load_state_dict(dict(weights), strict=False)
    found = []
    for sample in group.samples:
        start = len(group.prompt.token_ids)
        ids = torch.tensor([*group.prompt.token_ids, *sample.response_ids])
        logits = reference(ids[None]).logits.detach()[0, start - 1 : -1]
        found.append(torch.log_softmax(logits, -1).gather(-1, ids[start:, None])[:, 0])
    return found


def check_tokens(model: Model, groups: Sequence[Group], weights: dict[int, Weights]) -> None:
    """Every log-prob is that of the weights its token is stamped with."""
    for group in groups:
        by_version = {version: logprobs_of(model, one, group) for version, one in weights.items()}
        for index, sample in enumerate(group.samples):
            assert len(sample.versions) == len(sample.response_ids) == LONG.max_new_tokens
            assert list(sample.versions) == sorted(sample.versions)
            expected = torch.stack([by_version[v][index][at] for at, v in enumerate(sample.versions)])
            difference = torch.tensor(sample.sampler_logprobs) - expected
            assert float(difference.abs().max()) < 1e-3


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_requests_go_on_with_new_weights(external: Engines, model: Model, transport: str):
    engine = external(transport=transport, staleness=3, concurrency=32)
    weights = {1: model.first, 2: model.second, 3: model.first}
    engine.load(weights[1])
    pending = engine.begin(prompts(4), GROUP, LONG, seed=3)
    short = engine.begin(prompts(PROMPTS), GROUP, SHORT, seed=4)
    for version, so_many in ((2, 8), (3, 40)):  # short ones come and go beside the 16 long ones
        some_have_come(short, so_many)
        engine.load(weights[version])
    groups = engine.finish(pending)
    assert [group.prompt.uid for group in groups] == [f"train-{i}" for i in range(4)]
    samples = [sample for group in groups for sample in group.samples]
    assert any(len(set(sample.versions)) > 1 for sample in samples), "nothing was in flight"
    check_tokens(model, groups, weights)
    assert [group.prompt.uid for group in engine.finish(short)] == [f"train-{i}" for i in range(PROMPTS)]
    assert engine.metrics["rollout/retried_requests"] == 0


def test_what_is_cancelled_leaves_the_server_free(external: Engines, model: Model, owner: Owner):
    engine = external(staleness=1, concurrency=16)
    engine.load(model.first)
    pending = engine.begin(prompts(PROMPTS), GROUP, LONG, seed=3)
    some_have_come(pending)
    pending.cancel()
    engine.load(model.second)
    (group,) = engine.generate(prompts(1), GROUP, LONG, seed=3)
    check_tokens(model, [group], {2: model.second})
    assert pending.missing, "it had come to its end before"


def test_a_server_that_dies_under_requests_begun_ahead(owner: Owner, model: Model, monkeypatch):
    """The next sync brings it back; what had come stays, the rest is asked again."""
    engine = owner.engine
    monkeypatch.setattr(engine, "block", engine.block.model_copy(update={"max_staleness": 1}))
    engine.load(model.first)
    restarts, before = owner.pool.restarts, engine.updates
    pending = engine.begin(prompts(PROMPTS), GROUP, LONG, seed=3)
    some_have_come(pending)
    (server,) = psutil.Process(owner.pid).children()
    server.kill()
    server.wait()
    engine.load(model.second)
    groups = engine.finish(pending)
    assert [group.prompt.uid for group in groups] == [f"train-{i}" for i in range(PROMPTS)]
    assert owner.pool.restarts == restarts + 1
    assert {v for group in groups for s in group.samples for v in s.versions} == {before, before + 1}
    check_tokens(model, groups, {before: model.first, before + 1: model.second})


def test_a_run_samples_one_step_ahead(sglang_python: str, tmp_path: Path):
    """On two ranks: every step has all its groups, none is older than allowed, and nothing is left behind."""
    run_dir = tmp_path / "run"
    recipe = tiny.recipe_dict(
        run_dir,
        rollout={
            "engine": "sglang",
            "max_staleness": 1,
            "dynamic_sampling": {},
            "sglang": {"python": sglang_python, "timeout_seconds": 60},
        },
        parallel={"dp": 2},
    )
    assert run_ranks(2, tiny.train_on_pool, recipe) == [0, 0]
    rows = [row for row in tiny.metrics_of(run_dir) if "rollout/groups_kept" in row]
    assert len(rows) == 5
    for number, row in enumerate(rows):
        assert row["rollout/groups_kept"] == 8 and row["rollout/groups_missing"] == 0
        # the first step has no step to be sampled in; spare groups wait for one step more
        assert row["rollout/staleness_max"] <= min(number, 2)
        assert row["rollout/retried_requests"] == 0
    assert all(row["rollout/staleness_mean"] > 0 for row in rows[1:])
    assert_all_gone(run_dir)

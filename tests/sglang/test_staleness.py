"""Sampling ahead with a real server: requests go on through a change of weights, and every token knows which
weights it came from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import psutil
import pytest
import torch

from grpo_mega.rollout.pending import Pending
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.rollout.sglang import SglangEngine
from grpo_mega.sync import transport as transports
from grpo_mega.types import Group
from tests import tiny
from tests.sglang.conftest import Model, Owner, Weights
from tests.sglang.test_sampling_and_sync import TRANSPORTS, greedy_of, greedy_of_trainer, prompts

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


@pytest.mark.parametrize("moment", ["as it takes them", pytest.param("before", marks=pytest.mark.exhaustive)])
def test_a_server_that_dies_with_new_weights_under_requests_begun_ahead(
    owner: Owner, model: Model, moment: str, monkeypatch: pytest.MonkeyPatch
):
    """It is started again and gets them; what had come stays, the rest is asked again."""
    engine = owner.engine
    monkeypatch.setattr(engine, "block", engine.block.model_copy(update={"max_staleness": 1}))
    engine.load(model.first)
    pid, restarts, before = owner.pid, owner.pool.restarts, engine.updates
    pending = engine.begin(prompts(PROMPTS), GROUP, LONG, seed=3)
    some_have_come(pending)
    assert engine._transport is not None
    kind, killed = type(engine._transport), list[psutil.Process]()
    whole = kind.send

    def kill() -> None:
        killed.extend(psutil.Process(pid).children(recursive=True))
        for process in killed:
            process.kill()

    def dying(self: transports.Transport, bucket: transports.NamedTensors) -> None:
        if not killed:
            kill()
        whole(self, bucket)

    monkeypatch.setattr(kind, "send", dying)
    if moment == "before":
        kill()
        psutil.wait_procs(killed)
    engine.load(model.second)
    assert killed and owner.pool.restarts == restarts + 1 and owner.pid != pid
    assert engine.report is not None and engine.report.attempts == (1 if moment == "before" else 2)
    groups = engine.finish(pending)
    assert [group.prompt.uid for group in groups] == [f"train-{i}" for i in range(PROMPTS)]
    assert {v for group in groups for s in group.samples for v in s.versions} == {before, before + 1}
    check_tokens(model, groups, {before: model.first, before + 1: model.second})
    assert greedy_of(engine) == greedy_of_trainer(model, model.second)

"""Servers that give their memory back while the trainer trains, and take it again with the next weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.rollout.sglang import SglangEngine
from grpo_mega.rollout.turns import load_generate
from tests import tiny
from tests.sglang.conftest import Model
from tests.sglang.test_sampling_and_sync import greedy_of, greedy_of_trainer, prompts

pytestmark = pytest.mark.sglang
Engines = Callable[..., SglangEngine]


def test_after_a_rest_the_server_is_the_trainer_again(external: Engines, model: Model):
    engine = external(colocate=True, transport="tensor")
    asked: list[str] = []
    engine.load(model.first)
    assert engine._control is not None
    call = engine._control.call
    engine._control.call = lambda url, path, body: (asked.append(path), call(url, path, body))[1]
    expected = [greedy_of_trainer(model, weights) for weights in (model.first, model.second)]
    assert greedy_of(engine) == expected[0]
    for weights, wanted in ((model.second, expected[1]), (model.first, expected[0])):
        engine.rest()
        engine.rest()  # it sleeps already
        engine.load(weights)
        assert greedy_of(engine) == wanted
    engine.rest()
    assert greedy_of(engine) == expected[0]  # asked while it sleeps, it takes the last weights first
    for path in ("release_memory_occupation", "resume_memory_occupation"):
        assert asked.count(path) == 3


def test_several_turns_with_a_server(external: Engines, model: Model):
    """What the policy said in any turn has the trainer's log-probs."""
    import torch

    engine = external()
    engine.function = load_generate("tests.calculator:interrupt")
    engine.load(model.first)
    params = SamplingParams(max_new_tokens=9, stop_ids=frozenset({7, 20}))
    groups = engine.generate(prompts(4), 3, params, 1)
    reference, several = tiny.load_model(model.directory), 0
    for group in groups:
        start = len(group.prompt.token_ids)
        for sample in group.samples:
            ids = torch.tensor([*group.prompt.token_ids, *sample.response_ids])
            logits = reference(ids[None]).logits.detach()[0, start - 1 : -1]
            expected = torch.log_softmax(logits, -1).gather(-1, ids[start:, None])[:, 0]
            chosen = torch.tensor(sample.chosen or [True] * len(sample.response_ids))
            found = torch.tensor(sample.sampler_logprobs)
            assert float((found - expected)[chosen].abs().max()) < 1e-4
            assert not found[~chosen].any()
            several += bool((~chosen).any())
    assert several > 6

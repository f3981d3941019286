"""The embedded engine: what it samples, with which log-probs, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo_mega.types import Prompt
from tests import tiny


def _prompts(count: int) -> list[Prompt]:
    return [
        Prompt(uid=f"train-{i}", index=i, text="", token_ids=tuple(range(3, 5 + i % 4)), answer="")
        for i in range(count)
    ]


def _engine(directory: Path, prompts_per_batch: int = 3):
    from transformers import AutoConfig

    from grpo_mega.data.tokenizer import scratch_tokenizer
    from grpo_mega.rollout.local import LocalEngine
    from grpo_mega.sync.stream import HfDirectory

    config = AutoConfig.from_pretrained(directory)
    engine = LocalEngine(config, scratch_tokenizer(), torch.float32, torch.device("cpu"), prompts_per_batch)
    tensors = HfDirectory(directory)
    engine.load((name, tensors(name)) for name in tensors.names)
    return engine


def _generate_share(directory: Path, rank: int, ranks: int, **options):
    from grpo_mega.rollout.sampling import SamplingParams

    engine = _engine(directory)
    share = engine.share(_prompts(12), rank, ranks)
    params = SamplingParams(max_new_tokens=10, stop_ids=frozenset({7, 20, 30}), **options)
    return engine.generate([prompt for _, prompt in share], 4, params, seed=5)


@pytest.fixture(scope="module", params=["qwen2", "qwen3_moe"])
def model(request, tmp_path_factory):
    return tiny.save_model(request.param, tmp_path_factory.mktemp(request.param))


def test_samples_do_not_depend_on_the_number_of_ranks(model):
    whole = {g.prompt.uid: g for g in _generate_share(model, 0, 1)}
    for ranks in (2, 3, 4, 7):
        split = {g.prompt.uid: g for rank in range(ranks) for g in _generate_share(model, rank, ranks)}
        assert split == whole  # tokens and log-probs to the last bit


def test_another_seed_and_another_rollout_sample_differently(model):
    from grpo_mega.rollout.sampling import SamplingParams

    engine, params = _engine(model), SamplingParams(max_new_tokens=10)
    first, again, other = (engine.generate(_prompts(2), 4, params, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len({sample.response_ids for sample in first[0].samples}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_scaled_model(model, temperature):
    """Left padding, the cache, its repetition over the group and dropped rows leave no trace."""
    reference = tiny.load_model(model)
    for group in _generate_share(model, 0, 1, temperature=temperature):
        for sample in group.samples:
            ids = torch.tensor([*group.prompt.token_ids, *sample.response_ids])
            logits = reference(ids[None]).logits[0, len(group.prompt.token_ids) - 1 : -1] / temperature
            expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(sample.response_ids)[:, None])[
                :, 0
            ]
            torch.testing.assert_close(torch.tensor(sample.sampler_logprobs), expected, atol=2e-5, rtol=1e-5)


def test_generation_stops_at_stop_ids_and_keeps_them(model):
    samples = [sample for group in _generate_share(model, 0, 1) for sample in group.samples]
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    assert stopped and len(stopped) < len(samples)
    for sample in samples:
        inner, last = sample.response_ids[:-1], sample.response_ids[-1]
        assert not {7, 20, 30} & set(inner)
        assert (last in {7, 20, 30}) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.response_ids) == 10
        assert len(sample.sampler_logprobs) == len(sample.response_ids)


def test_greedy_takes_the_most_probable_token(model):
    reference = tiny.load_model(model)
    for group in _generate_share(model, 0, 1, temperature=0.0):
        assert len({sample.response_ids for sample in group.samples}) == 1
        ids = torch.tensor([*group.prompt.token_ids, *group.samples[0].response_ids])
        best = reference(ids[None]).logits[0, len(group.prompt.token_ids) - 1 : -1].argmax(-1)
        assert tuple(best.tolist()) == group.samples[0].response_ids


def test_new_weights_are_used(model):
    engine = _engine(model)
    from grpo_mega.rollout.sampling import SamplingParams
    from grpo_mega.sync.stream import HfDirectory

    params, tensors = SamplingParams(max_new_tokens=6), HfDirectory(model)
    before = engine.generate(_prompts(2), 2, params, seed=0)
    engine.load((name, tensors(name) * 0.5) for name in tensors.names)
    assert engine.generate(_prompts(2), 2, params, seed=0) != before

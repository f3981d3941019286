"""Samples of several turns: what the policy said has its log-probs, what it was told has no part in the
loss."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_mega.data.packing import pack
from grpo_mega.data.tokenizer import scratch_tokenizer
from grpo_mega.errors import UserError
from grpo_mega.rollout.client import Ask, Completion
from grpo_mega.rollout.local import LocalEngine
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.rollout.turns import Draft, Generate, converse, load_generate
from grpo_mega.sync.stream import HfDirectory
from grpo_mega.types import Group, Prompt, Sample, TrainSequence
from tests import tiny

TOKENIZER = scratch_tokenizer()
END = int(TOKENIZER.eos_token_id)
PARAMS = SamplingParams(max_new_tokens=9, stop_ids=frozenset({END, 7, 20}))


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(f"train-{i}", i, "", tuple(range(3 + i, 7 + i + i % 3)), "") for i in range(count)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model("qwen2", tmp_path_factory.mktemp("model"))


def _engine(directory: Path, function: Generate | None, prompts_per_batch: int = 2) -> LocalEngine:
    device = torch.device("cpu")
    config = tiny.hf_config("qwen2")
    engine = LocalEngine(config, TOKENIZER, torch.float32, device, prompts_per_batch, function)
    source = HfDirectory(directory)
    engine.load((name, source(name)) for name in source.names)
    return engine


def _samples(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def test_one_turn_is_the_plain_sample(directory: Path):
    plain = _engine(directory, None).generate(_prompts(4), 3, PARAMS, 5)
    turned = _engine(directory, load_generate("tests.calculator:once")).generate(_prompts(4), 3, PARAMS, 5)
    for one, other in zip(_samples(plain), _samples(turned), strict=True):
        assert (one.uid, one.response_ids, one.text) == (other.uid, other.response_ids, other.text)
        assert one.finish_reason == other.finish_reason and other.chosen is None
        assert other.sampler_logprobs == pytest.approx(one.sampler_logprobs, abs=1e-5)


def test_what_was_said_has_its_logprobs_and_what_was_told_is_marked(directory: Path):
    groups = _engine(directory, load_generate("tests.calculator:interrupt")).generate(
        _prompts(4), 3, PARAMS, 5
    )
    model, told = tiny.load_model(directory), TOKENIZER.encode("7;", add_special_tokens=False)
    several = 0
    for group in groups:
        start = len(group.prompt.token_ids)
        for sample in group.samples:
            assert len(sample.response_ids) <= 9
            chosen = np.array(sample.chosen or [True] * len(sample.response_ids))
            ids, logprobs = np.array(sample.response_ids), np.array(sample.sampler_logprobs)
            assert ids[~chosen].tolist() == (told * 9)[: (~chosen).sum()]
            assert (logprobs[~chosen] == 0).all()
            whole = torch.tensor([[*group.prompt.token_ids, *sample.response_ids]])
            logits = model(whole).logits.detach()[0, start - 1 : -1]
            expected = torch.log_softmax(logits, -1).gather(-1, whole[0, start:, None])[:, 0].numpy()
            assert logprobs[chosen] == pytest.approx(expected[chosen], abs=1e-4)
            several += (~chosen).any()
    assert several > 6


def test_samples_do_not_depend_on_who_makes_them(directory: Path):
    function = load_generate("tests.calculator:interrupt")
    whole = _samples(_engine(directory, function).generate(_prompts(6), 2, PARAMS, 1))
    parts: list[Sample] = []
    for rank in range(3):
        engine = _engine(directory, function)
        share = [prompt for _, prompt in engine.share(_prompts(6), rank, 3)]
        parts += _samples(engine.generate(share, 2, PARAMS, 1))
    assert parts == whole


async def _scripted(function: Generate, said: list[str], room: int = 40) -> Sample:
    """A conversation with a policy that says this."""
    lines, heard = iter(said), []

    async def answer(ask: Ask) -> Completion:
        text = next(lines)
        ids = [*TOKENIZER.encode(text.rstrip("$"), add_special_tokens=False), *[END] * text.endswith("$")]
        ids = ids[: ask.params.max_new_tokens]
        reason = "stop" if ids[-1] in ask.params.stop_ids else "length"
        return Completion(ask.uid, tuple(ids), (-1.0,) * len(ids), reason, (), 1)

    params = SamplingParams(max_new_tokens=room, stop_ids=frozenset({END}))
    draft = Draft(_prompts(1)[0], "train-0/0", 0, params, 0, TOKENIZER)
    await converse(function, [draft], answer, heard.append)
    return heard[0]


def test_the_calculator_of_the_page():
    calculator = load_generate("tests.calculator:generate")
    sample = asyncio.run(_scripted(calculator, ["12+30?", "6*?", "so 42$"]))
    assert sample.text == "12+30?42;6*?error;so 42" and sample.finish_reason == "stop"
    assert sample.chosen is not None
    told = [c for c, chosen in zip(sample.text, sample.chosen, strict=False) if not chosen]
    assert "".join(told) == "42;error;"
    assert sample.response_ids[-1] == END and sample.chosen[-1]


def test_room_is_shared_and_nothing_goes_beyond_it():
    calculator = load_generate("tests.calculator:generate")
    sample = asyncio.run(_scripted(calculator, ["12+30?", "never"], room=8))
    assert sample.text == "12+30?42" and sample.finish_reason == "length"


def test_mistakes_are_named(directory: Path):
    for path, words in [
        ("no.such:generate", "cannot be imported"),
        ("tests.calculator:nothing", "cannot be imported"),
        ("tests.calculator:not_async", "no `async def`"),
    ]:
        with pytest.raises(UserError, match=words):
            load_generate(path)
    with pytest.raises(UserError, match="before the policy said anything"):
        asyncio.run(_scripted(load_generate("tests.calculator:silent"), []))


def test_packing_leaves_what_was_told_out():
    """Prompt of 2, response of 3 of which the middle was told: positions 2 and 4 are trained on."""
    trained = np.array([True, False, True])
    logprobs = np.array([-0.1, 0.0, -0.3], np.float32)
    sequence = TrainSequence(0, "train-0/0", np.arange(5), 2, logprobs, 1.0, trained=trained)
    assert (sequence.response_length, sequence.trained_length) == (3, 2)
    batch = pack([sequence], 6, torch.device("cpu"))
    assert batch.response_mask_T.tolist() == [False, False, True, False, True, False]
    assert batch.sampler_logprobs_T[[2, 4]].tolist() == pytest.approx([-0.1, -0.3])

"""Log-probabilities and entropies against float64, alone and with the vocabulary split over ranks.

# T tokens, V vocabulary columns with their padding
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.kernels.logprob import vocab_parallel_logprob

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # log-probs, entropies, gradient of the logits


def _problem(tokens: int, vocab: int, padded: int, seed: int, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    """Logits, targets, and the gradients that come from above for each of the two results."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(tokens, padded, generator=generator) * scale
    target_T = torch.randint(vocab, (tokens,), generator=generator)
    above_2T = torch.randn(2, tokens, generator=generator)
    return logits_TV, target_T, above_2T


def _oracle(logits_TV, target_T, above_2T, temperature: float, vocab: int) -> Results:
    logits_TV = logits_TV.double().requires_grad_()
    logp_TV = torch.log_softmax(logits_TV[:, :vocab] / temperature, dim=1)
    logprob_T = logp_TV.gather(1, target_T[:, None])[:, 0]
    entropy_T = -(logp_TV.exp() * logp_TV).sum(1)
    torch.autograd.backward([logprob_T, entropy_T], list(above_2T.double()))
    assert logits_TV.grad is not None
    return logprob_T.detach(), entropy_T.detach(), logits_TV.grad


def _ours(logits_TV, target_T, above_2T, temperature: float, vocab: int, group=None) -> Results:
    leaf_TV = logits_TV.clone().requires_grad_()
    logprob_T, entropy_T = vocab_parallel_logprob(leaf_TV, target_T, temperature, vocab, group)
    torch.autograd.backward([logprob_T, entropy_T], list(above_2T))
    assert leaf_TV.grad is not None
    return logprob_T.detach(), entropy_T.detach(), leaf_TV.grad


def _assert_equal(ours: Results, expected: Results, atol: float = 2e-5) -> None:
    for ours_, expected_ in zip(ours, expected, strict=True):
        torch.testing.assert_close(ours_.double(), expected_, atol=atol, rtol=1e-5)


def test_by_hand():
    # p = (1, 3) / 4: log .75 = -.2876821; entropy .75 ln(4/3) + .25 ln 4 = .2157616 + .3465736 = .5623351
    logits_TV = torch.tensor([[0.0, math.log(3.0)]])
    logprob_T, entropy_T = vocab_parallel_logprob(logits_TV, torch.tensor([1]), 1.0, 2)
    assert (logprob_T.item(), entropy_T.item()) == pytest.approx((-0.2876821, 0.5623351))
    # temperature .5 squares the odds: p = (1, 9) / 10: log .9 = -.1053605;
    # .9 * .1053605 + .1 * ln 10 = .3250830
    logprob_T, entropy_T = vocab_parallel_logprob(logits_TV, torch.tensor([1]), 0.5, 2)
    assert (logprob_T.item(), entropy_T.item()) == pytest.approx((-0.1053605, 0.3250830))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(0, 2**31),
    st.sampled_from([0.3, 1.0, 1.7]),
)
def test_values_and_gradients_equal_float64(tokens, vocab, padding, seed, temperature):
    problem = _problem(tokens, vocab, vocab + padding, seed)
    _assert_equal(_ours(*problem, temperature, vocab), _oracle(*problem, temperature, vocab))


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_its_own_gradient(used):
    """Supervised stages use the log-probability only."""
    logits_TV, target_T, above_2T = _problem(5, 20, 24, seed=0)
    above_2T[1 - used] = 0.0
    leaf_TV = logits_TV.clone().requires_grad_()
    vocab_parallel_logprob(leaf_TV, target_T, 1.0, 20)[used].backward(above_2T[used])
    assert leaf_TV.grad is not None
    expected_TV = _oracle(logits_TV, target_T, above_2T, 1.0, 20)[2]
    torch.testing.assert_close(leaf_TV.grad.double(), expected_TV, atol=2e-6, rtol=1e-5)


def test_padded_columns_do_not_matter():
    logits_TV, target_T, above_2T = _problem(6, 20, 32, seed=1)
    expected = _ours(logits_TV[:, :20], target_T, above_2T, 0.7, 20)
    logits_TV[:, 20:] = 1e4
    logprob_T, entropy_T, gradient_TV = _ours(logits_TV, target_T, above_2T, 0.7, 20)
    assert (gradient_TV[:, 20:] == 0.0).all()
    torch.testing.assert_close((logprob_T, entropy_T, gradient_TV[:, :20]), expected)


def test_the_logits_of_the_model_are_not_written_over():
    logits_TV, target_T, _ = _problem(3, 10, 16, seed=2)
    before_TV = logits_TV.clone()
    vocab_parallel_logprob(logits_TV, target_T, 1.0, 10)
    assert torch.equal(logits_TV, before_TV)


def test_logits_ten_thousand_apart():
    # all the mass on column 1: log-probs 0 and -2e4, entropy 0; d logp = onehot - p is 0 on the certain token
    logits_TV = torch.tensor([[-1e4, 1e4, 0.0]]).repeat(2, 1)
    target_T = torch.tensor([1, 0])
    logprob_T, entropy_T, gradient_TV = _ours(logits_TV, target_T, torch.ones(2, 2), 1.0, 3)
    assert logprob_T.tolist() == [0.0, -2e4]
    assert entropy_T.tolist() == [0.0, 0.0]
    assert gradient_TV.tolist() == [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]]


def test_a_column_of_minus_infinity_has_probability_0():
    # what is left is p = (1, 3) / 4
    logits_TV = torch.tensor([[0.0, -math.inf, math.log(3.0)]])
    logprob_T, entropy_T, gradient_TV = _ours(logits_TV, torch.tensor([2]), torch.ones(2, 1), 1.0, 3)
    assert (logprob_T.item(), entropy_T.item()) == pytest.approx((-0.2876821, 0.5623351))
    assert gradient_TV.isfinite().all() and gradient_TV[0, 1] == 0.0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 30.0, 1e4]), st.sampled_from([0.1, 1.0]))
def test_a_logprob_is_never_positive_nor_an_entropy_negative(seed, scale, temperature):
    problem = _problem(16, 33, 40, seed, scale)
    logprob_T, entropy_T, gradient_TV = _ours(*problem, temperature, 33)
    assert (logprob_T <= 0.0).all() and logprob_T.isfinite().all()
    # entropy is a difference of two float32 numbers of at most ln 33 = 3.5
    assert (entropy_T >= -1e-6).all() and (entropy_T <= math.log(33) + 1e-5).all()
    assert gradient_TV.isfinite().all()


def test_bfloat16_logits_lose_nothing_but_the_gradient_s_last_bits():
    logits_TV, target_T, above_2T = _problem(8, 50, 64, seed=3)
    logits_TV = logits_TV.bfloat16()
    ours = _ours(logits_TV, target_T, above_2T, 0.8, 50)
    expected = _oracle(logits_TV, target_T, above_2T, 0.8, 50)
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == torch.bfloat16
    _assert_equal(ours[:2], expected[:2])
    # bfloat16 keeps 8 bits: half a unit in the last place is 2^-9 of the number
    torch.testing.assert_close(ours[2].double(), expected[2], atol=1e-7, rtol=2**-8)


def test_no_tokens_at_all():
    logprob_T, entropy_T = vocab_parallel_logprob(
        torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), 1.0, 8
    )
    assert logprob_T.shape == entropy_T.shape == (0,)


def _ours_on_shard(problem: tuple[torch.Tensor, ...], temperature: float, vocab: int) -> Results:
    from grpo_mega.engine.parallel import initialize_process_group

    initialize_process_group()
    logits_TV, target_T, above_2T = problem
    shard_TV = logits_TV.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    return _ours(shard_TV, target_T, above_2T, temperature, vocab, dist.group.WORLD)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("vocab", "padded"),
    [
        (32, 32),
        (29, 32),  # padding inside the last shard
        (8, 32),  # shards of padding only: the last of two, or the last three of four (or two, as 8 / 8)
        (3, 32),
    ],
)
def test_a_split_vocabulary_equals_a_whole_one(size, vocab, padded, ranks):
    logits_TV, target_T, above_2T = _problem(24, vocab, padded, seed=vocab)
    logits_TV[:, vocab:] = 1e4
    # targets at both ends of the vocabulary, and with them at both ends of shards
    target_T[:4] = torch.tensor(
        [0, vocab - 1, min(vocab - 1, padded // size), min(vocab, padded // size) - 1]
    )
    problem = logits_TV, target_T, above_2T
    expected = _oracle(*problem, 0.7, vocab)
    shards = ranks(size).run(_ours_on_shard, problem, 0.7, vocab)
    gradient_TV = torch.cat([gradient for _, _, gradient in shards], dim=1)
    assert (gradient_TV[:, vocab:] == 0.0).all()
    for logprob_T, entropy_T, _ in shards:
        _assert_equal((logprob_T, entropy_T, gradient_TV), expected)
        assert (logprob_T <= 0.0).all()

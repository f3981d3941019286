"""Log-probability, entropy and squared probabilities from hidden states, against dense float64.

# T tokens, H hidden, V vocabulary columns with their padding
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.errors import UserError
from grpo_mega.kernels import epilogue
from grpo_mega.kernels.implementation import Implementation
from grpo_mega.kernels.logprob import linear_logprob
from grpo_mega.kernels.logprob_check import check_linear_logprob

IMPLEMENTATIONS: tuple[Implementation, ...] = ("eager", "compiled", "triton")


@dataclass(frozen=True)
class Problem:
    hidden_TH: torch.Tensor
    weight_VH: torch.Tensor
    target_T: torch.Tensor
    above_2T: torch.Tensor  # gradients that come from above
    vocab: int
    temperature: float = 0.7
    needed_T: torch.Tensor | None = None

    @classmethod
    def draw(cls, tokens: int, vocab: int, padding: int = 0, seed: int = 0, scale: float = 1.0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        hidden_TH = torch.randn(tokens, 8, generator=generator)
        weight_VH = torch.randn(vocab + padding, 8, generator=generator) * scale
        target_T = torch.randint(vocab, (tokens,), generator=generator)
        if tokens:
            target_T[0] = vocab - 1  # the last real column
        return cls(hidden_TH, weight_VH, target_T, torch.randn(2, tokens, generator=generator), vocab)


Results = tuple[torch.Tensor, ...]  # log-prob, entropy, squared probabilities, gradients of hidden and weight


def _oracle(problem: Problem) -> Results:
    hidden_TH, weight_VH = (v.double().requires_grad_() for v in (problem.hidden_TH, problem.weight_VH))
    logits_TV = (hidden_TH @ weight_VH.t())[:, : problem.vocab] / problem.temperature
    logp_TV = logits_TV.log_softmax(1)
    needed_T = torch.ones(len(problem.target_T)) if problem.needed_T is None else problem.needed_T
    logprob_T = logp_TV.gather(1, problem.target_T[:, None])[:, 0] * needed_T
    entropy_T = -(logp_TV.exp() * logp_TV).sum(1) * needed_T
    squared_T = logp_TV.detach().exp().square().sum(1) * needed_T
    torch.autograd.backward([logprob_T, entropy_T], list(problem.above_2T.double()))
    assert hidden_TH.grad is not None and weight_VH.grad is not None
    return logprob_T.detach(), entropy_T.detach(), squared_T, hidden_TH.grad, weight_VH.grad


def _ours(problem: Problem, implementation: Implementation = "eager", tile: int = 7) -> Results:
    hidden_TH, weight_VH = (v.clone().requires_grad_() for v in (problem.hidden_TH, problem.weight_VH))
    logprob_T, entropy_T, squared_T = linear_logprob(
        hidden_TH,
        weight_VH,
        problem.target_T,
        problem.temperature,
        real_vocab=problem.vocab,
        needed_T=problem.needed_T,
        implementation=implementation,
        tile=tile,
    )
    assert not squared_T.requires_grad
    torch.autograd.backward([logprob_T, entropy_T], list(problem.above_2T))
    assert hidden_TH.grad is not None and weight_VH.grad is not None
    return logprob_T.detach(), entropy_T.detach(), squared_T, hidden_TH.grad, weight_VH.grad


def assert_close(ours: Results, expected: Results, relative: float = 1e-5) -> None:
    """To the largest magnitude of each result."""
    for found, wanted in zip(ours, expected, strict=True):
        if wanted.numel():
            scale = max(float(wanted.abs().max()), 1.0)
            assert float((found.double() - wanted.double()).abs().max()) <= relative * scale


def test_the_example_by_hand() -> None:
    # p = (1, 3) / 4: ln .75; .75 ln(4/3) + .25 ln 4; (1 + 9) / 16
    weight_VH = torch.tensor([[0.0], [math.log(3.0)]])
    values = linear_logprob(torch.ones(1, 1), weight_VH, torch.tensor([1]), 1.0)
    assert [v.item() for v in values] == pytest.approx([-0.2876821, 0.5623351, 0.625])
    # temperature .5 squares the odds: p = (1, 9) / 10
    values = linear_logprob(torch.ones(1, 1), weight_VH, torch.tensor([1]), 0.5)
    assert [v.item() for v in values] == pytest.approx([-0.1053605, 0.3250830, 0.82])


@settings(max_examples=60)
@given(
    st.integers(0, 8),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(1, 50),
    st.integers(0, 2**31),
    st.sampled_from([0.3, 1.0, 1.7]),
)
def test_values_and_gradients_equal_float64(tokens, vocab, padding, tile, seed, temperature) -> None:
    problem = replace(Problem.draw(tokens, vocab, padding, seed), temperature=temperature)
    assert_close(_ours(problem, tile=tile), _oracle(problem), 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tile", [5, 64])
def test_every_implementation_equals_float64(implementation: Implementation, tile: int) -> None:
    problem = replace(Problem.draw(12, 61, 3), needed_T=torch.arange(12) % 3 > 0)
    assert_close(_ours(problem, implementation, tile), _oracle(problem))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_rounded_once(implementation: Implementation) -> None:
    """Logits and sums are float32: only the gradients come back in the format of their tensors."""
    problem = Problem.draw(12, 61, 3, seed=3)
    halved = replace(problem, hidden_TH=problem.hidden_TH.bfloat16(), weight_VH=problem.weight_VH.bfloat16())
    ours, expected = _ours(halved, implementation), _oracle(halved)
    assert_close(ours[:3], expected[:3])
    assert ours[3].dtype == ours[4].dtype == torch.bfloat16
    assert_close(ours[3:], expected[3:], 1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shift", [-1e3, 1e3])
def test_logits_that_are_all_far_below_or_above_0(implementation: Implementation, shift: float) -> None:
    problem = Problem.draw(6, 20, 4, seed=1)
    weight_VH = torch.cat([problem.weight_VH, torch.full((24, 1), shift)], 1)
    far = replace(problem, hidden_TH=torch.cat([problem.hidden_TH, torch.ones(6, 1)], 1), weight_VH=weight_VH)
    ours, near = _ours(far, implementation), _ours(problem, implementation)
    assert_close(ours[:2], near[:2], 1e-3)  # a thousand costs a float32 ten of its bits
    assert (ours[0] <= 0).all()


def test_logits_ten_thousand_apart() -> None:
    # all the mass on column 1: log-probs 0 and -2e4, entropy 0; d logp = onehot - p is 0 on the certain token
    weight_VH = torch.tensor([[-1e4], [1e4], [0.0]])
    problem = Problem(torch.ones(2, 1), weight_VH, torch.tensor([1, 0]), torch.ones(2, 2), 3, 1.0)
    logprob_T, entropy_T, squared_T, _, gradient_VH = _ours(problem, tile=2)
    assert logprob_T.tolist() == [0.0, -2e4]
    assert entropy_T.tolist() == [0.0, 0.0]
    assert squared_T.tolist() == [1.0, 1.0]
    assert gradient_VH.flatten().tolist() == [1.0, -1.0, 0.0]


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 30.0, 1e4]), st.sampled_from([0.1, 1.0]))
def test_a_logprob_is_never_positive_nor_an_entropy_negative(seed, scale, temperature) -> None:
    problem = replace(Problem.draw(16, 33, 7, seed, scale), temperature=temperature)
    logprob_T, entropy_T, squared_T, *gradients = _ours(problem)
    assert (logprob_T <= 0.0).all() and logprob_T.isfinite().all()
    # entropy is a difference of two float32 numbers of at most ln 33 = 3.5
    assert (entropy_T >= -1e-5).all() and (entropy_T <= math.log(33) + 1e-5).all()
    assert (squared_T > 0).all() and (squared_T <= 1.0 + 1e-5).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_padding_has_no_probability_and_no_gradient() -> None:
    problem = Problem.draw(6, 20, 12, seed=1)
    problem.weight_VH[20:] = 1e4
    ours = _ours(problem)
    assert_close(ours, _oracle(problem))
    assert (ours[4][20:] == 0.0).all()


def test_rows_that_are_not_needed_cost_nothing_and_are_0() -> None:
    problem = replace(Problem.draw(6, 20), needed_T=torch.tensor([True, False, True, False, False, True]))
    problem.hidden_TH[1] = torch.nan  # never looked at
    logprob_T, entropy_T, squared_T, gradient_TH, gradient_VH = _ours(problem)
    unneeded = [1, 3, 4]
    for values in (logprob_T, entropy_T, squared_T, gradient_TH):
        assert not values[unneeded].any()
    assert gradient_VH.isfinite().all()


def test_one_result_alone_has_its_own_gradient() -> None:
    """Supervised stages use the log-probability only; rows of zero gradient are dropped."""
    problem = Problem.draw(5, 20, 4)
    problem.above_2T[1] = 0.0
    problem.above_2T[0, 2] = 0.0
    assert_close(_ours(problem), _oracle(problem))


class _Weight(torch.nn.Parameter):
    """A parameter inside Megatron's data-parallel wrapper."""

    main_grad: torch.Tensor
    grad_added_to_main_grad: bool
    zero_out_wgrad: bool


@pytest.mark.parametrize("tied", [False, True])
def test_the_weight_gradient_goes_straight_into_main_grad(tied: bool) -> None:
    """On top of what is there. A tied weight gets zeros from autograd, to which its embedding's part is
    added."""
    problem = Problem.draw(5, 20, 4)
    weight_VH = _Weight(problem.weight_VH.bfloat16())
    weight_VH.main_grad = torch.ones(24, 8)
    weight_VH.grad_added_to_main_grad = False
    if tied:
        weight_VH.zero_out_wgrad = True
    halved = replace(problem, weight_VH=weight_VH.detach(), hidden_TH=problem.hidden_TH.bfloat16())
    values = linear_logprob(
        halved.hidden_TH, weight_VH, problem.target_T, problem.temperature, real_vocab=20, tile=7
    )
    torch.autograd.backward(values[:2], list(problem.above_2T))
    assert weight_VH.grad_added_to_main_grad
    assert_close((weight_VH.main_grad - 1.0,), _oracle(halved)[4:], 1e-2)
    if tied:
        assert weight_VH.grad is not None and not weight_VH.grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_before_a_run_passes(implementation: Implementation, dtype: torch.dtype) -> None:
    worst = check_linear_logprob(implementation, torch.device("cpu"), dtype)
    assert worst < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("not_a_number", [False, True])
def test_the_check_names_what_is_wrong(not_a_number: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets the last column of a tile, as one that mishandles its tail would; one that makes
    no numbers."""
    right = epilogue.epilogue_of("eager")

    def fold(x_NK: torch.Tensor, column_N: torch.Tensor, statistics: epilogue.Statistics) -> None:
        right.fold(x_NK[:, :-1].contiguous(), column_N, statistics)
        if not_a_number:
            statistics.values_5N.fill_(torch.nan)

    wrong = epilogue.Epilogue(fold, right.differentiate)
    monkeypatch.setattr("grpo_mega.kernels.logprob.epilogue_of", lambda implementation: wrong)
    with pytest.raises(UserError, match=r"log-probabilities are wrong: the .* is off by") as caught:
        check_linear_logprob("eager", torch.device("cpu"), torch.float32)
    assert "train.kernels: eager" in str(caught.value)

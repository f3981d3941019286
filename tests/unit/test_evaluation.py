"""pass@k by hand and by brute force; what an evaluation reports, over two ranks with a made-up sampler.

# P problems, K samples of each
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.evaluation import evaluate, pass_at_k
from grpo_mega.recipe.blocks import EvalBlock
from grpo_mega.types import Group, Prompt, Sample, Score

SEED = 7
OF_SUCCESS = (
    "eval_avg_test_pass_rate",
    "eval_std_pass_rate",
    "eval_min_pass_rate",
    "eval_max_pass_rate",
    "eval_samples_evaluated",
    "pass@1",
)


def _passed(*rows: str) -> torch.Tensor:
    return torch.tensor([[mark == "+" for mark in row] for row in rows])


def test_pass_at_k_by_hand():
    # 1 - C(4 - c, 2) / C(4, 2), c = 1, 0, 4, 2, 3: 1 - 3/6, 1 - 6/6, 1 - 0, 1 - 1/6, 1 - 0
    found = pass_at_k(_passed("+---", "----", "++++", "-+-+", "+++-"), 2)
    assert found.tolist() == pytest.approx([0.5, 0.0, 1.0, 5 / 6, 1.0])


def test_pass_at_1_is_the_share_and_pass_at_all_is_any():
    passed_PK = _passed("+---", "----", "-++-")
    assert pass_at_k(passed_PK, 1).tolist() == pytest.approx([0.25, 0.0, 0.5])
    assert pass_at_k(passed_PK, 4).tolist() == [1.0, 0.0, 1.0]


@settings(deadline=None)
@given(st.data(), st.integers(1, 7))
def test_pass_at_k_is_the_share_of_subsets_that_pass(data, total):
    k = data.draw(st.integers(1, total))
    rows = data.draw(st.lists(st.lists(st.booleans(), min_size=total, max_size=total), max_size=4))
    expected = []
    for row in rows:
        subsets = list(combinations(row, k))
        expected.append(sum(map(any, subsets)) / len(subsets))
    passed_PK = torch.tensor(rows, dtype=torch.bool).reshape(len(rows), total)
    assert pass_at_k(passed_PK, k).tolist() == pytest.approx(expected)


@dataclass
class Problems:
    """As many problems as there are rows of pass rates."""

    count: int

    def __len__(self) -> int:
        return self.count

    def prompt(self, index: int) -> Prompt:
        return Prompt(uid=f"eval-{index}", index=index, text="", token_ids=(1,), answer="")


class Sampler:
    """Deals problems to ranks in turn; problem p's sample k has p + k + 1 tokens."""

    def share(self, prompts, rank: int, ranks: int):
        return [(place, prompt) for place, prompt in enumerate(prompts) if place % ranks == rank]

    def generate(self, prompts, group_size: int, params, seed: int) -> list[Group]:
        assert seed == SEED
        return [
            Group(
                prompt,
                tuple(
                    Sample(f"{prompt.uid}/{k}", k, (0,) * (prompt.index + k + 1), (), "", "stop")
                    for k in range(group_size)
                ),
            )
            for prompt in prompts
        ]


@dataclass
class Rewards:
    """The pass rates of the table; the reward is ten times as much, and 5 where there is no pass rate."""

    rates_PK: list[list[float]]

    def score_groups(self, groups) -> list[tuple[Score, ...]]:
        return [
            tuple(
                self._score(self.rates_PK[group.prompt.index][sample.rollout_index])
                for sample in group.samples
            )
            for group in groups
        ]

    def _score(self, rate: float) -> Score:
        return Score(total=5.0 if math.isnan(rate) else 10.0 * rate, components={}, pass_rate=rate)


def _evaluate_on_rank(rates_PK: list[list[float]], options: dict) -> dict[str, float]:
    import torch.distributed as dist

    from grpo_mega.engine.parallel import initialize_process_group

    initialize_process_group()
    layout = SimpleNamespace(rank=dist.get_rank(), world_size=dist.get_world_size())
    problems, rewards, block = Problems(len(rates_PK)), Rewards(rates_PK), EvalBlock(**options)
    return evaluate(Sampler(), problems, rewards, None, block, layout, SEED)  # type: ignore[arg-type]


@pytest.fixture
def evaluated(ranks):
    """The metrics of these pass rates, the same on both ranks."""

    def run(rates_PK: list[list[float]], **options) -> dict[str, float]:
        first, second = ranks(2).run(_evaluate_on_rank, rates_PK, options)
        assert first == second
        return first

    return run


def test_one_sample_of_each_problem(evaluated):
    # mean (1 + .5 + 0 + .25) / 4 = .4375; mean square (1 + .25 + .0625) / 4 = .328125;
    # std sqrt(.328125 - .4375^2) = sqrt(.13671875) = .3697550; lengths 1 2 3 4; rewards 10 times the rates
    assert evaluated([[1.0], [0.5], [0.0], [0.25]]) == pytest.approx(
        {
            "eval_avg_test_pass_rate": 0.4375,
            "eval_std_pass_rate": 0.3697550,
            "eval_min_pass_rate": 0.0,
            "eval_max_pass_rate": 1.0,
            "eval_samples_evaluated": 4,
            "eval_response_length": 2.5,
            "eval_reward_mean": 4.375,
            "pass@1": 0.25,  # half of the tests is not a pass
        }
    )


def test_several_samples_of_a_problem_are_averaged_first(evaluated):
    # problems .25 and 1: mean .625, std .375. pass@2: 1 - 3/6 = .5 and 1. Lengths 1..4 and 2..5
    metrics = evaluated([[0.0, 1.0, 0.0, 0.0], [1.0] * 4], pass_at=(1, 2, 4))
    assert metrics == pytest.approx(
        {
            "eval_avg_test_pass_rate": 0.625,
            "eval_std_pass_rate": 0.375,
            "eval_min_pass_rate": 0.25,  # of a problem, not of a sample
            "eval_max_pass_rate": 1.0,
            "eval_samples_evaluated": 2,
            "eval_response_length": 3.0,
            "eval_reward_mean": 6.25,
            "pass@1": 0.625,
            "pass@2": 0.75,
            "pass@4": 1.0,
        }
    )


def test_a_reward_that_knows_no_success_gives_no_pass_rate(evaluated):
    assert evaluated([[math.nan]] * 3) == {"eval_response_length": 2.0, "eval_reward_mean": 5.0}


def test_a_problem_without_a_pass_rate_does_not_count(evaluated):
    # problems 0 and 2 remain, and problem 1 is all that the second rank had
    metrics = evaluated([[1.0], [math.nan], [0.0]])
    assert {name: metrics[name] for name in OF_SUCCESS} == {
        "eval_avg_test_pass_rate": 0.5,
        "eval_std_pass_rate": 0.5,
        "eval_min_pass_rate": 0.0,
        "eval_max_pass_rate": 1.0,
        "eval_samples_evaluated": 2,
        "pass@1": 0.5,
    }
    assert metrics["eval_response_length"] == 2.0  # it was sampled all the same


@pytest.mark.parametrize(("samples", "expected"), [(1, 1), (3, 3), (0, 4), (100, 4)])
def test_the_first_problems_up_to_the_asked_number(samples, expected, evaluated):
    # with 1 the second rank has no problem at all
    metrics = evaluated([[1.0], [0.0], [0.0], [0.0]], samples=samples)
    assert metrics["eval_samples_evaluated"] == expected
    assert metrics["eval_avg_test_pass_rate"] == pytest.approx(1 / expected)


def test_equal_rates_have_no_spread(evaluated):
    # the mean square of .1 may come out a hair below the square of the mean
    assert evaluated([[0.1]] * 3)["eval_std_pass_rate"] == pytest.approx(0.0, abs=1e-8)

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

from grpo_mega.evaluation import Evaluation, SampleRow, evaluate, pass_at_k
from grpo_mega.recipe.reward_blocks import RewardItem, RuleReward
from grpo_mega.recipe.run_blocks import EvalBlock
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.reward.base import RewardResult
from grpo_mega.types import Group, Prompt, Sample, Score

SEED = 7
OF_SUCCESS = (
    "eval_avg_test_pass_rate",
    "eval_std_pass_rate",
    "eval_min_pass_rate",
    "eval_max_pass_rate",
    "eval_samples_evaluated",
    "eval_coverage",
    "eval_total_passed_tests",
    "eval_total_tests",
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
    """The pass rates of the table; the reward is ten times as much, and 5 where there is no pass rate.

    With `tests`, every sample ran that many, and says so.
    """

    rates_PK: list[list[float]]
    tests: int | None = None

    def score_groups(self, groups) -> list[tuple[Score, ...]]:
        return [
            tuple(
                self._score(self.rates_PK[group.prompt.index][sample.rollout_index])
                for sample in group.samples
            )
            for group in groups
        ]

    def _score(self, rate: float) -> Score:
        total = 5.0 if math.isnan(rate) else 10.0 * rate
        passed = None if self.tests is None or math.isnan(rate) else round(rate * self.tests)
        tests = None if passed is None else self.tests
        return Score(total, components={}, pass_rate=rate, passed_tests=passed, total_tests=tests)


def _evaluate_on_rank(rates_PK: list[list[float]], options: dict, tests: int | None) -> Evaluation:
    import torch.distributed as dist

    from grpo_mega.engine.parallel import initialize_process_group

    initialize_process_group()
    layout = SimpleNamespace(rank=dist.get_rank(), world_size=dist.get_world_size())
    problems, rewards, block = Problems(len(rates_PK)), Rewards(rates_PK, tests), EvalBlock(**options)
    return evaluate(Sampler(), problems, rewards, None, block, layout, SEED)  # type: ignore[arg-type]


@pytest.fixture
def evaluation(ranks):
    """What is found of these pass rates, the same on both ranks."""

    def run(rates_PK: list[list[float]], tests: int | None = None, **options) -> Evaluation:
        first, second = ranks(2).run(_evaluate_on_rank, rates_PK, options, tests)
        assert first == second
        return first

    return run


@pytest.fixture
def evaluated(evaluation):
    """The metrics alone."""

    def run(*args, **options) -> dict[str, float]:
        return evaluation(*args, **options).metrics

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
            "eval_coverage": 0.25,  # one problem of four
            "eval_total_passed_tests": 1.75,  # each response is one test, passed in part
            "eval_total_tests": 4,
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
            "eval_coverage": 1.0,  # one of the four samples is enough
            "eval_total_passed_tests": 5.0,
            "eval_total_tests": 8,
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
        "eval_coverage": 0.5,
        "eval_total_passed_tests": 1,
        "eval_total_tests": 2,
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


def test_tests_are_counted_where_a_reward_counts_them(evaluated):
    # 4 tests a response: problem 0 passes 2 + 4 of 8, problem 1 none of 8, problem 2 has no verdict at all
    metrics = evaluated([[0.5, 1.0], [0.0, 0.0], [math.nan, math.nan]], tests=4, pass_at=(1, 2))
    assert (metrics["eval_total_passed_tests"], metrics["eval_total_tests"]) == (6, 16)
    assert metrics["eval_avg_test_pass_rate"] == pytest.approx(6 / 16)
    assert metrics["eval_coverage"] == 0.5


def test_the_table_shows_one_sample_of_each_of_the_first_problems(evaluation):
    # the second rank has problem 1, and the rows come in the problems' order all the same
    found = evaluation([[0.25, 1.0], [math.nan] * 2, [1.0] * 2, [1.0] * 2], table_rows=3, pass_at=(2,))
    assert found.samples == (
        SampleRow("eval-0/0", prompt="", answer="", response="", reward=2.5, pass_rate=0.25),
        SampleRow("eval-1/0", prompt="", answer="", response="", reward=5.0, pass_rate=None),
        SampleRow("eval-2/0", prompt="", answer="", response="", reward=10.0, pass_rate=1.0),
    )


@pytest.mark.parametrize(("table_rows", "shown"), [(0, 0), (8, 2)])
def test_no_more_rows_than_asked_or_than_there_are(table_rows, shown, evaluation):
    found = evaluation([[1.0], [0.0], [0.0], [0.0]], table_rows=table_rows, samples=2)
    assert len(found.samples) == shown
    assert found.metrics["eval_samples_evaluated"] == 2


@dataclass
class Judge:
    """A reward with a verdict of its own for every response."""

    name: str
    result: RewardResult

    def score(self, prompt: Prompt, sample: Sample) -> RewardResult:
        return self.result


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ((RewardResult(1.0), RewardResult(7.5, 0.5, 2, 4), RewardResult(1.0, 1.0, 9, 9)), (0.5, 2, 4)),
        ((RewardResult(1.0, 1.0), RewardResult(7.5, 0.5, 2, 4)), (1.0, None, None)),
    ],
)
def test_the_first_reward_with_a_pass_rate_counts_the_tests(results, expected, monkeypatch):
    rewards = RewardAssembly([RewardItem(rule=RuleReward())])
    judges = [(Judge(str(number), result), 1.0) for number, result in enumerate(results)]
    monkeypatch.setattr(rewards, "_components", judges)
    prompt = Problems(1).prompt(0)
    ((score,),) = rewards.score_groups([Group(prompt, (Sample("eval-0/0", 0, (1,), (), "", "stop"),))])
    assert (score.pass_rate, score.passed_tests, score.total_tests) == expected

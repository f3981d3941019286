"""Evaluation on held-out problems: sampled like a user would sample, on all ranks, the same numbers whatever
the layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from grpo_mega.data.stream import PromptStream
from grpo_mega.engine.device import device
from grpo_mega.engine.parallel import Layout
from grpo_mega.monitor.metrics import Metric, max_of, mean_of, min_of, reduce
from grpo_mega.recipe.run_blocks import EvalBlock
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.types import Group, Score


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One sample as a table shows it.

    Example: SampleRow(uid="eval-3/0", prompt="31524=", answer="12345", response="12345", reward=1.0,
                       pass_rate=1.0)
    """

    uid: str
    prompt: str
    answer: str
    response: str
    reward: float
    pass_rate: float | None  # None: no reward speaks of success


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found, the same on every rank."""

    metrics: dict[str, float]
    samples: tuple[SampleRow, ...]  # one of each of the first problems, in their order


def evaluate(
    engine: Sampler,
    problems: PromptStream,
    rewards: RewardAssembly,
    params: SamplingParams,
    block: EvalBlock,
    layout: Layout,
    seed: int,
) -> Evaluation:
    """`eval_avg_test_pass_rate` is the mean over all problems of the share of tests passed; a failed parse
    counts 0.

    Each problem's samples use the same random numbers at every evaluation, so that two evaluations differ by
    the policy.
    """
    count = min(block.samples or len(problems), len(problems))
    share = engine.share([problems.prompt(index) for index in range(count)], layout.rank, layout.world_size)
    groups = engine.generate([prompt for _, prompt in share], max(block.pass_at), params, seed)
    scores = rewards.score_groups(groups)
    metrics = reduce(_metrics(groups, scores, block), dist.group.WORLD)
    if "eval_avg_test_pass_rate" in metrics:
        mean_square = metrics.pop("eval_pass_rate_square")
        spread = max(0.0, mean_square - metrics["eval_avg_test_pass_rate"] ** 2)
        metrics["eval_std_pass_rate"] = math.sqrt(spread)
    rows = {
        place: _row(group, group_scores[0])
        for (place, _), group, group_scores in zip(share, groups, scores, strict=True)
        if place < block.table_rows
    }
    return Evaluation(metrics, _gathered(rows) if block.table_rows else ())


def _row(group: Group, score: Score) -> SampleRow:
    prompt, sample = group.prompt, group.samples[0]
    rate = None if math.isnan(score.pass_rate) else score.pass_rate
    return SampleRow(sample.uid, prompt.text, prompt.answer, sample.text, score.total, rate)


def _gathered(rows: dict[int, SampleRow]) -> tuple[SampleRow, ...]:
    """The rows of all ranks in the order of their problems."""
    parts: list[dict[int, SampleRow]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    everywhere = {place: row for part in parts for place, row in part.items()}
    return tuple(everywhere[place] for place in sorted(everywhere))


def _metrics(
    groups: Sequence[Group], scores: Sequence[tuple[Score, ...]], block: EvalBlock
) -> dict[str, Metric]:
    """Every rank brings the same names, also one that had no problem."""
    rates_PK, passed_tests_PK, tests_PK = (
        torch.tensor([[column(s) for s in group] for group in scores], dtype=torch.float64)
        .reshape(len(groups), max(block.pass_at))
        .to(device())
        for column in (_pass_rate, _passed_tests, _tests)
    )
    rate_P = rates_PK.mean(1)
    known_P = ~rate_P.isnan()  # a reward that knows no success gives no pass rate
    lengths = torch.tensor(
        [len(sample.response_ids) for group in groups for sample in group.samples],
        dtype=torch.float64,
        device=device(),
    )
    totals = torch.tensor([s.total for group in scores for s in group], dtype=torch.float64, device=device())
    everything = torch.ones_like(lengths, dtype=torch.bool)
    metrics = {
        "eval_avg_test_pass_rate": mean_of(rate_P, known_P),
        "eval_pass_rate_square": mean_of(rate_P.square(), known_P),
        "eval_min_pass_rate": min_of(rate_P, known_P),
        "eval_max_pass_rate": max_of(rate_P, known_P),
        "eval_samples_evaluated": Metric(known_P.sum(), known_P.sum(), "sum"),
        "eval_coverage": mean_of((rates_PK >= 1.0).any(1).double(), known_P),
        "eval_total_passed_tests": _sum_of(passed_tests_PK.sum(1), known_P),
        "eval_total_tests": _sum_of(tests_PK.sum(1), known_P),
        "eval_response_length": mean_of(lengths, everything),
        "eval_reward_mean": mean_of(totals, everything),
    }
    for k in block.pass_at:
        metrics[f"pass@{k}"] = mean_of(pass_at_k(rates_PK >= 1.0, k), known_P)
    return metrics


def _sum_of(values_P: torch.Tensor, known_P: torch.Tensor) -> Metric:
    return Metric(values_P.where(known_P, 0.0).sum(), known_P.sum(), "sum")


def _pass_rate(score: Score) -> float:
    return score.pass_rate


def _passed_tests(score: Score) -> float:
    """A reward that counts no tests is one test, passed in part."""
    return score.pass_rate if score.passed_tests is None else score.passed_tests


def _tests(score: Score) -> float:
    return 1.0 if score.total_tests is None else score.total_tests


def pass_at_k(passed_PK: torch.Tensor, k: int) -> torch.Tensor:
    """Probability that at least one of k samples drawn without replacement from the K of each problem passes.

    1 - C(K - c, k) / C(K, k) with c passed. Example: K = 4, c = 1, k = 2 -> 1 - 3/6 = .5
    """
    total = passed_PK.shape[1]
    ways = math.comb(total, k)
    failing = [math.comb(total - int(c), k) for c in passed_PK.sum(1)]
    return torch.tensor([1.0 - f / ways for f in failing], dtype=torch.float64, device=passed_PK.device)

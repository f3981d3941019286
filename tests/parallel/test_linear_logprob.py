"""The vocabulary split over tensor-parallel ranks: every number as on one rank.

# T tokens, H hidden, V vocabulary columns with their padding
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from grpo_mega.kernels.implementation import Implementation
from grpo_mega.kernels.logprob import linear_logprob
from tests.matrices import by_hand
from tests.unit.test_logprob import Problem, Results, assert_close


def _compute(
    problem: Problem, sequence_parallel: bool, implementation: Implementation, split: bool
) -> Results:
    """On every rank; `split`: this rank's columns (and rows under sequence parallelism), else all of them."""
    from grpo_mega.engine.parallel import initialize_process_group

    initialize_process_group()
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if split else (1, 0)
    weight_VH = problem.weight_VH.chunk(ranks)[rank].clone().requires_grad_()
    rows = problem.hidden_TH.chunk(ranks)[rank] if sequence_parallel and split else problem.hidden_TH
    hidden_TH = rows.clone().requires_grad_()
    values = linear_logprob(
        hidden_TH,
        weight_VH,
        problem.target_T,
        problem.temperature,
        dist.group.WORLD if split else None,
        real_vocab=problem.vocab,
        needed_T=problem.needed_T,
        sequence_parallel=sequence_parallel and split,
        implementation=implementation,
        tile=7,
    )
    torch.autograd.backward(values[:2], list(problem.above_2T))
    assert hidden_TH.grad is not None and weight_VH.grad is not None
    return (*(value.detach() for value in values), hidden_TH.grad, weight_VH.grad)


CASES = {
    "no multiple of tile or ranks": Problem.draw(8, 61, 3),
    "padding over whole ranks": Problem.draw(8, 10, 54),
    "one real column": Problem.draw(8, 1, 63),
    "all negative": replace(Problem.draw(8, 64), weight_VH=-Problem.draw(8, 64).weight_VH.abs() - 3.0),
    "rows left out": replace(Problem.draw(8, 61, 3), needed_T=torch.arange(8) % 2 == 0),
    "nothing needed": replace(Problem.draw(8, 61, 3), needed_T=torch.zeros(8, dtype=torch.bool)),
}
CASES["all negative"].hidden_TH.abs_()


@pytest.mark.parametrize("size", [2, by_hand(4)])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp and sequence parallel"])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_rank(case: str, sequence_parallel: bool, size: int, ranks) -> None:
    problem = CASES[case]
    whole = _alone(ranks, problem, "eager")
    _compare(ranks(size).run(_compute, problem, sequence_parallel, "eager", True), whole, sequence_parallel)


@pytest.mark.parametrize("implementation", [by_hand("compiled"), "triton"])
def test_other_implementations_merge_alike(implementation: Implementation, ranks) -> None:
    problem = CASES["no multiple of tile or ranks"]
    parts = ranks(2).run(_compute, problem, True, implementation, True)
    _compare(parts, _alone(ranks, problem, "eager"), True)


def _alone(ranks, problem: Problem, implementation: Implementation) -> Results:
    return ranks(1).run(_compute, problem, False, implementation, False)[0]


def _compare(parts: list[Results], whole: Results, sequence_parallel: bool) -> None:
    for part in parts:
        assert_close(part[:3], whole[:3])
        if not sequence_parallel:
            assert_close(part[3:4], whole[3:4])
    if sequence_parallel:
        assert_close((torch.cat([part[3] for part in parts]),), whole[3:4])
    assert_close((torch.cat([part[4] for part in parts]),), whole[4:])

"""A wrong loss is found out, by the law it breaks; a right one is certified, from a recipe or from a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from grpo_mega.algo import PolicyLoss
from grpo_mega.certify import Verdict, certify
from grpo_mega.cli import app
from grpo_mega.recipe.blocks import LossBlock
from grpo_mega.self_check import against_the_oracle

ROOT = Path(__file__).parents[2]


def _right(**given: Any) -> torch.Tensor:
    """REINFORCE over the denominators of the update."""
    advantages, lengths = given["advantages"], given["cu_seqlens"].diff()
    advantages = torch.cat([advantages, advantages.new_zeros(len(lengths) - len(advantages))])
    spread_T = advantages.repeat_interleave(lengths)
    valid_T = given["response_mask_T"].to(spread_T.dtype)
    ratio_T = (given["trainer_logprobs_T"] - given["sampler_logprobs_T"]).clamp(-5, 5).exp()
    return -(ratio_T * spread_T * valid_T).sum() / max(given["denominators"].tokens, 1.0)


def _by_micro_batch(**given: Any) -> torch.Tensor:
    """The usual mistake: a mean over what happens to be in the micro-batch."""
    own = max(float(given["response_mask_T"].sum()), 1.0)
    return _right(**given) * given["denominators"].tokens / own


def _without_mask(**given: Any) -> torch.Tensor:
    return _right(**{**given, "response_mask_T": torch.ones_like(given["response_mask_T"])})


def _wrong_gradient(**given: Any) -> torch.Tensor:
    """The value of one loss with the gradient of another, through no detach that could be seen."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return 2 * grads[0]

    doubled: Any = Doubled.apply(given["trainer_logprobs_T"])
    return _right(**{**given, "trainer_logprobs_T": doubled})


def _depends_on_its_neighbour(**given: Any) -> torch.Tensor:
    trainer_T = given["trainer_logprobs_T"]
    return _right(**{**given, "trainer_logprobs_T": trainer_T + 0.1 * torch.roll(trainer_T, 1)})


def _infinite(**given: Any) -> torch.Tensor:
    ratio_T = (given["trainer_logprobs_T"] - given["sampler_logprobs_T"]).mul(20).exp()
    return _right(**given) + 0.0 * (ratio_T.float() * given["response_mask_T"]).sum()


def test_a_right_loss_is_certified() -> None:
    assert all(verdict.holds for verdict in certify(_right))


@pytest.mark.parametrize(
    ("loss", "law"),
    [
        (_by_micro_batch, "micro-batches add up"),
        (_without_mask, "outside the mask"),
        (_wrong_gradient, "gradient is that of the value"),
        (_depends_on_its_neighbour, "order of packing"),
        (_infinite, "stay finite"),
    ],
)
def test_a_wrong_loss_breaks_the_law_it_should(loss: Any, law: str) -> None:
    broken = [verdict.law for verdict in certify(loss) if not verdict.holds]
    assert any(law in name for name in broken), broken


def test_a_gradient_cut_by_detach_is_allowed() -> None:
    """Weights that are constants to the gradient are what half of the innovations are."""
    config = {"innovations": {"gradient_adaptive": {}, "ptrw": {}, "gspo": {"level": "token"}}}
    assert all(verdict.holds for verdict in certify(PolicyLoss(config)))


def test_the_oracle_notices_a_loss_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_mega.algo.innovations.amic import Amic

    monkeypatch.setattr(Amic, "at_level", lambda self, ratio_RW, view: ratio_RW)
    config = LossBlock.model_validate({"innovations": {"amic": {}}})
    # the innovation left out looks like the loss without it, and its metrics are not there
    with pytest.raises(KeyError, match="amic"):
        against_the_oracle(config, "eager", torch.float32, torch.device("cpu"))
    monkeypatch.setattr(Amic, "metrics", lambda self, moments: {})
    assert not against_the_oracle(config, "eager", torch.float32, torch.device("cpu")).holds


def test_a_number_that_is_none_holds_no_law() -> None:
    assert Verdict("the gradient is that of the value", 0.0, 1e-5).holds
    assert not Verdict("the gradient is that of the value", math.nan, 1e-5).holds


@pytest.mark.slow
def test_compiled_agrees_with_the_oracle() -> None:
    loss: dict[str, Any] = {
        "innovations": {"ema": {}, "gradient_adaptive": {}, "temporal_decay": {}, "asymmetric": {}},
        "kl": {"coef": 0.1},
        "entropy_coef": 0.01,
        "correction": {"kind": "tis", "level": "sequence"},
    }
    for dtype in (torch.float32, torch.bfloat16):
        verdict = against_the_oracle(LossBlock.model_validate(loss), "compiled", dtype, torch.device("cpu"))
        assert verdict.holds, verdict


def test_the_command_certifies_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["check-loss", "recipes/innovations/balanced.yaml", "loss.kl.coef=.1"])
    assert done.exit_code == 0, done.output
    assert "BROKEN" not in done.output and "float64 loops (float32)" in done.output


def test_the_command_takes_a_loss_from_a_file_and_fails_on_a_wrong_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def right(trainer_logprobs_T, advantages, response_mask_T, denominators, **rest):\n"
        "    return -(trainer_logprobs_T * response_mask_T).sum() / max(denominators.tokens, 1.0)\n\n"
        "def wrong(trainer_logprobs_T, response_mask_T, **rest):\n"
        "    return -(trainer_logprobs_T * response_mask_T).mean()\n"
    )
    assert CliRunner().invoke(app, ["check-loss", f"{file}:right"]).exit_code == 0
    wrong = CliRunner().invoke(app, ["check-loss", f"{file}:wrong"])
    assert wrong.exit_code == 1 and "BROKEN" in wrong.output


def test_a_callable_that_is_not_there_is_explained(tmp_path: Path) -> None:
    from grpo_mega.errors import UserError

    with pytest.raises(UserError, match="cannot be loaded"):
        CliRunner().invoke(app, ["check-loss", f"{tmp_path}/none.py:f"], catch_exceptions=False)

"""What holds for every file in grpo_mega/algo/innovations: a new one is tested by being there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from grpo_mega.algo import PolicyLoss
from grpo_mega.algo.innovations import available, innovation_class
from grpo_mega.certify import ask, certify, trial
from grpo_mega.monitor.metrics import reduce

NAMES = available()


def _loss(name: str, **options: object) -> PolicyLoss:
    return PolicyLoss({"innovations": {name: options}})


def test_the_folder_is_the_registry() -> None:
    expected = {"ema", "gradient_adaptive", "amic", "gspo", "ptrw", "temporal_decay", "sca", "asymmetric"}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_obeys_every_law_of_a_policy_loss(name: str) -> None:
    broken = [verdict for verdict in certify(_loss(name)) if not verdict.holds]
    assert not broken


@pytest.mark.parametrize("name", NAMES)
def test_left_out_it_leaves_the_baseline_bitwise(name: str) -> None:
    batch = trial(dtype=torch.float32)
    without = ask(PolicyLoss({"innovations": {name: False}}), batch, batch.denominators)
    plain = ask(PolicyLoss({}), batch, batch.denominators)
    assert torch.equal(without.loss, plain.loss)
    assert all(torch.equal(a, b) for a, b in zip(without.gradients, plain.gradients, strict=True))
    assert reduce(without.metrics) == reduce(plain.metrics)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_without_signal_moves_nothing(name: str) -> None:
    """Equal rewards give zero advantages: whatever the weights, there is nothing to follow."""
    batch = trial()
    idle = [torch.zeros_like(advantage) for advantage in batch.advantages]
    answer = ask(
        _loss(name), batch.__class__(**{**_fields(batch), "advantages": tuple(idle)}), batch.denominators
    )
    assert answer.loss == 0
    assert all(not gradient.any() for gradient in answer.gradients)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_does(name: str) -> None:
    """One line when a run begins, one after each step, numbers in between, and a docstring with an
    example."""
    loss = _loss(name)
    batch = trial(dtype=torch.float32)
    metrics = loss.derived(reduce(ask(loss, batch, batch.denominators).metrics))
    own = {key: value for key, value in metrics.items() if key.startswith(f"{name}/")}
    assert own
    (started,), (stepped,) = loss.startup_lines(), loss.step_lines(metrics)
    tag = innovation_class(name).tag
    assert started.startswith(f"[{tag}] Actor ") and stepped.startswith(f"[{tag}] Added ")
    assert "Example:" in (innovation_class(name).__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
def test_its_options_are_read_without_torch(name: str) -> None:
    code = f"""
import sys
from grpo_mega.recipe.blocks import LossBlock
LossBlock.model_validate({{"innovations": {{"{name}": None}}}})
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _fields(batch: object) -> dict[str, object]:
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}  # type: ignore[attr-defined]

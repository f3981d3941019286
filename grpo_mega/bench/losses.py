"""The policy loss with each innovation, against the plain way of writing it.

Every variant is timed in one process, in rounds that take one step of each, so that a busy machine is busy
for all.

# S sequences, L tokens of each, T = S L packed tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo_mega.algo import PolicyLoss
from grpo_mega.algo.aggregate import Denominators
from grpo_mega.kernels.implementation import Implementation

Step = Callable[[], None]

INNOVATIONS: dict[str, dict[str, object]] = {
    "none": {},
    "ema": {"ema": {}},
    "gradient_adaptive": {"gradient_adaptive": {}},
    "amic": {"amic": {}},
    "gspo": {"gspo": {}},
    "ptrw": {"ptrw": {}},
    "temporal_decay": {"temporal_decay": {}},
    "asymmetric": {"asymmetric": {}},
    "all compatible": {"ema": {}, "gradient_adaptive": {}, "temporal_decay": {}, "asymmetric": {}},
}
STEPS_IN_A_ROUND = 5


@dataclass(frozen=True, slots=True)
class Row:
    """Best time of a variant over all rounds, forward and backward, and what it is of the plain clipped
    loss's."""

    variant: str
    total_ms: float
    of_plain: float


def run(sequences: int = 64, length: int = 2048, repeats: int = 3) -> list[Row]:
    """Plain clipped PPO eagerly and with a loop over tokens, then ours."""
    problem = Problem.draw(sequences, length)
    steps: dict[str, Step] = {
        "plain clipped PPO, eager": problem.step(plain_ppo),
        "all compatible, EMA as a loop over tokens": problem.step(loop_over_tokens),
        "all compatible, token by token": problem.step(token_by_token),
    }
    implementations: tuple[Implementation, ...] = ("eager", "compiled")
    for implementation in implementations:
        for name, innovations in INNOVATIONS.items():
            steps[f"{name}, {implementation}"] = problem.packed_step(innovations, implementation)
    best = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()  # compiles
    for _ in range(repeats):
        for name, step in steps.items():
            slow = "token" in name
            for _ in range(1 if slow else STEPS_IN_A_ROUND):
                best[name] = min(best[name], _milliseconds(step))
    plain = best["plain clipped PPO, eager"]
    return [Row(name, value, value / plain) for name, value in best.items()]


def _milliseconds(step: Step) -> float:
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


@dataclass(frozen=True, slots=True)
class Problem:
    """The same tokens as S x L and packed. Every sequence is full: what is timed is the loss, not the
    padding."""

    trainer: torch.Tensor  # S x L
    sampler: torch.Tensor
    reference: torch.Tensor
    advantages: torch.Tensor  # S
    mask: torch.Tensor

    @classmethod
    def draw(cls, sequences: int, length: int) -> Problem:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        generator = torch.Generator().manual_seed(0)
        shape = (sequences, length)
        sampler = -torch.rand(shape, generator=generator) * 2
        trainer = sampler + torch.randn(shape, generator=generator) * 0.15
        reference = sampler + torch.randn(shape, generator=generator) * 0.1
        advantages = torch.randn(sequences, generator=generator)
        mask = torch.ones(shape, dtype=torch.bool)
        return cls(*(value.to(device) for value in (trainer, sampler, reference, advantages, mask)))

    def step(self, loss: Callable[[Problem, torch.Tensor], torch.Tensor]) -> Step:
        def step() -> None:
            leaf = self.trainer.detach().requires_grad_()
            loss(self, leaf).backward()

        return step

    def packed_step(self, innovations: dict[str, object], implementation: Implementation) -> Step:
        config = {"innovations": innovations, "kl": {"coef": 0.01}}
        loss = PolicyLoss(config, implementation=implementation)
        sequences, length = self.trainer.shape
        denominators = Denominators(float(sequences * length), float(sequences))
        cu_seqlens = torch.arange(
            0, sequences * length + 1, length, dtype=torch.int32, device=self.trainer.device
        )

        def step() -> None:
            leaf = self.trainer.detach().flatten().requires_grad_()
            output = loss(
                leaf,
                self.sampler.flatten(),
                self.advantages,
                cu_seqlens,
                reference_logprobs_T=self.reference.flatten(),
                response_mask_T=self.mask.flatten(),
                denominators=denominators,
            )
            output.loss.backward()

        return step


def plain_ppo(problem: Problem, trainer: torch.Tensor) -> torch.Tensor:
    """Clip, dual clip, k3 penalty and the six numbers that every trainer reports of them, as usually
    written. The denominator is known beforehand, for ours too: a trainer counts it once for an update."""
    mask, count = problem.mask.float(), problem.mask.numel()
    advantage = problem.advantages[:, None]
    difference = (trainer - problem.sampler).clamp(-10, 10)
    ratio = difference.exp()
    loss, lower = _clipped(ratio, advantage)
    away = (problem.reference - trainer).clamp(-10, 10)
    penalty = away.exp() - 1 - away
    with torch.no_grad():
        cut = (-advantage * ratio.clamp(0.8, 1.2) > -advantage * ratio).float()
        for value in (cut, lower.float(), ratio, difference, penalty, difference.abs()):
            (value * mask).sum() / count
    return ((loss + 0.01 * penalty) * mask).sum() / count


def _clipped(ratio: torch.Tensor, advantage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    bounded = torch.minimum(loss, -3.0 * advantage)
    return torch.where(advantage < 0, bounded, loss), (advantage < 0) & (bounded < loss)


def loop_over_tokens(problem: Problem, trainer: torch.Tensor) -> torch.Tensor:
    """All compatible innovations as they are first written down: the EMA as a loop over the tokens of a
    row."""
    advantage, length = problem.advantages[:, None], trainer.shape[1]
    ratio = (trainer - problem.sampler).clamp(-10, 10).exp()
    smoothed = [ratio[:, 0]]
    for token in range(1, length):
        smoothed.append(0.9 * ratio[:, token] + 0.1 * smoothed[-1])
    level = torch.stack(smoothed, 1)
    adaptive = (length * trainer.detach().abs().softmax(1)).clamp(max=10.0)
    decay = 0.95 ** torch.arange(length, device=trainer.device)
    weight = adaptive * decay * (length / decay.sum())
    size = torch.where(advantage > 0, 0.3, 0.1)
    loss = torch.maximum(-advantage * level, -advantage * level.clamp(1 - size, 1 + size))
    loss = torch.where(advantage < 0, torch.minimum(loss, -3.0 * advantage), loss)
    away = (problem.reference - trainer).clamp(-10, 10)
    return (weight * loss + 0.01 * (away.exp() - 1 - away)).mean()


def token_by_token(problem: Problem, trainer: torch.Tensor) -> torch.Tensor:
    """All compatible innovations with everything of a token in the body of the loop, as in a script that
    follows the formulas: each step works on one token of every sequence."""
    advantage, length = problem.advantages, trainer.shape[1]
    size = torch.where(advantage > 0, 0.3, 0.1)
    scale = trainer.detach().abs().exp().sum(1)
    decay_sum = sum(0.95**token for token in range(length))
    level, losses = torch.ones_like(advantage), []
    for token in range(length):
        now, sampled, reference = trainer[:, token], problem.sampler[:, token], problem.reference[:, token]
        ratio = (now - sampled).clamp(-10, 10).exp()
        level = ratio if token == 0 else 0.9 * ratio + 0.1 * level
        adaptive = (length * now.detach().abs().exp() / scale).clamp(max=10.0)
        weight = adaptive * (0.95**token * length / decay_sum)
        loss = torch.maximum(-advantage * level, -advantage * level.clamp(1 - size, 1 + size))
        loss = torch.where(advantage < 0, torch.minimum(loss, -3.0 * advantage), loss)
        away = (reference - now).clamp(-10, 10)
        losses.append(weight * loss + 0.01 * (away.exp() - 1 - away))
    return torch.stack(losses, 1).mean()

"""A packed batch in float64 for the tests of the policy loss.

# T packed tokens, B sequences
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from grpo_mega.algo.aggregate import Denominators
from grpo_mega.algo.objective import PolicyLoss, PolicyLossOutput


@dataclass(frozen=True)
class Case:
    """A packed batch in float64."""

    trainer_T: torch.Tensor
    sampler_T: torch.Tensor
    reference_T: torch.Tensor
    entropy_T: torch.Tensor
    mask_T: torch.Tensor
    advantages_B: torch.Tensor
    cu_seqlens: tuple[int, ...]

    @classmethod
    def random(cls, shapes: list[tuple[int, int]], padding: int, seed: int, *, holes: bool = False) -> Case:
        """`shapes`: prompt and response length of each sequence; `holes`: some response tokens are not
        trained."""
        generator = torch.Generator().manual_seed(seed)
        mask, boundaries = [], [0]
        for prompt, response in shapes:
            mask += [False] * prompt + [True] * response
            boundaries.append(len(mask))
        if padding:
            mask += [False] * padding
            boundaries.append(len(mask))

        def normal(count: int = len(mask)) -> torch.Tensor:
            return torch.randn(count, generator=generator, dtype=torch.float64)

        mask_T = torch.tensor(mask, dtype=torch.bool)
        if holes:
            mask_T &= torch.rand(len(mask), generator=generator) < 0.7
        sampler_T = -3.0 + normal()
        return cls(
            trainer_T=sampler_T + normal() * 0.6,  # ratios from .3 to 3: every clip is met
            sampler_T=sampler_T,
            reference_T=sampler_T + normal() * 0.6,
            entropy_T=normal().abs(),
            mask_T=mask_T,
            advantages_B=normal(len(shapes)),
            cu_seqlens=tuple(boundaries),
        )

    @property
    def sequences(self) -> list[list[int]]:
        """The response tokens of each sequence (padding aside)."""
        count = len(self.advantages_B)
        spans = zip(self.cu_seqlens[:count], self.cu_seqlens[1:], strict=False)
        return [[t for t in range(start, stop) if self.mask_T[t]] for start, stop in spans]

    @property
    def counts(self) -> Denominators:
        return Denominators(
            tokens=float(sum(map(len, self.sequences))),
            sequences=float(sum(map(bool, self.sequences))),
        )

    def part(self, first: int, last: int) -> Case:
        """Sequences first to last - 1, without padding."""
        start, stop = self.cu_seqlens[first], self.cu_seqlens[last]
        tensors = ("trainer_T", "sampler_T", "reference_T", "entropy_T", "mask_T")
        return Case(
            **{name: getattr(self, name)[start:stop] for name in tensors},
            advantages_B=self.advantages_B[first:last],
            cu_seqlens=tuple(cu - start for cu in self.cu_seqlens[first : last + 1]),
        )

    def compute(self, config: dict, denominators: Denominators | None = None) -> PolicyLossOutput:
        return PolicyLoss(config)(
            self.trainer_T,
            self.sampler_T,
            self.advantages_B,
            torch.tensor(self.cu_seqlens, dtype=torch.int32),
            reference_logprobs_T=self.reference_T,
            entropy_T=self.entropy_T,
            response_mask_T=self.mask_T,
            denominators=denominators,
        )

    def leaves(self) -> Case:
        return replace(
            self,
            trainer_T=self.trainer_T.clone().requires_grad_(),
            entropy_T=self.entropy_T.clone().requires_grad_(),
        )


def clip(low: float = 0.2, high: float = 0.2, dual: float | None = 3.0) -> dict:
    return {"clip": {"low": low, "high": high, "dual": dual}}


def gradients(loss: torch.Tensor, case: Case) -> tuple[torch.Tensor, ...]:
    leaves = (case.trainer_T, case.entropy_T)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))

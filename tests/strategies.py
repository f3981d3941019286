"""Packed batches and legal loss configurations: fixed ones, all of them, and drawn by hypothesis.

# T packed tokens, B sequences
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, combinations, product
from typing import Any

import torch
from hypothesis import strategies as st

from grpo_mega.algo import PolicyLoss
from grpo_mega.algo.reference import ReferenceOutput, reference_policy_loss
from grpo_mega.recipe.blocks import LossBlock

NORM_LENGTH = 64
Config = dict[str, Any]

# Fragments of a loss block by name; a legal configuration takes one of each axis.
SMOOTHINGS: Mapping[str, Config] = {"": {}, "ema": {"innovations": {"ema": {"beta": 0.7}}}}
LEVELS: Mapping[str, Config] = {
    "": {},
    "amic": {"innovations": {"amic": {}}},
    "gspo": {"innovations": {"gspo": {}}},
    "gspo_token": {"innovations": {"gspo": {"level": "token"}}},
}
ADAPTIVES: Mapping[str, Config] = {
    "": {},
    "adaptive_logp": {"innovations": {"gradient_adaptive": {"max_weight": 3.0}}},
    "adaptive_logit": {"innovations": {"gradient_adaptive": {"norm": "logit", "temperature": 0.5}}},
    "adaptive_legacy": {"innovations": {"gradient_adaptive": {"legacy": True, "temperature": 2.0}}},
}
CREDITS: Mapping[str, Config] = {
    "": {},
    "decay_mean": {"innovations": {"temporal_decay": {}}},
    "decay_sum": {"innovations": {"temporal_decay": {"gamma": 0.9, "normalize": "sum"}}},
    "decay_none": {"innovations": {"temporal_decay": {"normalize": "none"}}},
    "lspd": {"innovations": {"temporal_decay": {"mode": "lspd"}}},
    "decay_legacy": {"innovations": {"temporal_decay": {"legacy": True}}},
    "sca": {"innovations": {"sca": {}}},
}
SURROGATES: Mapping[str, Config] = {
    "clip": {},
    "clip_higher": {"objective": {"clip": {"high": 0.28, "dual": None}}},
    "cispo": {"objective": {"cispo": {}}},
    "gmpo": {"objective": {"gmpo": {}}},
    "ptrw": {"innovations": {"ptrw": {}}},
    "ptrw_undetached": {"innovations": {"ptrw": {"detach": False, "keep_corrective": False}}},
    "ptrw_legacy": {"innovations": {"ptrw": {"legacy": True}}},
    "asymmetric": {"innovations": {"asymmetric": {}}},
    "asymmetric_legacy": {"innovations": {"asymmetric": {"legacy": True}}},
}
PENALTIES: Mapping[str, Config] = {
    "": {},
    "k1": {"kl": {"coef": 0.1, "estimator": "k1"}},
    "k2+entropy": {"kl": {"coef": 0.1, "estimator": "k2"}, "entropy_coef": 0.05},
    "k3": {"kl": {"coef": 0.1, "estimator": "k3"}},
    "abs+entropy": {"kl": {"coef": 0.1, "estimator": "abs"}, "entropy_coef": 0.05},
}
AGGREGATES: Mapping[str, Config] = {
    name: {"aggregate": name}
    for name in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
}
CORRECTIONS: Mapping[str, Config] = {
    "": {},
    "tis": {"correction": {"kind": "tis", "cap": 1.1}},
    "tis_sequence": {"correction": {"kind": "tis", "level": "sequence"}},
    "mis": {"correction": {"kind": "mis", "cap": 1.1}},
    "mis_sequence": {"correction": {"kind": "mis", "level": "sequence", "floor": 0.3}},
}
POLICY_AXES = (SMOOTHINGS, LEVELS, ADAPTIVES, CREDITS, SURROGATES)
ALL_AXES = (*POLICY_AXES, PENALTIES, AGGREGATES, CORRECTIONS)
Names = tuple[str, ...]  # one of each axis


def is_legal(names: Names) -> bool:
    """gmpo makes one ratio of a sequence itself; every other exclusion lies inside one axis."""
    return not ("gmpo" in names and names[1])


def config_of(names: Names) -> Config:
    """The loss block of one name from each of ALL_AXES."""
    merged: Config = {"innovations": {}}
    for axis, name in zip(ALL_AXES, names, strict=True):
        fragment = dict(axis[name])
        merged["innovations"] |= fragment.pop("innovations", {})
        merged |= fragment
    return merged


def every_policy() -> list[Names]:
    """Every legal choice of innovations and objective; penalty, aggregation and correction take turns."""
    rest = list(product(PENALTIES, AGGREGATES, CORRECTIONS))
    random.Random(0).shuffle(rest)
    legal = [names for names in product(*POLICY_AXES) if is_legal(names)]
    return [names + rest[index % len(rest)] for index, names in enumerate(legal)]


def every_pair(seed: int = 0) -> list[Names]:
    """Few configurations in which any two legal choices of two axes come together."""
    draw = random.Random(seed)
    axes = [list(axis) for axis in ALL_AXES]
    wanted = set(
        chain.from_iterable(_pairs_between(axes, i, j) for i, j in combinations(range(len(axes)), 2))
    )
    chosen: list[Names] = []
    while wanted:
        (i, a), (j, b) = min(wanted)
        candidates = [tuple(draw.choice(axis) for axis in axes) for _ in range(60)]
        candidates = [_with(_with(names, i, a), j, b) for names in candidates]
        best = max(filter(is_legal, candidates), key=lambda names: len(wanted & set(_pairs_of(names))))
        chosen.append(best)
        wanted -= set(_pairs_of(best))
    return chosen


def with_every_choice(among: Sequence[Names]) -> list[Names]:
    """As few of these as together hold every choice that any of them holds."""
    wanted = {choice for names in among for choice in enumerate(names)}
    chosen: list[Names] = []
    while wanted:
        best = max(among, key=lambda names: len(wanted & set(enumerate(names))))
        chosen.append(best)
        wanted -= set(enumerate(best))
    return chosen


def _with(names: Names, place: int, name: str) -> Names:
    return (*names[:place], name, *names[place + 1 :])


def _pairs_of(names: Names) -> Iterator[tuple[tuple[int, str], tuple[int, str]]]:
    return combinations(enumerate(names), 2)


def _pairs_between(
    axes: Sequence[Sequence[str]], i: int, j: int
) -> Iterator[tuple[tuple[int, str], tuple[int, str]]]:
    for a, b in product(axes[i], axes[j]):
        if is_legal(_with(_with(("",) * len(axes), i, a), j, b)):
            yield (i, a), (j, b)


@dataclass(frozen=True)
class Answer:
    """What a policy loss gives: the fields an oracle has too."""

    loss: torch.Tensor
    per_token_T: torch.Tensor
    grad_trainer_T: torch.Tensor
    grad_entropy_T: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """All a policy loss can be given."""

    trainer_T: torch.Tensor
    sampler_T: torch.Tensor
    reference_T: torch.Tensor
    proximal_T: torch.Tensor
    entropy_T: torch.Tensor
    sq_prob_T: torch.Tensor
    mask_T: torch.Tensor
    segments_T: torch.Tensor
    advantages: torch.Tensor  # B or T
    cu_seqlens: torch.Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: v.to(dtype) for name, v in values.items() if v.is_floating_point()})

    def options(self) -> dict[str, torch.Tensor]:
        """The arguments that implementation and oracle have in common, but for the entropy."""
        return {
            "reference_logprobs_T": self.reference_T,
            "sq_prob_T": self.sq_prob_T,
            "response_mask_T": self.mask_T,
            "proximal_logprobs_T": self.proximal_T,
            "segments_T": self.segments_T,
        }

    def ask(self, config: LossBlock | Config) -> Answer:
        trainer_T = self.trainer_T.detach().clone().requires_grad_()
        entropy_T = self.entropy_T.detach().clone().requires_grad_()
        policy_loss = PolicyLoss(config, default_norm_length=NORM_LENGTH)
        positional = (trainer_T, self.sampler_T, self.advantages, self.cu_seqlens)
        output = policy_loss(*positional, entropy_T=entropy_T, **self.options())
        output.loss.backward()
        gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in (trainer_T, entropy_T)]
        return Answer(output.loss.detach(), output.per_token, *gradients)

    def expect(self, config: LossBlock | Config) -> ReferenceOutput:
        block = config if isinstance(config, LossBlock) else LossBlock.model_validate(config)
        positional = (self.trainer_T, self.sampler_T, self.advantages, self.cu_seqlens)
        return reference_policy_loss(
            block, *positional, entropy_T=self.entropy_T, norm_length=NORM_LENGTH, **self.options()
        )


def random_batch(
    lengths: Sequence[int],
    *,
    seed: int = 0,
    noise: float = 0.5,
    outliers: float = 0.1,
    prompts: bool = True,
    outside: int = 2,
    advantages: str = "sequences",
) -> Batch:
    """Sequences of these many valid tokens, in float64.

    `noise`: standard deviation of the log-ratio; `outliers`: share of tokens with twenty times as much;
    `prompts`: masked tokens before and among the valid ones; `outside`: tokens before the first and after the
    last sequence; `advantages`: sequences, tokens or zero.
    """
    generator = torch.Generator().manual_seed(seed)
    places = random.Random(seed)
    mask, segments, boundaries = [True] * outside, [0] * outside, [outside]
    for length in lengths:
        own = [True] * length
        if prompts:
            for _ in range(1 + length // 4):
                own.insert(places.randint(0, len(own)), False)
        parts = iter(_parts(length, places))
        segments += [next(parts) if valid else 0 for valid in own]
        mask += own
        boundaries.append(len(mask))
    tokens = len(mask) + outside

    def normal(count: int = tokens) -> torch.Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    wild_T = torch.rand(tokens, generator=generator) < outliers
    log_ratio_T = (noise * normal() * torch.where(wild_T, 20.0, 1.0)).clamp(-50.0, 50.0)
    trainer_T = log_ratio_T.clamp(max=0.0) - 0.1 - 2.0 * normal().abs()  # a probability is at most 1
    probability_T = trainer_T.exp()
    count = {"tokens": tokens, "sequences": len(lengths), "zero": len(lengths)}[advantages]
    return Batch(
        trainer_T=trainer_T,
        sampler_T=trainer_T - log_ratio_T,
        reference_T=trainer_T + normal(),
        proximal_T=trainer_T - log_ratio_T + 0.1 * normal(),
        entropy_T=normal().abs(),
        sq_prob_T=probability_T**2 + (1 - probability_T) ** 2 * torch.rand(tokens, generator=generator),
        mask_T=torch.tensor([*mask, *([True] * outside)], dtype=torch.bool),
        segments_T=torch.tensor([*segments, *([0] * outside)], dtype=torch.int8),
        advantages=normal(count) * (advantages != "zero"),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
    )


def _parts(length: int, places: random.Random) -> list[int]:
    """Markers, thought, markers, answer, markers, any of them empty (0 0 0 ...: unparsed)."""
    if length == 0 or places.random() < 0.25:
        return [0] * length
    cuts = sorted(places.randint(0, length) for _ in range(4))
    ends = [*cuts, length]
    return [
        next(part for part, end in zip((1, 2, 1, 3, 1), ends, strict=True) if t < end) for t in range(length)
    ]


@st.composite
def packed_batches(draw: st.DrawFn) -> Batch:
    """Lengths 0, 1 and more, holes or none, log-ratios from none to +-50, advantages of every shape."""
    lengths = draw(st.lists(st.one_of(st.integers(0, 2), st.integers(3, 12), st.just(150)), max_size=5))
    return random_batch(
        lengths,
        seed=draw(st.integers(0, 2**32 - 1)),
        noise=draw(st.sampled_from((0.0, 0.01, 0.5, 5.0, 20.0))),
        outliers=draw(st.sampled_from((0.0, 0.1))),
        prompts=draw(st.booleans()),
        outside=draw(st.integers(0, 2)),
        advantages=draw(st.sampled_from(("sequences", "tokens", "zero"))),
    )


def loss_configs() -> st.SearchStrategy[Config]:
    """Every legal combination of every axis."""
    return st.tuples(*(st.sampled_from(list(axis)) for axis in ALL_AXES)).filter(is_legal).map(config_of)

"""A small critic on every layout, and pairs to train it on, that the tests share.

# P pairs
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo_mega.recipe.blocks import ModelBlock, ParallelBlock, TrainBlock
from grpo_mega.recipe.critic_block import CriticBlock
from tests import tiny

EOS = 1
PAIRS = 7
HEAD_SEED = 3
# With Adam's epsilon 1 and rate 1 the first step moves each weight by g / (|g| + 1): the gradient shows.
TRAIN = TrainBlock(adam_eps=1.0, lr=1.0)
BLOCK = CriticBlock(
    kind="discriminator",
    lr=1.0,
    grad_clip=1e9,
    head_std=0.5,
    temperature=0.7,
    margin=0.1,
    label_smoothing=0.1,
    gap_penalty=0.3,
    gap_max=0.5,
    score_reg={"threshold": 0.8, "weight": 0.2},
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "cp2-tp2-sp": {"cp": 2, "tp": 2, "sequence_parallel": True},
    "dp2-pp2": {"dp": 2, "pp": 2},
}


@dataclass
class Seen:
    """What one rank saw."""

    teacher_P: torch.Tensor
    student_P: torch.Tensor
    metrics: dict[str, float]
    moved: dict[str, torch.Tensor] = field(default_factory=dict)  # by Hugging Face name, and the head's
    rewards: dict[int, float] = field(default_factory=dict)


def make_pairs(count: int = PAIRS):
    """Two pairs of each prompt, with one teacher; pair 2's student says what the teacher says, cut off before
    the end; pair 3's answer is a lone EOS."""
    from grpo_mega.critic.pairs import AnswerPair

    rng = np.random.default_rng(5)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(2, tiny.VOCAB, int(rng.integers(low, high))).tolist())

    pairs = []
    for place in range(count):
        if place % 2 == 0:
            prompt, teacher = ids(1, 6), (*ids(2, 9), EOS)
        student = (*ids(1, 9), *((EOS,) if place % 3 else ()))
        student = {2: teacher[:-1], 3: (EOS,)}.get(place, student)
        pairs.append(AnswerPair(f"made-{place}/0", prompt, teacher, student))
    return pairs


def build(directory: Path, options: dict[str, Any], block: CriticBlock, dtype: Any = "float32"):
    from transformers import AutoConfig

    from grpo_mega.critic.engine import CriticEngine
    from grpo_mega.engine.parallel import initialize_layout
    from grpo_mega.sync.stream import HfDirectory, heads_of, load_hf

    layout = initialize_layout(ParallelBlock(**options), seed=0)
    hf = AutoConfig.from_pretrained(directory)
    model = ModelBlock(hf=str(directory), dtype=dtype, vocab_multiple=8)
    engine = CriticEngine(hf, model, TRAIN, block, layout)
    load_hf(engine.chunks, layout, heads_of(hf, 8), HfDirectory(directory))
    engine.reset_head(HEAD_SEED)
    return engine


def weights_of(engine) -> dict[str, torch.Tensor]:
    """Whole, on every rank; the head as score.weight and score.bias."""
    from grpo_mega.engine.model import unwrap
    from grpo_mega.engine.parallel import broadcast_object
    from grpo_mega.sync.stream import heads_of, stream_hf

    layout = engine.layout
    tensors = stream_hf(engine.chunks, layout, heads_of(engine.hf, 8))
    weights = {name: tensor.detach().clone() for name, tensor in tensors}
    last, head = unwrap(engine.chunks[-1]), None
    if last.post_process:
        parts = last.output_layer.named_parameters()
        head = {f"score.{name}": parameter.detach().clone() for name, parameter in parts}
    return weights | broadcast_object(head, layout.last_stage_rank, layout.pp_group)


def share(engine, items: list[Any]) -> tuple[list[int], list[Any]]:
    """Every rank brings its own; on purpose not those that it will hold."""
    places = list(range(len(items)))[engine.layout.rank :: engine.layout.world_size]
    return places, [items[place] for place in places]


def one_update(
    directory: Path, options: dict[str, Any], block: CriticBlock, max_tokens: int, count: int = PAIRS
) -> Seen:
    from grpo_mega.critic.discriminator import Discriminator
    from grpo_mega.critic.pairs import distribute_pairs

    engine = build(directory, options, block)
    places, made = share(engine, make_pairs(count))
    pairs = distribute_pairs(places, made, engine.layout, max_tokens, (EOS,), block.score)
    before, discriminator = weights_of(engine), Discriminator(engine, block)
    scores = discriminator.score(pairs)
    metrics = discriminator.update(pairs, scores)
    after = weights_of(engine)
    moved = {name: before[name] - after[name] for name in before}
    rewards = discriminator.reward_of(pairs, scores)
    return Seen(scores.teacher_P, scores.student_P, metrics, moved, rewards)


def assert_near(seen: torch.Tensor, expected: torch.Tensor, norm: float, name: str) -> None:
    """As vectors: within float32 of their own length, or of the whole gradient's where they are almost 0."""
    distance, length = float((seen - expected).norm()), float(expected.norm())
    assert distance <= 2e-4 * length + 1e-6 * norm, f"{name}: {distance:.2e} of {length:.2e}"


def assert_same(seen: Seen, expected: Seen) -> None:
    torch.testing.assert_close(seen.teacher_P, expected.teacher_P, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(seen.student_P, expected.student_P, atol=2e-5, rtol=1e-5)
    assert seen.metrics == pytest.approx(expected.metrics, rel=2e-4, abs=2e-5)
    assert seen.moved.keys() == expected.moved.keys()
    for name, moved in expected.moved.items():
        assert_near(seen.moved[name], moved, expected.metrics["critic/grad_norm"], name)

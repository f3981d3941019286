"""The critic is a transformers model with a linear head, and the same critic on every layout: scores, loss,
metrics, gradients and the weights after a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from grpo_mega.model_shape import ModelShape
from grpo_mega.plan import make_plan
from grpo_mega.recipe import Recipe
from grpo_mega.recipe.blocks import ParallelBlock
from grpo_mega.recipe.critic_block import CriticBlock
from tests import tiny
from tests.critic import (
    BLOCK,
    EOS,
    HEAD_SEED,
    LAYOUTS,
    PAIRS,
    Seen,
    assert_near,
    assert_same,
    build,
    make_pairs,
    one_update,
    share,
    weights_of,
)
from tests.matrices import by_hand, covering


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_model("qwen2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def single(ranks, model) -> Seen:
    return ranks(1).run(one_update, model, {}, BLOCK, 64)[0]


def reference(
    directory: Path, dtype: torch.dtype, kind: str
) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """By transformers and formulas alone: the students' scores by place, and the gradient of the loss."""
    model = AutoModel.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    generator = torch.Generator().manual_seed(HEAD_SEED)
    weight = (torch.randn(1, model.config.hidden_size, generator=generator) * BLOCK.head_std).to(dtype)
    weight.requires_grad_()
    bias = torch.zeros(1, dtype=dtype, requires_grad=True)

    def score(prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
        hidden = model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0]
        values = F.linear(hidden, weight, bias)[len(prompt) :, 0]
        kept = [i for i, token in enumerate(answer) if token != EOS] or list(range(len(answer)))
        return values[kept[-1]] if kind == "last" else values[kept].mean()

    pairs = make_pairs()
    teacher = torch.stack([score(p.prompt_ids, p.teacher_ids) for p in pairs])
    student = torch.stack([score(p.prompt_ids, p.student_ids) for p in pairs])
    both = torch.cat([teacher, student])
    difference = (teacher - student) / (both.std(correction=0) + 1e-8)
    logit = (difference - BLOCK.margin) / BLOCK.temperature
    smoothing = BLOCK.label_smoothing
    ranking = ((1 - smoothing) * F.softplus(-logit) + smoothing * F.softplus(logit)).mean()
    reg = BLOCK.score_reg.weight * 2 * (both.abs() - BLOCK.score_reg.threshold).relu().square().mean()
    loss = ranking + reg + BLOCK.gap_penalty * (difference - BLOCK.gap_max).relu().mean()
    loss.backward()
    assert weight.grad is not None and bias.grad is not None
    gradients = {f"model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return dict(enumerate(student.tolist())), {
        **gradients,
        "score.weight": weight.grad,
        "score.bias": bias.grad,
    }


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen2", "last"),
        ("qwen2", "mean"),
        *((f, "last") for f in ("qwen2-tied", "qwen3", "llama", "qwen3_moe")),
    ],
)
def test_the_critic_is_a_transformers_model_with_a_linear_head(family, kind, ranks, tmp_path) -> None:
    model = tiny.save_model(family, tmp_path / "model")
    # transformers' grouped experts know no float64
    dtype = torch.float32 if family == "qwen3_moe" else torch.float64
    expected_scores, gradients = reference(model, dtype, kind)
    norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
    seen: Seen = ranks(1).run(one_update, model, {}, BLOCK.model_copy(update={"score": kind}), 40)[0]
    assert seen.rewards == pytest.approx(expected_scores, abs=1e-4)
    assert seen.metrics["critic/score_reg"] > 1e-3
    if family == "qwen3_moe":  # transformers keeps all experts in one tensor: the norm speaks for them
        gradients = {name: tensor for name, tensor in gradients.items() if "experts" not in name}
    assert {name for name in seen.moved if "experts" not in name} == gradients.keys()
    for name, gradient in gradients.items():
        moved = seen.moved[name].double()
        assert_near(moved / (1 - moved.abs()), gradient, norm, name)
    assert seen.metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("layout", covering(LAYOUTS, default={"dp2", "tp2-sp", "pp2-vpp2", "cp2"}))
def test_scores_loss_metrics_gradients_and_weights_on_every_layout(layout, single, model, ranks) -> None:
    options = LAYOUTS[layout]
    size = ParallelBlock(**options).world_size
    for seen in ranks(size).run(one_update, model, options, BLOCK, 32):
        assert_same(seen, single)


@pytest.mark.parametrize("max_tokens", [1, 20, by_hand(1000)])
def test_any_micro_batch_size(max_tokens, single, model, ranks) -> None:
    assert_same(ranks(1).run(one_update, model, {}, BLOCK, max_tokens)[0], single)


@pytest.mark.parametrize("layout", ["dp2", "pp2-vpp2"])
def test_fewer_sequences_than_ranks(layout, model, ranks) -> None:
    """One pair, and one rank with nothing but padding; or two, and empty rounds of the pipeline."""
    alone = ranks(1).run(one_update, model, {}, BLOCK, 64, count=1)[0]
    for seen in ranks(2).run(one_update, model, LAYOUTS[layout], BLOCK, 1, count=1):
        assert_same(seen, alone)


def in_bfloat16(directory: Path, options: dict[str, Any]):
    from grpo_mega.critic.discriminator import Discriminator
    from grpo_mega.critic.pairs import distribute_pairs

    engine = build(directory, options, BLOCK, dtype="bfloat16")
    places, made = share(engine, make_pairs())
    pairs = distribute_pairs(places, made, engine.layout, 32, (EOS,), "last")
    values = engine.values([scored.batch for scored in pairs.batches])
    discriminator = Discriminator(engine, BLOCK)
    scores = discriminator.score(pairs)
    return scores.student_P, discriminator.update(pairs, scores), {v.dtype for v in values}


@pytest.mark.parametrize("layout", ["dp2", by_hand("pp2"), by_hand("tp2-sp")])
def test_bfloat16_scores_in_float32(layout, single, model, ranks) -> None:
    for student_P, metrics, dtypes in ranks(2).run(in_bfloat16, model, LAYOUTS[layout]):
        assert dtypes <= {torch.float32}
        torch.testing.assert_close(student_P, single.student_P, atol=0.15, rtol=0.05)
        assert metrics["critic/update_skipped"] == 0.0 and metrics["critic/grad_norm"] > 0.1


def live_activations(directory: Path, count: int, max_tokens: int) -> tuple[int, int]:
    """Micro-batches scored, and the most whose last hidden states were alive at a time."""
    import weakref

    from grpo_mega.critic.pairs import distribute_pairs
    from grpo_mega.engine.model import unwrap

    engine = build(directory, {}, BLOCK)
    pairs = distribute_pairs(range(count), make_pairs(count), engine.layout, max_tokens, (EOS,), "last")
    alive: list[Any] = []
    most = 0

    def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(output))
        most = max(most, sum(reference() is not None for reference in alive))

    unwrap(engine.chunks[0]).decoder.register_forward_hook(watch)
    engine.score(pairs.batches, pairs.count)
    return len(alive), most


@pytest.mark.parametrize(("pairs", "max_tokens"), [(PAIRS, 16), by_hand(10_000, 4096)])
def test_scoring_holds_one_micro_batch_of_activations(pairs, max_tokens, model, ranks) -> None:
    count, most = ranks(1).run(live_activations, model, pairs, max_tokens)[0]
    assert count > 3 and most == 1


def test_identical_answers_have_no_gap(single) -> None:
    """One of them was cut off before its end, the other not."""
    assert single.metrics["critic/identical_pairs"] == 1
    assert single.metrics["critic/identical_gap"] == 0.0
    assert single.metrics["critic/batch_std"] > 0.1  # and there is something to tell apart


def last_stage_widths(directory: Path) -> tuple[bool, int]:
    from grpo_mega.engine.model import unwrap

    engine = build(directory, {"pp": 2}, BLOCK)
    last = unwrap(engine.chunks[-1])
    return last.post_process, max(max(p.shape) for p in last.parameters())


@pytest.mark.parametrize("family", ["qwen2", "qwen2-tied"])
def test_the_last_stage_has_nothing_as_wide_as_the_vocabulary(family, ranks, tmp_path) -> None:
    directory = _wide_model(family, tmp_path)
    widths = dict(ranks(2).run(last_stage_widths, directory))
    assert widths[False] == 1000 and widths[True] < 1000  # the embedding is the first stage's


def _wide_model(family: str, directory: Path) -> Path:
    from transformers import AutoModelForCausalLM

    config = tiny.hf_config(family)
    config.vocab_size = 1000
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def value_update(directory: Path, options: dict[str, Any]):
    """One update of PPO's value model: its metrics and how it moved the weights."""
    from grpo_mega.batching import distribute
    from grpo_mega.critic.value import token_rewards, token_targets, value_losses, with_explained_variance

    block = CriticBlock(kind="value", lr=1.0, grad_clip=1e9, head_std=0.5, gamma=0.9, lam=0.8)
    engine = build(directory, options, block)
    sequences = tiny.random_sequences(8)[engine.layout.rank :: engine.layout.world_size]
    batches, counts = distribute(sequences, engine.layout, 48)
    targets = [
        token_targets(batch, values_T, token_rewards(batch, batch.advantages_B), block)
        for batch, values_T in zip(batches, engine.values(batches), strict=False)
    ]
    before = weights_of(engine)
    metrics, update = engine.train_step(
        batches, value_losses(batches, targets, counts.tokens, block), block.lr
    )
    after = weights_of(engine)
    reported = with_explained_variance(engine.reduce_metrics(metrics))
    reported["critic/grad_norm"] = update.grad_norm
    nothing = torch.empty(0)
    return Seen(nothing, nothing, reported, {name: before[name] - after[name] for name in before})


@pytest.mark.parametrize("layout", [by_hand("dp2"), "tp2-sp", "pp2", by_hand("cp2")])
def test_value_updates_on_every_layout(layout, model, ranks) -> None:
    single = ranks(1).run(value_update, model, {})[0]
    assert single.metrics["value/loss"] > 0.1 and "value/explained_variance" in single.metrics
    for seen in ranks(2).run(value_update, model, LAYOUTS[layout]):
        assert_same(seen, single)


def broken_update(directory: Path) -> tuple[bool, bool, bool]:
    """With a score that is no number: was anything applied, moved, remembered?"""
    from grpo_mega.critic.discriminator import Discriminator
    from grpo_mega.critic.pairs import distribute_pairs

    block = BLOCK.model_copy(update={"adaptive_temperature": "ema"})
    engine = build(directory, {"dp": 2}, block)
    places, made = share(engine, make_pairs())
    pairs = distribute_pairs(places, made, engine.layout, 32, (EOS,), "last")
    discriminator, before = Discriminator(engine, block), weights_of(engine)
    raw_N = engine.score(pairs.batches, pairs.count)
    raw_N[0] = torch.nan
    from grpo_mega.critic.ranking import pair_scores

    metrics = discriminator.update(pairs, pair_scores(raw_N, pairs, length_mix=False))
    after = weights_of(engine)
    moved = any(not torch.equal(before[name], after[name]) for name in before)
    return metrics["critic/update_skipped"] == 0, moved, discriminator.state.difference is not None


def test_a_loss_that_is_not_finite_moves_nothing_on_any_rank(model, ranks) -> None:
    assert ranks(2).run(broken_update, model) == [(False, False, False)] * 2


def several_updates(directory: Path) -> list[dict[str, float]]:
    from grpo_mega.critic.discriminator import Discriminator
    from grpo_mega.critic.pairs import distribute_pairs

    block = CriticBlock(kind="discriminator", preset="gad", lr=0.02, grad_clip=0.5)
    engine = build(directory, {"dp": 2}, block)
    places, made = share(engine, make_pairs())
    pairs = distribute_pairs(places, made, engine.layout, 32, (EOS,), block.score)
    discriminator = Discriminator(engine, block)
    return [discriminator.update(pairs, discriminator.score(pairs)) for _ in range(12)]


def test_updates_tell_teachers_from_students(model, ranks) -> None:
    """But for the pair of equal answers, all of them; and clipping is to the recipe's norm."""
    first, second = ranks(2).run(several_updates, model)
    assert first == second
    assert first[-1]["critic/teacher_wins"] == 1.0 > first[0]["critic/teacher_wins"]
    assert first[-1]["critic/d_loss"] < 0.7 * first[0]["critic/d_loss"]
    assert first[0]["critic/grad_norm"] > 0.5 == first[0]["critic/grad_norm_after_clip"]


def _parameters_of(directory: Path, options: dict[str, Any]) -> tuple[int, int]:
    engine = build(directory, options, BLOCK)
    return engine.layout.pp_rank, sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())


def test_a_rank_holds_what_the_plan_says(model, ranks):
    options = {"tp": 2, "pp": 2}
    content = {
        "model": {"hf": str(model), "vocab_multiple": 8},
        "data": {"task": "sort_digits"},
        "critic": {"kind": "value"},
        "advantage": {"estimator": "gae"},
        "parallel": options,
    }
    plan = make_plan(Recipe.model_validate(content), shape=ModelShape.from_hf_directory(model))
    for stage, held in ranks(4).run(_parameters_of, model, options):
        assert held == plan.critic_stages[stage].parameters

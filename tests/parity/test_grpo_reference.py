"""Our GRPO update against a single-process one written with transformers alone: loss, gradient norm, updated
weights; and the same gradient however the batch is cut into micro-batches."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from grpo_mega.recipe.schema import Recipe
from grpo_mega.types import TrainSequence
from tests import tiny
from tests.matrices import covering, covering_rows

TEMPERATURE = 1.25
LR, CLIP_NORM, KL, ENTROPY, CLIP_LOW, CLIP_HIGH = 0.1, 0.5, 0.1, 0.01, 0.2, 0.28
# Adam's first step is lr g / (|g| + eps): with its usual eps it is the gradient's sign, whose rounding would
# hide everything
ADAM_EPS = 0.1
AGGREGATES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def reference_update(directory: Path, sequences: list[TrainSequence], aggregate: str, norm_length: int):
    """GRPO in plain transformers: one forward per sequence, one AdamW step."""
    policy, reference = tiny.load_model(directory), tiny.load_model(directory)
    with torch.no_grad():  # a reference that differs from the policy
        for parameter in reference.parameters():
            parameter.mul_(1.01)
    tokens, count = sum(s.response_length for s in sequences), len(sequences)
    loss = torch.zeros(())
    for s in sequences:
        ids = torch.from_numpy(s.token_ids)

        def response_logprobs(model, ids=ids, s=s):
            logp = torch.log_softmax(model(ids[None]).logits[0, s.prompt_length - 1 : -1] / TEMPERATURE, -1)
            return logp.gather(-1, ids[s.prompt_length :, None])[:, 0], -(logp.exp() * logp).sum(-1)

        logp, entropy = response_logprobs(policy)
        with torch.no_grad():
            logp_reference, _ = response_logprobs(reference)
        ratio = torch.exp(logp - torch.from_numpy(s.sampler_logprobs))
        objective = torch.min(s.advantage * ratio, s.advantage * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
        if s.advantage < 0:
            objective = objective.clamp(min=3.0 * s.advantage)
        d = logp_reference - logp
        per_token = -objective + KL * (torch.exp(d) - 1 - d) - ENTROPY * entropy
        divisor = {
            "token-mean": tokens,
            "seq-mean-token-sum": count,
            "seq-mean-token-mean": count * s.response_length,
            "seq-mean-token-sum-norm": count * norm_length,
        }[aggregate]
        loss = loss + per_token.sum() / divisor
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP_NORM)
    torch.optim.AdamW(policy.parameters(), lr=LR, eps=ADAM_EPS, weight_decay=0.0).step()
    return float(loss.detach()), float(norm), {n: p.detach() for n, p in policy.named_parameters()}


def _recipe(directory: Path, parallel: dict, aggregate: str, micro_batch_tokens: int) -> Recipe:
    return Recipe.model_validate(
        tiny.recipe_dict(
            directory / "run",
            model={"scratch": None, "hf": str(directory), "vocab_multiple": 8},
            parallel=parallel,
            rollout={"temperature": TEMPERATURE},
            loss={
                "objective": {"clip": {"low": CLIP_LOW, "high": CLIP_HIGH}},
                "kl": {"coef": KL},
                "entropy_coef": ENTROPY,
                "aggregate": aggregate,
                "norm_length": 20,
            },
            train={"adam_eps": ADAM_EPS, "grad_clip": CLIP_NORM, "micro_batch_tokens": micro_batch_tokens},
        )
    )


def _update(
    directory: Path, parallel: dict, sequences: list[TrainSequence], aggregate: str, micro_batch_tokens: int
):
    from transformers import AutoConfig

    from grpo_mega.data.tokenizer import scratch_tokenizer
    from grpo_mega.engine.parallel import initialize_layout
    from grpo_mega.engine.policy import PolicyEngine
    from grpo_mega.inputs import Inputs
    from grpo_mega.monitor.console import Console
    from grpo_mega.parts import Parts
    from grpo_mega.steps import Steering, policy_update, prepare_update
    from grpo_mega.sync.stream import HfDirectory, load_hf

    recipe = _recipe(directory, parallel, aggregate, micro_batch_tokens)
    layout = initialize_layout(recipe.parallel, 0)
    hf = AutoConfig.from_pretrained(directory)
    engine = PolicyEngine(hf, recipe.model, recipe.train, layout)
    parts = Parts(recipe, layout, Console.silent(), Inputs(recipe, scratch_tokenizer()), hf, engine, "eager")
    load_hf(engine.chunks, layout, parts.heads, HfDirectory(directory))
    engine.weights_changed()
    reference = {name: 1.01 * weight for name, weight in engine.copy_weights().items()}
    mine = sequences[layout.rank :: layout.world_size]
    steering = Steering(LR, parts.policy_loss, reference)
    metrics = policy_update(parts, prepare_update(parts, mine, reference), steering, {})
    return metrics, {name: tensor.clone() for name, tensor in parts.hf_tensors()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model("qwen2", tmp_path_factory.mktemp("model"))


LAYOUTS = {"one": {}, "tp2": {"tp": 2}, "dp2": {"dp": 2}, "pp2": {"pp": 2}}


@pytest.mark.parametrize(
    ("aggregate", "layout"),
    covering_rows(product(AGGREGATES, LAYOUTS), default=set(zip(AGGREGATES, LAYOUTS, strict=True))),
)
def test_update_equals_transformers(aggregate, layout, model, ranks):
    parallel = LAYOUTS[layout]
    sequences = tiny.random_sequences(10, seed=3)
    loss, norm, weights = reference_update(model, sequences, aggregate, norm_length=20)
    size = 2 if parallel else 1
    for metrics, updated in ranks(size).run(_update, model, parallel, sequences, aggregate, 64):
        assert metrics["actor/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(updated[name], weight, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("aggregate", covering(AGGREGATES, default={"token-mean", "seq-mean-token-mean"}))
def test_gradient_does_not_depend_on_micro_batches(aggregate, model, ranks):
    """The same batch in 1, 2 and 8 micro-batches, and one sequence in each."""
    sequences = tiny.random_sequences(16, seed=4)
    total = sum(s.length for s in sequences)
    whole, *others = (
        ranks(1).run(_update, model, {}, sequences, aggregate, tokens)[0]
        for tokens in (total, total // 2 + 17, total // 8 + 17, 1)
    )
    for metrics, _ in others:
        assert metrics == pytest.approx(whole[0], rel=2e-5, abs=1e-6)

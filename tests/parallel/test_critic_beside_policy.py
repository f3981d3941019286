"""Policy and critic in one process: neither disturbs the other, one checkpoint holds both; audit and detail
log over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_mega.recipe.blocks import ModelBlock, ParallelBlock, TrainBlock
from tests import tiny
from tests.critic import BLOCK, EOS, TRAIN, build, make_pairs, share, weights_of
from tests.matrices import by_hand


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_model("qwen2-tied", tmp_path_factory.mktemp("model"))


def policy_beside_a_critic(directory: Path, options: dict[str, Any], *, with_critic: bool) -> list[Any]:
    """Three policy updates, each beside one of the critic, and the policy's weights after them."""
    from transformers import AutoConfig

    from grpo_mega.batching import distribute
    from grpo_mega.critic.discriminator import Discriminator
    from grpo_mega.critic.pairs import distribute_pairs
    from grpo_mega.engine.parallel import initialize_layout
    from grpo_mega.engine.policy import LossTerms, PolicyEngine
    from grpo_mega.sync.stream import HfDirectory, heads_of, load_hf, stream_hf

    critic = build(directory, options, BLOCK) if with_critic else None
    layout = critic.layout if critic else initialize_layout(ParallelBlock(**options), seed=0)
    hf = AutoConfig.from_pretrained(directory)
    block = ModelBlock(hf=str(directory), dtype="float32", vocab_multiple=8)
    policy = PolicyEngine(hf, block, TrainBlock(), layout)
    load_hf(policy.chunks, layout, heads_of(hf, 8), HfDirectory(directory))
    policy.weights_changed()
    sequences = tiny.random_sequences(8)[layout.rank :: layout.world_size]
    seen: list[Any] = []
    for _ in range(3):
        if critic:
            discriminator = Discriminator(critic, BLOCK)
            places, made = share(critic, make_pairs())
            pairs = distribute_pairs(places, made, layout, 32, (EOS,), "last")
            discriminator.update(pairs, discriminator.score(pairs))
        batches, counts = distribute(sequences, layout, 48)
        scale = 1.0 / counts.tokens
        _, update = policy.train_step(
            batches, lambda out, b, scale=scale: LossTerms(-scale * out.logprobs_T.sum(), {}), lr=1e-3
        )
        if critic:
            discriminator.measure(pairs, "critic_audit")
        seen.append(update.grad_norm)
    seen += [(name, tensor.clone()) for name, tensor in stream_hf(policy.chunks, layout, heads_of(hf, 8))]
    return seen


@pytest.mark.parametrize(
    "options",
    [by_hand({}), {"tp": 2, "sequence_parallel": True}, by_hand({"pp": 2}), by_hand({"dp": 2})],
    ids=["one", "tp2-sp", "pp2", "dp2"],
)
def test_a_critic_beside_it_changes_no_bit_of_the_policy(options, model, ranks) -> None:
    pool = ranks(ParallelBlock(**options).world_size)
    alone = pool.run(policy_beside_a_critic, model, options, with_critic=False)
    beside = pool.run(policy_beside_a_critic, model, options, with_critic=True)
    for one, other in zip(alone, beside, strict=True):
        assert one[:3] == other[:3] and all(norm > 0 for norm in one[:3])
        for (name, tensor), (other_name, other_tensor) in zip(one[3:], other[3:], strict=True):
            assert name == other_name and torch.equal(tensor, other_tensor), name


def critic_through_a_checkpoint(
    directory: Path, folder: Path, options: dict[str, Any], *, save: bool
) -> list[Any]:
    """Two updates, a save, one more; or a load and that one more: the last update's metrics and weights."""
    from transformers import AutoConfig

    from grpo_mega.checkpoints import RunState
    from grpo_mega.critic.discriminator import Discriminator
    from grpo_mega.critic.pairs import distribute_pairs
    from grpo_mega.engine.checkpoint import load_checkpoint
    from grpo_mega.engine.policy import PolicyEngine
    from grpo_mega.engine.saver import Saver
    from grpo_mega.sync.stream import HfDirectory, heads_of, load_hf, stream_hf

    block = BLOCK.model_copy(update={"lr": 1e-2})
    critic = build(directory, options, block)
    layout, hf = critic.layout, AutoConfig.from_pretrained(directory)
    policy = PolicyEngine(hf, ModelBlock(hf="x", dtype="float32", vocab_multiple=8), TRAIN, layout)
    if save:
        load_hf(policy.chunks, layout, heads_of(hf, 8), HfDirectory(directory))
        policy.weights_changed()
    discriminator = Discriminator(critic, block)
    places, made = share(critic, make_pairs())
    pairs = distribute_pairs(places, made, layout, 32, (EOS,), "last")

    def update() -> dict[str, float]:
        return discriminator.update(pairs, discriminator.score(pairs))

    companions = {"critic": critic}
    if save:
        update()
        update()
        saver = Saver(policy, folder, keep=1, keep_best=False, background=False, companions=companions)
        faults = [outcome.fault for outcome in saver.save(RunState(2, 0, 2))]
        assert faults == [None], faults
    else:
        critic.reset_head(99)
        load_checkpoint(policy, folder / "step_000002", companions)
    policy_weights = [tensor.clone() for _, tensor in stream_hf(policy.chunks, layout, heads_of(hf, 8))]
    return [update(), weights_of(critic), policy_weights]


@pytest.mark.parametrize(
    "options",
    [{}, {"dp": 2}, by_hand({"pp": 2}), by_hand({"tp": 2}), by_hand({"tp": 2, "pp": 2})],
    ids=["one", "dp2", "pp2", "tp2", "tp2-pp2"],
)
def test_policy_and_critic_share_a_checkpoint_that_any_layout_reads(
    options, critic_checkpoint, model, ranks
) -> None:
    folder, saved = critic_checkpoint
    pool = ranks(ParallelBlock(**options).world_size)
    for metrics, weights, policy in pool.run(critic_through_a_checkpoint, model, folder, options, save=False):
        assert metrics == pytest.approx(saved[0], rel=1e-3, abs=1e-4)
        for name, tensor in weights.items():
            torch.testing.assert_close(
                tensor, saved[1][name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
        for tensor, expected in zip(policy, saved[2], strict=True):
            assert torch.equal(tensor, expected)


@pytest.fixture(scope="module")
def critic_checkpoint(model, ranks, tmp_path_factory):
    """Written at TP2 x PP2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    saved = ranks(4).run(critic_through_a_checkpoint, model, folder, {"tp": 2, "pp": 2}, save=True)
    return folder, saved[0]


def audit_and_details(directory: Path, run_dir: Path, options: dict[str, Any]):
    """The audit's metrics, and the detail log that rank 0 wrote."""
    from grpo_mega.critic.audit import AuditSet, audit_metrics
    from grpo_mega.critic.details import write_details
    from grpo_mega.critic.discriminator import Discriminator
    from grpo_mega.critic.pairs import distribute_pairs

    engine = build(directory, options, BLOCK)
    discriminator = Discriminator(engine, BLOCK)
    places, made = share(engine, make_pairs())
    pairs = distribute_pairs(places, made, engine.layout, 32, (EOS,), "last")
    scores = discriminator.score(pairs)
    audit = AuditSet(tuple(make_pairs(5)))
    before = audit_metrics(discriminator, audit, 32, (EOS,))
    metrics = discriminator.update(pairs, scores)
    path = write_details(run_dir, places, made, pairs, scores, metrics, (EOS,), step=4, count=3)
    return before, audit_metrics(discriminator, audit, 32, (EOS,)), path.read_text() if path else None


def test_audit_and_details_take_all_ranks(model, ranks, tmp_path) -> None:
    one = ranks(1).run(audit_and_details, model, tmp_path / "one", {})[0]
    two = ranks(2).run(audit_and_details, model, tmp_path / "two", {"dp": 2})
    assert one[0]["critic_audit/pairs"] == 5
    assert one[0]["critic_audit/d_loss"] != pytest.approx(one[1]["critic_audit/d_loss"])
    for before, after, _ in two:
        assert before == pytest.approx(one[0], rel=2e-4, abs=2e-5)
        assert after == pytest.approx(one[1], rel=2e-3, abs=2e-4)  # after a step of rate 1
    assert [text is None for *_, text in two] == [False, True]
    assert two[0][2] == one[2]
    assert "step 4: 3 of 7 pairs" in one[2] and "made-2/0: tie" in one[2]
    assert "identical answers: 1, gap 0.0000: ok" in one[2]

"""The plan: places, shares, parameters and memory by hand arithmetic, and the laws a layout must hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_mega.errors import UserError
from grpo_mega.plan import ModelShape, RankPlace, check_layout, check_world_size, make_plan
from grpo_mega.plan_text import render_plan
from grpo_mega.recipe import Recipe
from grpo_mega.recipe.blocks import ScratchModel

SHAPE = ModelShape("qwen2", 4, 64, 8, 4, 8, 96, 100, tie_embeddings=False, rope_theta=1e4, max_positions=64)
MOE = dataclasses.replace(SHAPE, family="qwen3_moe", experts=8, experts_per_token=2, moe_ffn=32)

NUMBERS = 4 * 64 + (64 + 2 * 32) + 64 + 3 * 96
"""Of a token and a layer: around the norms; q, k and v; what attention gives; gate, up and their product."""

VALUE = {"critic": {"kind": "value"}, "advantage": {"estimator": "gae"}}
DISCRIMINATOR = {
    "critic": {"kind": "discriminator"},
    "stages": [{"warmup": {"steps": 1}}, {"adversarial": {"steps": 1}}],
    "reward": [{"discriminator": {}}],
}


def recipe(**blocks: Any) -> Recipe:
    return Recipe.model_validate({"model": {"hf": "m"}, "data": {"task": "sort"}, **blocks})


def test_ranks_are_laid_out_tensor_first_and_pipeline_last() -> None:
    ranks = make_plan(recipe(parallel={"tp": 2, "dp": 2, "pp": 2}), shape=None).ranks
    assert len(ranks) == 8
    assert ranks[1] == RankPlace(rank=1, tp=1, cp=0, dp=0, pp=0, ep=0)
    assert ranks[2] == RankPlace(rank=2, tp=0, cp=0, dp=1, pp=0, ep=0)
    assert ranks[4] == RankPlace(rank=4, tp=0, cp=0, dp=0, pp=1, ep=0)
    assert ranks[7] == RankPlace(rank=7, tp=1, cp=0, dp=1, pp=1, ep=0)


@pytest.mark.parametrize("sizes", [{"tp": 2, "cp": 2, "dp": 2}, {"cp": 2, "dp": 3, "pp": 2}])
def test_every_rank_is_where_megatron_puts_it(sizes: dict[str, int]) -> None:
    from megatron.core.parallel_state import RankGenerator

    places = make_plan(recipe(parallel=sizes, rollout={"prompts_per_step": 12}), shape=None).ranks
    given = {"tp": 1, "cp": 1, "dp": 1, "pp": 1} | sizes
    megatron = RankGenerator(**given, ep=1, order="tp-cp-ep-dp-pp")
    for kind in given:
        groups: dict[tuple[int, ...], list[int]] = {}
        for place in places:
            others = tuple(getattr(place, other) for other in given if other != kind)
            groups.setdefault(others, []).append(place.rank)
        assert sorted(groups.values()) == sorted(megatron.get_ranks(kind)), kind


def test_expert_ranks_are_the_nearest_data_parallel_ones() -> None:
    ranks = make_plan(recipe(parallel={"dp": 4, "ep": 2}), shape=None).ranks
    assert [place.ep for place in ranks] == [0, 1, 0, 1]


def test_interleaved_stages_take_turns_with_the_layers() -> None:
    stages = make_plan(recipe(parallel={"pp": 2, "vpp": 2}), shape=SHAPE).stages
    assert [stage.chunks for stage in stages] == [(range(0, 1), range(2, 3)), (range(1, 2), range(3, 4))]


def test_prompts_are_dealt_evenly() -> None:
    plan = make_plan(
        recipe(parallel={"dp": 4}, rollout={"prompts_per_step": 10, "group_size": 3}), shape=None
    )
    assert plan.prompts_per_dp_rank == (3, 3, 2, 2)
    assert plan.samples_per_dp_rank == (9, 9, 6, 6)
    assert plan.samples_per_step == 30
    assert "no multiple of parallel.dp (4)" in plan.notes[0]


def test_idle_ranks_are_a_note_and_no_error() -> None:
    plan = make_plan(recipe(parallel={"dp": 4}, rollout={"prompts_per_step": 2}), shape=None)
    assert plan.prompts_per_dp_rank == (1, 1, 0, 0)
    assert plan.notes[0].startswith("2 of 4 data-parallel ranks have no prompt")
    assert plan.notes[0] in render_plan(plan)


def test_sequences_longer_than_a_micro_batch_are_noted() -> None:
    plan = make_plan(
        recipe(data={"task": "t", "max_prompt_tokens": 50}, train={"micro_batch_tokens": 60}), shape=None
    )
    assert "= 66) exceeds train.micro_batch_tokens (60)" in plan.notes[0]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_real_model(family: str, tied: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = AutoConfig.for_model(
        family,
        **sizes,
        **(experts if family == "qwen3_moe" else {}),
        head_dim=16,
        intermediate_size=48,
        vocab_size=70,
        tie_word_embeddings=tied,
    )
    if family == "qwen2":
        config.head_dim = 8  # this family always uses hidden / heads
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert ModelShape.from_hf_directory(tmp_path).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", [SHAPE, MOE, dataclasses.replace(SHAPE, tie_embeddings=True)])
@pytest.mark.parametrize("layout", [{"tp": 1}, {"tp": 4}, {"pp": 2}, {"tp": 2, "pp": 2, "vpp": 2}])
def test_the_stages_hold_the_whole_model_between_them(shape: ModelShape, layout: dict[str, int]) -> None:
    """Matrices are split; norms and routers repeated on tensor ranks, a tied table on both pipeline ends."""
    tp, pp = layout.get("tp", 1), layout.get("pp", 1)
    plan = make_plan(recipe(parallel=layout), shape=shape)
    held = tp * sum(stage.parameters for stage in plan.stages)
    norms_and_router = 2 * 64 + (2 * 8 + 64 * 8 if shape.experts else 0)
    repeated = (tp - 1) * (4 * norms_and_router + 64)
    padding = (128 - 100) * 64 * (1 if shape.tie_embeddings and pp == 1 else 2)
    second_table = 100 * 64 if shape.tie_embeddings and pp > 1 else 0
    assert held == shape.parameters + repeated + padding + second_table


def test_experts_are_shared_out_over_ep() -> None:
    whole = make_plan(recipe(parallel={"dp": 4}), shape=MOE).stages[0].parameters
    quarter = make_plan(recipe(parallel={"dp": 4, "ep": 4}), shape=MOE).stages[0].parameters
    experts = 4 * 8 * 3 * 64 * 32  # layers, experts, three matrices of hidden x width
    assert whole - quarter == experts * 3 // 4


def test_memory_of_a_bfloat16_run() -> None:
    blocks = {"parallel": {"dp": 2}, "loss": {"kl": {"coef": 0.1}}, "train": {"micro_batch_tokens": 2000}}
    memory = make_plan(recipe(**blocks), shape=SHAPE).stages[0].memory
    parameters = SHAPE.parameters + 28 * 64 * 2  # two tables padded from 100 to 128
    assert memory.weights == 2 * parameters
    assert memory.gradients == 4 * parameters
    assert memory.optimizer == 12 * parameters // 2  # main weights and two moments, over two ranks
    assert memory.reference == 2 * parameters
    assert memory.logits == 4 * 2000 * 128
    # 8 prompts x 8 samples of 1024 + 16 tokens; a key and a value of 4 x 8 numbers in each of 4 layers
    assert memory.sampler == 2 * (SHAPE.parameters + 64 * 1040 * 2 * 4 * 4 * 8)
    assert memory.activations == 2 * 4 * 2000 * NUMBERS
    assert memory.total == sum(dataclasses.astuple(memory))


def test_memory_of_a_float32_run() -> None:
    """No separate main weights; a reference that waits on the host takes nothing here."""
    blocks = {"model": {"hf": "m", "dtype": "float32"}, "loss": {"kl": {"coef": 0.1, "reference_on": "host"}}}
    memory = make_plan(recipe(**blocks), shape=SHAPE).stages[0].memory
    assert memory.optimizer == 2 * memory.weights == 2 * memory.gradients
    assert memory.reference == 0


@pytest.mark.parametrize(
    ("layout", "recompute", "numbers"),
    [  # tensor ranks share out matrices, and norms only under sequence parallelism
        ({"tp": 2}, "none", 4 * 64 + (128 + 64 + 288) // 2),
        ({"tp": 2, "sequence_parallel": True}, "none", NUMBERS // 2),
        ({"cp": 2}, "none", NUMBERS // 2),  # half of the tokens
        ({}, "full", 64),  # a layer's input
        ({"tp": 2, "sequence_parallel": True}, "full", 32),
    ],
)
def test_activations_of_a_layout(layout: dict[str, Any], recompute: str, numbers: int) -> None:
    blocks = {"parallel": layout, "model": {"hf": "m", "recompute": recompute}}
    (stage,) = make_plan(recipe(**blocks, train={"micro_batch_tokens": 2000}), shape=SHAPE).stages
    assert stage.memory.activations == 2 * 4 * 2000 * numbers


def test_activations_of_a_tokens_experts() -> None:
    (stage,) = make_plan(recipe(train={"micro_batch_tokens": 2000}), shape=MOE).stages
    experts = 2 * (64 + 3 * 32)  # each gets the token and has an inner width of 32
    assert stage.memory.activations == 2 * 4 * 2000 * (NUMBERS - 3 * 96 + experts)


@pytest.mark.parametrize("kind", [VALUE, DISCRIMINATOR], ids=["value", "discriminator"])
def test_memory_of_a_critic(kind: dict[str, Any]) -> None:
    """A layer: q, o and k, v of 64 x (64 + 32), biases 64 + 2 x 32, two norms, three of 64 x 96: 30,976. One
    table of 128 x 64, the last norm, a head of 64 + 1."""
    plan = make_plan(recipe(parallel={"dp": 2}, train={"micro_batch_tokens": 2000}, **kind), shape=SHAPE)
    (stage,) = plan.critic_stages
    assert stage.parameters == 4 * 30_976 + 8192 + 64 + 65 == 132_225
    memory = stage.memory
    assert (memory.weights, memory.gradients) == (2 * 132_225, 4 * 132_225)
    assert memory.optimizer == 12 * 66_113  # one of two ranks has the odd one
    assert memory.activations == 2 * 4 * 2000 * NUMBERS
    assert memory.reference == memory.sampler == memory.logits == 0
    policy = plan.stages[0].memory
    both = policy.total + memory.total - memory.activations  # one learns after the other
    assert memory.beside(policy) == both


def test_the_critic_of_a_pipeline_has_its_table_first_and_its_head_last() -> None:
    stages = make_plan(recipe(parallel={"pp": 2}, **VALUE), shape=SHAPE).critic_stages
    assert [stage.parameters for stage in stages] == [2 * 30_976 + 8192, 2 * 30_976 + 64 + 65]
    assert [stage.chunks for stage in stages] == [(range(0, 2),), (range(2, 4),)]


def test_a_critic_of_another_size() -> None:
    small = dataclasses.replace(SHAPE, layers=2)
    plan = make_plan(recipe(**VALUE), shape=SHAPE, critic_shape=small)
    assert plan.critic_stages[0].parameters == 2 * 30_976 + 8192 + 64 + 65
    assert plan.stages == make_plan(recipe(), shape=SHAPE).stages
    with pytest.raises(UserError, match="number of layers = 2"):
        make_plan(recipe(parallel={"pp": 4}, **VALUE), shape=SHAPE, critic_shape=small)


def test_the_critic_stands_beside_the_policy_in_the_text() -> None:
    text = render_plan(make_plan(recipe(**VALUE), shape=SHAPE))
    parameters = 4 * 30_976 + 100 * 64 + 64 + 65  # without padding
    assert f"critic (value): qwen2, {parameters:,} parameters, 4 layers" in text
    assert "with the policy" in text
    assert "critic" not in render_plan(make_plan(recipe(), shape=SHAPE))


def test_a_plan_without_a_shape_leaves_sizes_out() -> None:
    plan = make_plan(recipe(), shape=None)
    assert plan.parameters is None and plan.stages == ()
    assert "parameters" not in render_plan(plan)


def test_the_text_shows_what_a_reader_looks_for() -> None:
    text = render_plan(make_plan(recipe(parallel={"tp": 2, "pp": 2, "dp": 2}), shape=SHAPE))
    for expected in (
        "8 ranks = tp 2 x cp 1 x dp 2 x pp 2",
        "16 prompts x 8 samples = 128",
        "2-3",
        "KiB",
        "4 layers",
    ):
        assert expected in text


def test_a_large_layout_is_cut_and_says_so() -> None:
    text = render_plan(make_plan(recipe(parallel={"dp": 100}, rollout={"prompts_per_step": 100}), shape=None))
    assert "and 68 more rows" in text


@pytest.mark.parametrize(
    ("layout", "shape", "key"),
    [
        ({"tp": 3}, SHAPE, "parallel.tp"),  # 8 heads
        ({"tp": 8}, SHAPE, "parallel.tp"),  # 4 key-value heads
        ({"tp": 4}, dataclasses.replace(SHAPE, ffn=98), "parallel.tp"),
        ({"tp": 4}, dataclasses.replace(MOE, moe_ffn=30), "parallel.tp"),
        ({"pp": 3}, SHAPE, "parallel.pp"),
        ({"pp": 2, "vpp": 4}, SHAPE, "parallel.vpp"),
        ({"dp": 3, "ep": 3}, MOE, "parallel.ep"),
        ({"dp": 2, "ep": 2}, SHAPE, "parallel.ep"),
    ],
)
def test_a_layout_that_breaks_a_law_is_refused(layout: dict[str, int], shape: ModelShape, key: str) -> None:
    with pytest.raises(UserError) as caught:
        check_layout(recipe(parallel=layout), shape)
    assert key in str(caught.value.where)
    assert caught.value.law and caught.value.remedy


def test_the_padded_vocabulary_divides_over_tp() -> None:
    block = {"model": {"hf": "m", "vocab_multiple": 1}, "parallel": {"tp": 4}}
    odd = dataclasses.replace(SHAPE, vocab=101)
    with pytest.raises(UserError, match="padded vocabulary"):
        check_layout(recipe(**block), odd)
    check_layout(recipe(parallel={"tp": 4}), odd)


def test_the_remedy_lists_what_would_work() -> None:
    with pytest.raises(UserError) as caught:
        check_layout(recipe(parallel={"tp": 8}), SHAPE)
    assert caught.value.remedy == "change parallel.tp to one of 1, 2, 4"


def test_as_many_processes_as_places() -> None:
    layout = recipe(parallel={"tp": 2, "dp": 2})
    check_world_size(layout, 4)
    with pytest.raises(UserError) as caught:
        check_world_size(layout, 6)
    assert "tp 2 x pp 1 x cp 1 x dp 2 = 4" in str(caught.value.law)
    assert "parallel.dp=3" in str(caught.value.remedy)
    with pytest.raises(UserError) as caught:
        check_world_size(layout, 3)
    assert "start 4 processes" in str(caught.value.remedy)


def test_a_scratch_shape() -> None:
    shape = ModelShape.from_scratch(ScratchModel(family="qwen3_moe", hidden=128, heads=4, ffn=96), vocab=101)
    assert (shape.head_dim, shape.vocab, shape.experts, shape.moe_ffn) == (32, 101, 4, 96)
    assert ModelShape.from_scratch(ScratchModel(), vocab=101).experts == 0


def test_head_dim_defaults_to_an_equal_share(tmp_path: Path) -> None:
    write_config(tmp_path)
    shape = ModelShape.from_hf_directory(tmp_path)
    assert (shape.head_dim, shape.kv_heads, shape.rope_theta) == (8, 2, 1e6)


def write_config(folder: Path, **changes: object) -> None:
    config = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 50,
        "rope_theta": 1e6,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "some layers of this model have experts"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    changes: dict[str, object], what: str, tmp_path: Path
) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(UserError, match=what) as caught:
        ModelShape.from_hf_directory(tmp_path)
    assert "config.json" in str(caught.value.where)


def test_a_missing_model_says_which_part_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*nowhere\n"):
        ModelShape.from_hf_directory(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"there is no .*config\.json"):
        ModelShape.from_hf_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        ModelShape.from_hf_directory(tmp_path)


def test_the_plan_knows_the_widest_tile_of_logits():
    from grpo_mega.kernels.logprob import GPU_TILE, TILE
    from grpo_mega.plan_memory import LOGIT_TILE

    assert max(TILE, GPU_TILE) == LOGIT_TILE

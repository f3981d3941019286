"""Small real models and batches that the tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from grpo_mega.types import TrainSequence

FAMILIES = ("qwen2", "qwen2-tied", "qwen3", "llama")
VOCAB = 100


def hf_config(family: str) -> PretrainedConfig:
    kind, _, tied = family.partition("-")
    extra = {"head_dim": 16} if kind.startswith("qwen3") else {}
    if kind == "qwen3_moe":
        extra |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        }
    return AutoConfig.for_model(
        kind,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        tie_word_embeddings=bool(tied),
        initializer_range=0.2,
        **extra,
    )


def save_model(family: str, directory: Path) -> Path:
    """A random model whose norms and biases are not the trivial ones and zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config(family), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(directory)
    return directory


def load_model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def random_sequences(
    count: int, seed: int = 0, *, shortest: int = 3, longest: int = 17
) -> list[TrainSequence]:
    """Sequences of unlike lengths with made-up sampler log-probs and advantages."""
    rng = np.random.default_rng(seed)
    sequences = []
    for order in range(count):
        length = int(rng.integers(shortest, longest + 1))
        prompt = int(rng.integers(1, length - 1))
        sequences.append(
            TrainSequence(
                order=order,
                uid=f"made-{order}/0",
                token_ids=rng.integers(0, VOCAB, length),
                prompt_length=prompt,
                sampler_logprobs=rng.normal(-4.0, 1.0, length - prompt).astype(np.float32),
                advantage=float(rng.normal()),
                reward=float(np.sin(1.0 + order)),
            )
        )
    return sequences


def recipe_dict(run_dir: Path, *, layers: int = 2, **blocks: object) -> dict:
    """A few seconds' run whose rewards vary from the first step on: a digit anywhere in the response."""
    recipe: dict = {
        "run": {"dir": str(run_dir)},
        "model": {
            "scratch": {
                "layers": layers,
                "hidden": 64,
                "heads": 4,
                "kv_heads": 2,
                "ffn": 128,
                "max_positions": 64,
            },
            "dtype": "float32",
        },
        "data": {"source": "procedural", "task": "sort_digits", "eval": 64},
        "stages": [{"sft": {"steps": 2, "batch_size": 16}}, {"grpo": {"steps": 5}}],
        "rollout": {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 6, "prompts_per_batch": 4},
        "reward": [{"rule": {"kind": "regex", "pattern": "[0-4]"}}],
        "loss": {"kl": {"coef": 0.01}, "entropy_coef": 0.001},
        "train": {"lr": 1e-3, "warmup_steps": 2, "micro_batch_tokens": 160},
        "eval": {"every": 3, "samples": 8},
        "checkpoint": {"every": 0},
    }
    for key, value in blocks.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and key in recipe else value
    return recipe


def refusal(recipe: dict) -> str:
    """Why it is no recipe."""
    from grpo_mega.recipe.schema import Recipe

    with pytest.raises(ValueError) as refused:
        Recipe.model_validate(recipe)
    return str(refused.value)


def train_on_pool(recipe: dict, resume: bool = False, **files: Path | None) -> None:
    """`grpo_mega.train.run` without leaving the process group, for a rank of a pool."""
    from grpo_mega.parts import build
    from grpo_mega.recipe.schema import Recipe
    from grpo_mega.rollout_files import RolloutFiles
    from grpo_mega.train import Trainer
    from grpo_mega.watchdog import Watchdog

    kept = RolloutFiles(**files)
    parts = build(Recipe.model_validate(recipe), quiet=True, fresh=not resume, files=kept)
    watchdog = Watchdog(0, parts.run_dir, parts.layout.rank, parts.layout.world_size)
    trainer = Trainer(parts, watchdog, resume=resume)
    try:
        trainer.run()
    finally:
        trainer.journal.close()
    parts.export(Path(recipe["run"]["dir"]) / "hf")


def beyond_overwrite(run_dir: Path) -> set[str]:
    """What a run left that --overwrite would leave behind."""
    from grpo_mega.cli import RUN_FILES

    return {path.name for path in run_dir.iterdir()} - set(RUN_FILES)


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """Each line of a run's metrics.jsonl without what depends on the clock."""
    from grpo_mega.monitor.jsonl import read_metrics

    return [
        {"step": record.step} | {k: v for k, v in record.metrics.items() if not k.startswith("perf/")}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]

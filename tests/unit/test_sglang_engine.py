"""The engine's end, without servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from grpo_mega.data.tokenizer import scratch_tokenizer
from grpo_mega.recipe.rollout_block import RolloutBlock
from grpo_mega.rollout.client import ServersGone
from grpo_mega.rollout.managed import ModelFacts
from grpo_mega.rollout.pending import LoopThread, Pending
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.rollout.sglang import SglangEngine
from grpo_mega.rollout.turns import Draft
from grpo_mega.types import Prompt, Sample
from tests import tiny


def test_an_engine_is_closed_again_after_a_batch_that_was_lost(tmp_path: Path):
    """By a run that ends with a message, and then by its process."""
    tokenizer = scratch_tokenizer()
    facts = ModelFacts(tiny.hf_config("qwen2"), tokenizer, "float32", on_gpu=False)
    engine = SglangEngine(RolloutBlock(engine="sglang"), facts, tmp_path)

    def draft(prompt: Prompt, index: int) -> Draft:
        return Draft(prompt, f"{prompt.uid}/{index}", index, SamplingParams(4), 0, tokenizer)

    async def lost(drafts: Sequence[Draft], accept: Callable[[Sample], None]) -> None:
        raise ServersGone("all of them")

    engine._loop = LoopThread()
    pending = Pending((), 1, draft, None)
    pending.launch(engine._loop, lost)
    engine._pending.append(pending)
    assert pending.wait() == "all of them"
    engine.close()
    engine.close()

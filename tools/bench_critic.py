"""How many pairs a second a critic scores, against one forward pass of the policy over the same tokens.

python tools/bench_critic.py                     # 10,000 pairs, the quickstart's model

One process. Both pass over the same micro-batches, one at a time; seconds are of the processor, so that other
work on the machine counts little, and the best round of each counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from grpo_mega import launch
from grpo_mega.critic.pairs import AnswerPair, distribute_pairs
from grpo_mega.parts import build
from grpo_mega.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "discriminator" / "base.yaml"
EOS = 1


def made_up(count: int, vocab: int) -> list[AnswerPair]:
    """Prompts of 16 tokens, answers of 8 to 64."""
    random = np.random.default_rng(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(random.integers(2, vocab, length).tolist())

    def answer() -> tuple[int, ...]:
        return (*ids(int(random.integers(8, 65))), EOS)

    return [AnswerPair(f"made-{place}/0", ids(16), answer(), answer()) for place in range(count)]


def best(rounds: int, work: Callable[[], object]) -> float:
    seconds: list[float] = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def measure(count: int, rounds: int, tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.dir={folder}/run", "parallel.dp=1", f"train.micro_batch_tokens={tokens}"]
        recipe = load_recipe(RECIPE, overrides).recipe
        parts = build(recipe, quiet=True, fresh=True, check_inputs=False)
        critic = parts.critic
        assert critic is not None
        pairs = distribute_pairs(
            range(count), made_up(count, parts.hf.vocab_size), parts.layout, tokens, (EOS,), "last"
        )
        batches = [scored.batch for scored in pairs.batches]
        few = pairs.batches[:2]
        critic.score(few, pairs.count)  # the first pass of anything is slower
        parts.engine.logprobs(batches[:2])
        scoring = best(rounds, lambda: critic.score(pairs.batches, pairs.count))
        forward = best(rounds, lambda: parts.engine.logprobs(batches))
    print(f"{count} pairs, {pairs.tokens} tokens in {len(batches)} micro-batches of at most {tokens}")
    speed = f"{count / scoring:,.0f} pairs/s, {pairs.tokens / scoring:,.0f} tokens/s"
    print(f"scoring        {scoring:.2f} s, {speed}")
    print(f"policy forward {forward:.2f} s; scoring takes {scoring / forward:.2f} of it")


def _main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    given = parser.parse_args()
    return launch.run_distributed(lambda: measure(given.pairs, given.rounds, given.micro_batch_tokens), 1, [])


if __name__ == "__main__":
    sys.exit(launch.guarded(_main))

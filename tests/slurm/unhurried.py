"""A rollout.generate for jobs that tests do something to: steps that last without work for a processor."""

from __future__ import annotations

import time

from grpo_mega.rollout.turns import Draft, TurnClient

SECONDS_A_PROMPT = 0.2


async def generate(sample: Draft, client: TurnClient) -> None:
    if sample.rollout_index == 0:
        time.sleep(SECONDS_A_PROMPT)  # of all samples: those of a batch are then asked for together, as ever
    await client.complete(sample)

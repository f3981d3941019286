"""For rollout.generate of jobs that tests do something to: steps that last, without work for a processor."""

from __future__ import annotations

import time

from grpo_mega.rollout.turns import Draft, TurnClient


async def generate(sample: Draft, client: TurnClient) -> None:
    await _after(0.2, sample, client)


async def at_leisure(sample: Draft, client: TurnClient) -> None:
    """For a run without an end."""
    await _after(1.0, sample, client)


async def _after(seconds: float, sample: Draft, client: TurnClient) -> None:
    if sample.rollout_index == 0:
        time.sleep(seconds)  # of all samples: those of a batch are then asked for together, as ever
    await client.complete(sample)

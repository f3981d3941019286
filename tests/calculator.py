"""Functions for rollout.generate: the calculator of docs/rollouts.md, and one that every sample talks to."""

from __future__ import annotations

import re
from pathlib import Path

from grpo_mega.rollout.turns import Draft, TurnClient

_PAGE = (Path(__file__).parents[1] / "docs" / "rollouts.md").read_text()
_found = re.search(r"```python\n(.*?)```", _PAGE, re.DOTALL)
assert _found, "docs/rollouts.md shows a calculator"
exec(_found[1])  # defines `generate`


async def interrupt(sample: Draft, client: TurnClient) -> None:
    """Tells something after every two tokens."""
    while sample.room:
        turn = await client.complete(sample, max_tokens=2)
        if turn.finish == "end":
            return
        sample.tell("7;")


async def once(sample: Draft, client: TurnClient) -> None:
    await client.complete(sample)


async def silent(sample: Draft, client: TurnClient) -> None:
    sample.tell("7")


def not_async(sample: Draft, client: TurnClient) -> None: ...

"""What the rewards that run programs share: the program inside a response, and many of them at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from grpo_mega.reward.base import RewardResult
from grpo_mega.types import Prompt, Sample


@dataclass(frozen=True, slots=True)
class _Block:
    """A fenced part of a text: Example: _Block("python", "print(1)\\n")"""

    language: str
    text: str


def program_in(response: str, languages: Sequence[str], *, whole_text: bool = False) -> str | None:
    """The last fenced block in one of the languages, or else the last fenced block of any, or else, if
    allowed, all of the response. A block that the response's end cuts off counts. None: there is no
    program."""
    blocks = _fenced_blocks(response)
    candidates = [block for block in blocks if block.language in languages] or blocks
    if candidates:
        found = candidates[-1].text
    elif whole_text:
        found = response
    else:
        return None
    return found if found.strip() else None


def _fenced_blocks(response: str) -> list[_Block]:
    """Line by line, so that no response takes more than linear time."""
    blocks: list[_Block] = []
    fence = language = ""
    inside: list[str] = []
    for line in response.splitlines(keepends=True):
        bare = line.strip()
        marker = "`" if bare.startswith("`") else "~"
        length = len(bare) - len(bare.lstrip(marker))
        if not fence and length >= 3:
            fence, language, inside = marker * length, bare[length:].strip().casefold(), []
            language = language.split()[0] if language else ""
        elif fence and bare and not bare.strip(fence[0]) and len(bare) >= len(fence):
            blocks.append(_Block(language, "".join(inside)))
            fence = ""
        elif fence:
            inside.append(line)
    if fence:
        blocks.append(_Block(language, "".join(inside)))
    return blocks


def workers_here(wanted: int) -> int:
    """Programs at a time on this rank: `wanted`, or with 0 this rank's share of the cores it may use."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return wanted or max(1, len(os.sched_getaffinity(0)) // ranks)


def score_at_once(
    score: Callable[[Prompt, Sample], RewardResult], pairs: Sequence[tuple[Prompt, Sample]], workers: int
) -> list[RewardResult]:
    """In the order of the pairs. Threads are enough: they wait for other processes. The first error is
    raised."""
    if workers == 1 or len(pairs) < 2:
        return [score(*pair) for pair in pairs]
    with ThreadPoolExecutor(min(workers, len(pairs)), thread_name_prefix="reward") as pool:
        try:
            return list(pool.map(lambda pair: score(*pair), pairs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

"""Samples on their way: requests to servers that go on while the trainer computes."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from grpo_mega.rollout.client import ServersGone
from grpo_mega.rollout.turns import Draft
from grpo_mega.types import Group, Prompt, Sample

ValueT = TypeVar("ValueT")
AskAll = Callable[[Sequence[Draft], Callable[[Sample], None]], Coroutine[Any, Any, None]]


class LoopThread:
    """An event loop on a thread of its own. loop.run(coroutine) waits for its value."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, ValueT]) -> ValueT:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(eq=False)
class Pending:
    """Groups that servers are sampling: what was asked, what has come so far, who asks for the rest.

    pending.launch(loop, ask_all); pending.wait(); pending.groups(numbers)
    """

    prompts: tuple[Prompt, ...]
    group_size: int
    draft: Callable[[Prompt, int], Draft]  # a new one
    advance: Callable[[int], None] | None = None  # hears how many more groups are whole
    done: dict[str, Sample] = field(default_factory=dict[str, Sample], init=False)
    is_cancelled: bool = field(default=False, init=False)
    _versions: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]], init=False)
    _loop: LoopThread | None = field(default=None, init=False)
    _task: asyncio.Task[None] | None = field(default=None, init=False)

    @property
    def missing(self) -> list[Draft]:
        return [
            self.draft(prompt, index)
            for prompt in self.prompts
            for index in range(self.group_size)
            if f"{prompt.uid}/{index}" not in self.done
        ]

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    def launch(self, loop: LoopThread, ask_all: AskAll) -> None:
        """Ask for what is missing; returns at once."""
        self._loop, drafts = loop, self.missing
        self._task = loop.run(_started(ask_all(drafts, self._accepter(drafts))))

    def _accepter(self, drafts: Sequence[Draft]) -> Callable[[Sample], None]:
        by_uid = {draft.uid: draft for draft in drafts}
        left = Counter(draft.prompt.uid for draft in drafts)  # samples of a group still missing, by prompt

        def accept(sample: Sample) -> None:
            assert sample.uid not in self.done, f"{sample.uid} was sampled twice"
            self._versions[sample.uid] = by_uid[sample.uid].versions
            self.done[sample.uid] = sample
            prompt_uid = by_uid[sample.uid].prompt.uid
            left[prompt_uid] -= 1
            if self.advance and not left[prompt_uid]:
                self.advance(1)

        return accept

    def groups(self, numbers: Mapping[str, int]) -> list[Group]:
        """In the prompts' order; versions by their numbers."""
        return [
            Group(
                prompt,
                tuple(self._numbered(f"{prompt.uid}/{i}", numbers) for i in range(self.group_size)),
            )
            for prompt in self.prompts
        ]

    def _numbered(self, uid: str, numbers: Mapping[str, int]) -> Sample:
        return replace(self.done[uid], versions=tuple(numbers[v] for v in self._versions[uid]))

    def wait(self) -> str | None:
        """Until all is there. Trouble, when no server was left."""
        if self._task is None or self._loop is None:
            return None if not self.missing else "the requests were broken off"
        self._loop.run(_ended(self._task))
        if self._task.cancelled():
            return "the requests were broken off"
        error = self._task.exception()
        if isinstance(error, ServersGone):
            return str(error)
        if error is not None:
            raise error
        return None

    def forget(self, versions: Container[str]) -> bool:
        """Samples with tokens of other weights than these do not count; whether there were any."""
        strange = [uid for uid in self.done if any(v not in versions for v in self._versions[uid])]
        for uid in strange:
            del self.done[uid]
        return bool(strange)

    def break_off(self) -> None:
        """What has come stays."""
        if self._loop is not None and self._task is not None:
            self._loop.run(_cancelled(self._task))

    def cancel(self) -> None:
        """Nobody wants it any more; servers are told."""
        self.is_cancelled = True
        self.break_off()


async def _started(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(coroutine)


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})

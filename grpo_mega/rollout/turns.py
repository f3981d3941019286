"""Samples of several turns: a user's function decides what follows what the policy said.

    async def generate(sample: Draft, client: TurnClient) -> None

It lets the policy speak (`await client.complete(sample)`) and tells it what a tool or an environment answers
(`sample.tell(text)`), as often as it likes. Tokens that were told have no part in the loss.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from grpo_mega.errors import UserError
from grpo_mega.rollout.client import Ask, Completion
from grpo_mega.rollout.sampling import SamplingParams, sample_seed
from grpo_mega.types import Prompt, Sample

Answer = Callable[[Ask], Awaitable[Completion]]


@dataclass(frozen=True, slots=True)
class Turn:
    """What the policy said in one go.

    Example: Turn(text="12+30?", token_ids=(4, 5, 9, 6, 3, 30), finish="stop")
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Literal["end", "stop", "length"]
    """end: an end-of-sequence token, or one of rollout.stop; stop: one that was asked for; length: neither
    came in time."""


@dataclass(eq=False)
class Draft:
    """A sample in the making. `room` is what is left of rollout.max_new_tokens, which all turns and all that
    is told share."""

    prompt: Prompt
    uid: str
    rollout_index: int
    params: SamplingParams
    seed: int  # of the run
    tokenizer: Any
    turns: int = field(default=0, init=False)
    _ids: list[int] = field(default_factory=list[int], init=False)
    _logprobs: list[float] = field(default_factory=list[float], init=False)
    _chosen: list[bool] = field(default_factory=list[bool], init=False)
    versions: tuple[str, ...] = field(default=(), init=False)  # of the weights, for each token it said
    _cut: bool = field(default=False, init=False)  # what was said last had no end

    @property
    def room(self) -> int:
        return self.params.max_new_tokens - len(self._ids)

    @property
    def text(self) -> str:
        """All that followed the prompt, without an end-of-sequence token."""
        visible = self._ids[:-1] if self._has_ended else self._ids
        return str(self.tokenizer.decode(visible, skip_special_tokens=True))

    def tell(self, text: str) -> None:
        """What a tool or an environment says; cut where the room ends."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)[: self.room]
        self._add(ids, [0.0] * len(ids), chosen=False)

    def said(self, completion: Completion) -> None:
        self.turns += 1
        self.versions += completion.versions
        self._cut = completion.finish_reason == "length"
        self._add(completion.token_ids, completion.logprobs, chosen=True)

    def next_ask(self, stop_ids: frozenset[int], max_tokens: int) -> Ask:
        """The first turn has the random numbers of a sample of one turn."""
        name = f"{self.uid}~{self.turns}" if self.turns else self.uid
        stops = self.params.stop_ids | stop_ids
        params = replace(self.params, max_new_tokens=max_tokens, stop_ids=stops)
        ids = (*self.prompt.token_ids, *self._ids)
        return Ask(name, ids, params, sample_seed(self.seed, name))

    def sample(self) -> Sample:
        if not self.turns:
            raise UserError(
                f"sample {self.uid} is over before the policy said anything",
                where="rollout.generate",
                law="a sample has at least one token that the policy chose",
                remedy="await client.complete(sample) before returning",
            )
        return Sample(
            uid=self.uid,
            rollout_index=self.rollout_index,
            response_ids=tuple(self._ids),
            sampler_logprobs=tuple(self._logprobs),
            text=self.text,
            finish_reason="length" if self._is_truncated else "stop",
            chosen=None if all(self._chosen) else tuple(self._chosen),
        )

    @property
    def _is_truncated(self) -> bool:
        return (self._chosen[-1] and self._cut) or (not self.room and not self._has_ended)

    @property
    def _has_ended(self) -> bool:
        return bool(self._ids) and self._chosen[-1] and self._ids[-1] in self.params.stop_ids

    def _add(self, ids: Sequence[int], logprobs: Sequence[float], *, chosen: bool) -> None:
        self._ids += ids
        self._logprobs += logprobs
        self._chosen += [chosen] * len(ids)


@dataclass(frozen=True, slots=True)
class TurnClient:
    """turn = await client.complete(sample, stop=["?"])"""

    answer: Answer

    async def complete(
        self, sample: Draft, *, stop: Sequence[str] = (), max_tokens: int | None = None
    ) -> Turn:
        """The policy goes on with the sample, until it ends it, or says one of `stop` (each one token), or
        has said `max_tokens`, or no room is left."""
        stop_ids = frozenset(_token_of(text, sample.tokenizer) for text in stop)
        limit = sample.room if max_tokens is None else min(max_tokens, sample.room)
        if limit < 1:
            return Turn("", (), "length")
        completion = await self.answer(sample.next_ask(stop_ids, limit))
        sample.said(completion)
        ids = completion.token_ids
        ended = ids[-1] in sample.params.stop_ids
        text = sample.tokenizer.decode(list(ids[:-1] if ended else ids), skip_special_tokens=True)
        stopped = completion.finish_reason == "stop"
        return Turn(text, ids, "end" if ended else "stop" if stopped else "length")


Generate = Callable[[Draft, TurnClient], Awaitable[None]]


def load_generate(path: str) -> Generate:
    """The function that rollout.generate names; modules are looked for in the current directory too."""
    name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be imported: {error}",
            where="rollout.generate",
            law="module:function names a function that Python finds",
            remedy="install its package, or start where the module lies",
        ) from None
    if not inspect.iscoroutinefunction(function):
        raise UserError(
            f"{path} is no `async def`",
            where="rollout.generate",
            law="async def generate(sample, client) makes one sample while others are made beside it",
            remedy="write `async def`, and await client.complete(sample)",
        )
    return function


async def converse(
    function: Generate, drafts: Sequence[Draft], answer: Answer, accept: Callable[[Sample], None]
) -> None:
    """All of them side by side; `accept` hears of each that is over. One that fails ends the others."""

    async def one(draft: Draft) -> None:
        await function(draft, TurnClient(answer))
        accept(draft.sample())

    talks = [asyncio.create_task(one(draft)) for draft in drafts]
    try:
        await asyncio.gather(*talks)
    finally:
        for talk in talks:
            talk.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


@dataclass(eq=False)
class Rounds:
    """Answers of an engine that samples in batches: a batch is what all the samples that still talk wait for.
    Which samples share a batch then follows from what was said, and from no clock."""

    decode: Callable[[list[Ask]], list[Completion]]
    talking: int
    _waiting: list[tuple[Ask, asyncio.Future[Completion]]] = field(
        default_factory=list[tuple[Ask, asyncio.Future[Completion]]], init=False
    )

    async def answer(self, ask: Ask) -> Completion:
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((ask, future))
        self._decode_if_all_wait()
        return await future

    def over(self) -> None:
        self.talking -= 1
        self._decode_if_all_wait()

    def _decode_if_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self.talking:
            return
        waiting, self._waiting = sorted(self._waiting, key=lambda pair: pair[0].uid), []
        completions = self.decode([ask for ask, _ in waiting])
        for (_, future), completion in zip(waiting, completions, strict=True):
            future.set_result(completion)


def _token_of(text: str, tokenizer: Any) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(
            f"the stop string {text!r} is {len(ids)} tokens of this tokenizer",
            where="rollout.generate, client.complete(stop=...)",
            law="a stop string is exactly one token: generation stops at tokens",
            remedy="use a single token, such as a special token of the tokenizer",
        )
    return ids[0]

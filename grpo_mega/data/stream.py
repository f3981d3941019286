"""Which prompt comes when: a pure function of (seed, position), so resuming needs no saved state."""

from __future__ import annotations

import logging
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo_mega.data.problem import Problem, Source, Split, stable_hash
from grpo_mega.data.selection import SelectedSource
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import DataBlock
from grpo_mega.types import Prompt

log = logging.getLogger(__name__)

FILE_SOURCES = ("jsonl", "parquet")

FEISTEL_ROUNDS = 6
"""Four make a pseudo-random permutation of a large domain; small ones mix fewer bits a round."""

MIN_HALF_BITS = 3
"""Halves of fewer bits reach only a few of the permutations of a small source."""


class Permutation:
    """A bijection of range(size), chosen by the key and never written out.

    A Feistel network permutes the next power of four (at least 64); it is applied again while the value lies
    outside the range, which keeps it a bijection and takes fewer than four turns on average from size 16 on.
    """

    def __init__(self, size: int, *key: object):
        assert size >= 1, size
        self._size, self._key = size, key
        self._half_bits = max(MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1

    def __call__(self, position: int) -> int:
        assert 0 <= position < self._size, (position, self._size)
        value = self._network(position)
        while value >= self._size:
            value = self._network(value)
        return value

    def _network(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (stable_hash(*self._key, round_number, right) & self._mask)
        return left << self._half_bits | right


class PromptStream:
    """The prompts of one split, epoch after epoch, each epoch in its own order.

    uids: "train-17" in the first epoch, "train-17#2" in the second; "train-18@17" is problem 18 in the place
    of problem 17, which was too long. Of a selection, the numbers are those of the whole source.
    """

    def __init__(
        self, source: Source, tokenizer: PreTrainedTokenizerBase, data: DataBlock, seed: int, split: Split
    ):
        _check_template(tokenizer, data)
        # Any, because the methods used here are typed as taking and returning half of the library.
        self._tokenizer: Any = tokenizer
        self._source, self._data, self._seed, self._split = source, data, seed, split
        self._skips_long = data.source in FILE_SOURCES and data.on_bad_line == "skip"
        self._whole = source.whole if isinstance(source, SelectedSource) else source
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def prompts_for_step(self, step: int, count: int) -> tuple[Prompt, ...]:
        """Positions step * count to step * count + count - 1 of the endless stream."""
        return self.prompts_at(step * count, count)

    def prompts_at(self, first: int, count: int) -> tuple[Prompt, ...]:
        """Positions `first` to `first + count - 1` of the endless stream."""
        return tuple(self._prompt_at(position) for position in range(first, first + count))

    def prompt(self, index: int) -> Prompt:
        """Problem `index` as the first epoch names it."""
        return self._usable(index, epoch=1)

    def teacher_tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """The teacher's response and the end-of-sequence token: what a supervised stage learns."""
        if prompt.teacher_response is None:
            key = self._data.teacher_key
            raise UserError(
                f"prompt {prompt.uid} has no teacher response, which supervised stages learn from",
                where=self._whole.where(prompt.index),
                remedy=f"put one under {key!r} or set data.teacher_key, or remove the sft stage"
                if self._data.source in FILE_SOURCES
                else "remove the sft stage, or choose a task that has one",
            )
        response = self._tokenizer.encode(prompt.teacher_response, add_special_tokens=False)
        return (*response, self._tokenizer.eos_token_id)

    def _prompt_at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._source))
        index = place
        if self._data.shuffle:
            index = Permutation(len(self._source), "epoch", self._seed, self._split, epoch)(place)
        return self._usable(index, epoch=epoch + 1)

    def _usable(self, index: int, *, epoch: int) -> Prompt:
        """Problem `index`, or the next one that is short enough where long ones are skipped."""
        for ahead in range(len(self._source)):
            candidate = (index + ahead) % len(self._source)
            number = self._number(candidate)
            place = f"@{self._number(index)}" if ahead else ""
            uid = f"{self._split}-{number}{place}" + (f"#{epoch}" if epoch > 1 else "")
            problem = self._source.problem(candidate)
            token_ids = self._tokenize(problem, candidate)
            if len(token_ids) <= self._data.max_prompt_tokens:
                return Prompt(
                    uid=uid,
                    index=number,
                    text=problem.text,
                    token_ids=token_ids,
                    answer=problem.answer,
                    teacher_response=problem.teacher_response,
                    meta=problem.meta,
                )
            self._refuse(candidate, uid, len(token_ids))
        raise UserError(
            f"every {self._split} prompt is longer than {self._data.max_prompt_tokens} tokens",
            where="data.max_prompt_tokens",
            remedy="raise it, or give shorter prompts",
        )

    def _number(self, index: int) -> int:
        """Of the problem in the whole source: a selection does not rename its problems."""
        return self._source.whole_index(index) if isinstance(self._source, SelectedSource) else index

    def _refuse(self, index: int, uid: str, length: int) -> None:
        limit = self._data.max_prompt_tokens
        what = f"prompt {uid} has {length} tokens, more than data.max_prompt_tokens ({limit})"
        if not self._skips_long:
            raise UserError(
                what,
                where=self._source.where(index),
                remedy=f"raise data.max_prompt_tokens to {length} or shorten the prompt; "
                "for files, data.on_bad_line skip passes over it",
            )
        if index not in self._reported:
            self._reported.add(index)
            log.warning("%s skipped: %s", self._source.where(index), what)

    def _tokenize(self, problem: Problem, index: int) -> tuple[int, ...]:
        if self._data.template == "raw":
            return tuple(self._tokenizer(problem.text).input_ids)
        given: Any = problem.meta.get("messages") or ({"role": "user", "content": problem.text},)
        messages = list(given)
        # A conversation that brings its own system message keeps it: two would contradict each other.
        if self._data.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._data.system})
        # Straight to ids: tokenising the rendered text again would put a second BOS before it.
        render = self._tokenizer.apply_chat_template
        try:
            return tuple(render(messages, add_generation_prompt=True, return_dict=False))
        except TemplateError as error:
            raise UserError(
                f"the tokenizer's chat template refuses this conversation: {error}",
                where=self._source.where(index),
                law="some templates take no system message, or only user and assistant in alternation",
                remedy="change the messages, remove data.system, or set data.template to raw",
            ) from error


def _check_template(tokenizer: PreTrainedTokenizerBase, data: DataBlock) -> None:
    if data.template == "chat" and not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template",
            where="data.template",
            law="template chat renders prompts through the tokenizer's own template",
            remedy="set data.template to raw, or model.tokenizer to a tokenizer with a chat template",
        )
    if data.template == "raw" and data.system is not None:
        raise UserError(
            "a raw prompt has no place for a system message",
            where="data.system",
            remedy="set data.template to chat, or remove data.system",
        )

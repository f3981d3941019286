"""The embedded engine: a transformers model on every rank, fed by the same weight stream as any sampling
server.

# P prompts of a generation batch, N = P x group size rows, S prompt tokens after padding
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedTokenizerBase

from grpo_mega.rollout.client import Ask, Completion
from grpo_mega.rollout.sampling import SamplingParams, choose, uniforms
from grpo_mega.rollout.turns import Draft, Generate, Rounds, converse
from grpo_mega.types import Group, Prompt, Sample

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class LocalEngine:
    """Batched generation with a key-value cache.

    Prompts are generated in batches of a fixed size in a fixed order, whole batches going to ranks: what a
    batch computes, and so every sample to the last bit, does not depend on how many ranks there are.

    Example:
        engine.load(stream_hf(...))
        groups = engine.generate(prompts, group_size=8, params=params, seed=0)
    """

    def __init__(
        self,
        hf: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        device: torch.device,
        prompts_per_batch: int,
        function: Generate | None = None,
    ):
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(hf, dtype=dtype, attn_implementation="sdpa")
        self._model = model.eval().requires_grad_(False)
        self._tokenizer: Any = tokenizer
        self._device = device
        self._prompts_per_batch = prompts_per_batch
        self._function = function  # of samples of several turns
        self._places = dict(self._model.state_dict(keep_vars=True))
        self.updates = 0  # weights taken so far

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take new weights, by Hugging Face name."""
        for name, tensor in tensors:
            self._place(name).copy_(tensor)
        self.updates += 1

    def _place(self, name: str) -> torch.Tensor:
        """transformers keeps a layer's experts in one tensor in memory, though not on disk."""
        expert = _EXPERT.fullmatch(name)
        if name in self._places or not expert:
            return self._places[name]
        prefix, index, part = expert[1], int(expert[2]), expert[3]
        if part == "down":
            return self._places[f"{prefix}.down_proj"][index]
        gate, up = self._places[f"{prefix}.gate_up_proj"][index].chunk(2)
        return gate if part == "gate" else up

    def share(self, prompts: Sequence[Prompt], rank: int, ranks: int) -> list[tuple[int, Prompt]]:
        """The prompts this rank generates for, with their positions: whole batches, dealt in turn."""
        size = self._prompts_per_batch
        return [(place, p) for place, p in enumerate(prompts) if place // size % ranks == rank]

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        params: SamplingParams,
        seed: int,
        advance: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """A group for each prompt, in order. `prompts` is this rank's share; `advance` hears how many prompts
        are done."""
        groups: list[Group] = []
        for first in range(0, len(prompts), self._prompts_per_batch):
            batch = prompts[first : first + self._prompts_per_batch]
            generate = self._generate_batch if self._function is None else self._converse
            groups += generate(batch, group_size, params, seed)
            if advance:
                advance(len(batch))
        return groups

    def _converse(
        self, prompts: Sequence[Prompt], group_size: int, params: SamplingParams, seed: int
    ) -> list[Group]:
        """Turn after turn, all samples of the batch together; each turn reads its sample from the start."""
        assert self._function is not None
        drafts = [
            Draft(prompt, f"{prompt.uid}/{index}", index, params, seed, self._tokenizer)
            for prompt in prompts
            for index in range(group_size)
        ]
        rounds = Rounds(partial(self._answer, seed), len(drafts))
        done: dict[str, Sample] = {}

        def accept(sample: Sample) -> None:
            chosen = len(sample.response_ids) if sample.chosen is None else sum(sample.chosen)
            done[sample.uid] = replace(sample, versions=(self.updates,) * chosen)
            rounds.over()

        asyncio.run(converse(self._function, drafts, rounds.answer, accept))
        made = (done[draft.uid] for draft in drafts)
        return [Group(prompt, tuple(next(made) for _ in range(group_size))) for prompt in prompts]

    def _answer(self, seed: int, asks: list[Ask]) -> list[Completion]:
        """Asks with the same stop tokens share a batch, as long as the longest of them."""
        answers: dict[str, Completion] = {}
        for stop_ids in sorted({tuple(sorted(ask.params.stop_ids)) for ask in asks}):
            batch = [ask for ask in asks if tuple(sorted(ask.params.stop_ids)) == stop_ids]
            limits = [ask.params.max_new_tokens for ask in batch]
            params = replace(batch[0].params, max_new_tokens=max(limits))
            prompts = [Prompt(ask.uid, 0, "", ask.token_ids, "") for ask in batch]
            random = np.stack([uniforms(seed, ask.uid, params.max_new_tokens) for ask in batch])
            tokens, logprobs, lengths = self._decode(
                prompts, 1, params, torch.from_numpy(random).to(self._device)
            )
            for row, (ask, limit) in enumerate(zip(batch, limits, strict=True)):
                length = min(int(lengths[row]), limit)
                ids = tuple(tokens[row, :length].tolist())
                answers[ask.uid] = Completion(
                    uid=ask.uid,
                    token_ids=ids,
                    logprobs=tuple(logprobs[row, :length].tolist()),
                    finish_reason="stop" if ids[-1] in params.stop_ids else "length",
                    versions=(),
                    attempts=1,
                )
        return [answers[ask.uid] for ask in asks]

    def _generate_batch(
        self, prompts: Sequence[Prompt], group_size: int, params: SamplingParams, seed: int
    ) -> list[Group]:
        uids = [f"{prompt.uid}/{index}" for prompt in prompts for index in range(group_size)]
        random = np.stack([uniforms(seed, uid, params.max_new_tokens) for uid in uids])
        tokens, logprobs, lengths = self._decode(
            prompts, group_size, params, torch.from_numpy(random).to(self._device)
        )
        groups = []
        for place, prompt in enumerate(prompts):
            rows = range(place * group_size, (place + 1) * group_size)
            samples = (
                self._sample(
                    uids[row], index, tokens[row, : lengths[row]], logprobs[row, : lengths[row]], params
                )
                for index, row in enumerate(rows)
            )
            groups.append(Group(prompt, tuple(samples)))
        return groups

    def _sample(
        self, uid: str, index: int, tokens: np.ndarray, logprobs: np.ndarray, params: SamplingParams
    ) -> Sample:
        stopped = int(tokens[-1]) in params.stop_ids
        visible = tokens[:-1] if stopped else tokens
        return Sample(
            uid=uid,
            rollout_index=index,
            response_ids=tuple(tokens.tolist()),
            sampler_logprobs=tuple(logprobs.tolist()),
            text=self._tokenizer.decode(visible.tolist(), skip_special_tokens=True),
            finish_reason="stop" if stopped else "length",
            versions=(self.updates,) * len(tokens),
        )

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[Prompt], group_size: int, params: SamplingParams, random: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and log-probs [N, max_new_tokens] and the number of valid ones of each row."""
        logits_NV, cache, mask_NS, position_N = self._prefill(prompts, group_size)
        rows = torch.arange(len(position_N), device=self._device)  # the rows still generating
        tokens = torch.zeros(len(rows), params.max_new_tokens, dtype=torch.int64, device=self._device)
        logprobs = torch.zeros(len(rows), params.max_new_tokens, device=self._device)
        lengths = torch.full((len(rows),), params.max_new_tokens, device=self._device)
        stop_ids = torch.tensor(sorted(params.stop_ids), device=self._device)
        done_N = torch.zeros(len(rows), dtype=torch.bool, device=self._device)
        for step in range(params.max_new_tokens):
            token_N, logprob_N = choose(logits_NV, random[rows, step], params)
            tokens[rows, step], logprobs[rows, step] = token_N, logprob_N
            stops_N = torch.isin(token_N, stop_ids) & ~done_N
            lengths[rows[stops_N]] = step + 1
            done_N |= stops_N
            remaining = int((~done_N).sum())
            if remaining == 0 or step + 1 == params.max_new_tokens:
                break
            if remaining <= len(rows) // 2:  # finished rows cost as much as others: drop them now and then
                alive = (~done_N).nonzero()[:, 0]
                cache.batch_select_indices(alive)
                rows, token_N, position_N = rows[alive], token_N[alive], position_N[alive]
                mask_NS = mask_NS[alive] if mask_NS is not None else None
                done_N = done_N[alive]
            if mask_NS is not None:
                mask_NS = torch.cat([mask_NS, mask_NS.new_ones(len(rows), 1)], 1)
            logits_NV = self._forward(token_N[:, None], mask_NS, position_N[:, None], cache)
            position_N = position_N + 1
        return tokens.cpu().numpy(), logprobs.cpu().numpy(), lengths.cpu().numpy()

    def _prefill(
        self, prompts: Sequence[Prompt], group_size: int
    ) -> tuple[torch.Tensor, DynamicCache, torch.Tensor | None, torch.Tensor]:
        """Each prompt is read once; its cache rows are then repeated for the group. Prompts are padded on the
        left."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts], device=self._device)
        ids_PS = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_PS[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask_PS = torch.arange(longest, device=self._device)[None] >= (longest - lengths)[:, None]
        positions_PS = (mask_PS.cumsum(1) - 1).clamp(min=0)
        # without padding there is nothing to mask, and attention takes its fast causal path
        mask = mask_PS.to(torch.int64) if bool((lengths < longest).any()) else None
        cache = DynamicCache(config=self._model.config)
        logits_PV = self._forward(ids_PS.to(self._device), mask, positions_PS, cache)
        cache.batch_repeat_interleave(group_size)
        mask_NS = mask.repeat_interleave(group_size, 0) if mask is not None else None
        return (
            logits_PV.repeat_interleave(group_size, 0),
            cache,
            mask_NS,
            lengths.repeat_interleave(group_size),
        )

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

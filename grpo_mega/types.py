"""Every object that crosses a stage: frozen, slotted, with a worked example.

Shapes: T packed tokens of one micro-batch, B sequences of one micro-batch, L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, tokenised, with whatever its rewards need.

    Example: Prompt(uid="train-17", index=17, text="sort: 3 1 2 =", token_ids=(19, 7, ...), answer="1 2 3",
                    teacher_response="1 2 3", meta={"level": "basic"})
    """

    uid: str
    index: int  # position in the source, of a selection in the whole source
    text: str
    token_ids: tuple[int, ...]
    answer: str
    teacher_response: str | None = None  # the target of supervised stages
    meta: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout of one prompt, tokens as the sampler chose them (never re-tokenised).

    Example: Sample(uid="train-17/3", rollout_index=3, response_ids=(4, 5, 1),
                    sampler_logprobs=(-.1, -.2, -.01), text="12", finish_reason="stop")
    """

    uid: str  # prompt uid + "/" + rollout index
    rollout_index: int
    response_ids: tuple[int, ...]  # ends with the stop token, if there was one
    sampler_logprobs: tuple[float, ...]  # log-probability under the distribution that was sampled from
    text: str
    finish_reason: FinishReason
    chosen: tuple[bool, ...] | None = None  # which tokens the policy chose; None: all. The others, a tool's
    # or an environment's, have log-prob 0 and no part in the loss
    versions: tuple[int, ...] = ()
    """Of each token that the policy chose: how many updates of its weights the sampler had taken. Empty:
    those it has now."""


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one prompt in one step: the unit an advantage is computed over."""

    prompt: Prompt
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """What one sample earned: the weighted sum, each component unweighted, and the share of tests it passed.

    Example: Score(total=1.0, components={"exact": 1.0}, pass_rate=1.0)
    """

    total: float
    components: Mapping[str, float]
    pass_rate: float  # 0..1, from the first component that defines one; evaluation averages it
    passed_tests: int | None = None  # of the same component, where it counts tests
    total_tests: int | None = None


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group and what its samples earned.

    Example: ScoredGroup(position=17, group=Group(...), scores=(Score(1.0, {"exact": 1.0}, 1.0), ...))
    """

    position: int  # of its prompt in the stage's stream
    group: Group
    scores: tuple[Score, ...]  # in the samples' order


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """One sequence as the engine consumes it. `order` is its place in the step's global batch, the same on
    any layout.

    Example: TrainSequence(order=5, uid="train-17/3", token_ids=np.array([7, 8, 9, 1]), prompt_length=2,
                           sampler_logprobs=np.array([-.3, -.1], np.float32), advantage=.7)
    """

    order: int
    uid: str  # of its sample; "" only where whoever made the sequence had none
    token_ids: np.ndarray  # L, int64: prompt then response
    prompt_length: int
    sampler_logprobs: np.ndarray  # one per response token, float32; empty in supervised stages
    advantage: float = 0.0  # over its group
    reward: float = 0.0  # what its sample earned
    trained: np.ndarray | None = None  # one bool per response token; None: the loss looks at all of them

    @property
    def length(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def response_length(self) -> int:
        return self.length - self.prompt_length

    @property
    def trained_length(self) -> int:
        """Response tokens in the loss: what it is divided by."""
        return self.response_length if self.trained is None else int(self.trained.sum())


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: whole sequences laid end to end, then padding up to a length shared by the step.

    Per-token fields speak of the token AT that position: response_mask_T[t] and sampler_logprobs_T[t] belong
    to tokens_T[t]. The padding is one more sequence in `cu_seqlens`, so that attention kernels see every
    position.

    Example (two sequences of 3 and 2 tokens, padded to 8): cu_seqlens = [0, 3, 5, 8], num_sequences = 2
    """

    tokens_T: torch.Tensor  # int64
    targets_T: torch.Tensor  # int64: the next token of the same sequence; 0 where there is none
    positions_T: torch.Tensor  # int64: position inside the own sequence
    response_mask_T: torch.Tensor  # bool
    sampler_logprobs_T: torch.Tensor  # float32, 0 outside responses
    cu_seqlens: torch.Tensor  # int32, num_sequences + 1, plus one entry when there is padding
    advantages_B: torch.Tensor  # float32
    rewards_B: torch.Tensor  # float32
    num_sequences: int
    max_seqlen: int
    uids: tuple[str, ...]  # of the sequences
    advantages_T: torch.Tensor | None = None  # of each token, where a value model gives them
    reference_logprobs_T: torch.Tensor | None = None
    proximal_logprobs_T: torch.Tensor | None = None  # the trainer's own, under the weights that sampled
    segments_T: torch.Tensor | None = None  # int8: the part of its response each token belongs to


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step measured, already reduced over micro-batches and ranks. Names are documented in
    docs/metrics.md."""

    step: int
    stage: str
    metrics: Mapping[str, float]
    is_evaluation: bool = False  # of held-out problems, after the step

"""Structured credit: a response that thinks, marks and answers gives each of the three its share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from grpo_mega.algo.innovations._base import Credit, joined
from grpo_mega.algo.innovations.temporal_decay import log_scaled_decay

if TYPE_CHECKING:
    import torch

    from grpo_mega.algo.rows import TokenView
    from grpo_mega.algo.traces import MomentsByName
    from grpo_mega.monitor.metrics import Metric

UNPARSED, STRUCTURE, PROCESS, ANSWER = 0, 1, 2, 3
"""What `TokenView.segment_RW` holds; a response is unparsed as a whole, or not at all."""


class Sca(Credit):
    """A parsed response of L tokens has L credit: `process` of it for the tokens between the think markers
    (decaying inside by LSPD), `answer` for those between the answer markers, `structure` for all others,
    shared evenly. A share without tokens goes to the other two in proportion. Every token of an unparsed
    response has 1.

    Example: markers 2 + 2, one token of thought, one of answer, shares .5 / .2 / .3 -> L = 6: thought 3,
    each marker .3, answer 1.8
    """

    slot = "how credit is shaped along the sequence"
    tag = "SCA-GRPO"

    process: float = Field(default=0.5, ge=0)
    """Share of the tokens between the think markers."""
    structure: float = Field(default=0.2, ge=0)
    """Share of the markers themselves, and of tokens outside of both."""
    answer: float = Field(default=0.3, ge=0)
    """Share of the tokens between the answer markers."""
    alpha: float = Field(default=2.0, ge=0)
    """LSPD inside the process: its last token's weight is e^-alpha of its first's."""
    tau: float = Field(default=10.0, gt=0)
    """LSPD: tokens before the decay sets in."""
    markers: tuple[str, str, str, str] = ("<think>", "</think>", "<answer>", "</answer>")
    """Begin and end of the thought, begin and end of the answer: looked for in this order, the last match
    counts."""

    @field_validator("markers", mode="before")
    @classmethod
    def _as_yaml_has_it(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def shares_add_up_to_one(self) -> Sca:
        total = self.process + self.structure + self.answer
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"process + structure + answer must be 1: they are {total:g}")
        return self

    def weight(self, view: TokenView) -> torch.Tensor:
        if view.segment_RW is None:
            raise ValueError("sca needs segments_T: which part of its response each token belongs to")
        rows, segment_RW = view.rows, view.segment_RW
        dtype = view.trainer_RW.dtype
        parts = {
            PROCESS: (self.process, self._thought_shape(view)),
            STRUCTURE: (self.structure, (segment_RW == STRUCTURE).to(dtype)),
            ANSWER: (self.answer, (segment_RW == ANSWER).to(dtype)),
        }
        sums = {part: rows.sum(shape_RW) for part, (_, shape_RW) in parts.items()}
        present_B = sum(share * (sums[part] > 0).to(dtype) for part, (share, _) in parts.items())
        length_B = rows.length_B.to(dtype)
        weight_RW = (segment_RW == UNPARSED).to(dtype)
        for part, (share, shape_RW) in parts.items():
            credit_B = length_B * share / (present_B * sums[part]).clamp(min=1e-30)
            weight_RW = weight_RW + shape_RW * rows.spread(credit_B.where(sums[part] > 0, 0.0))
        self._trace(view)
        return weight_RW

    def _thought_shape(self, view: TokenView) -> torch.Tensor:
        """LSPD over the tokens of the thought, 0 elsewhere. They are contiguous: t counts from their
        first."""
        rows, dtype = view.rows, view.trainer_RW.dtype
        thought_RW = view.segment_RW == PROCESS
        first_B = -rows.max((-rows.position_RW.to(dtype)).where(thought_RW, -float("inf")))
        length_B = rows.sum(thought_RW.to(dtype))
        since_RW = rows.position_RW - rows.spread(first_B.where(length_B > 0, 0.0))
        shape_RW = log_scaled_decay(since_RW.clamp(min=0.0), rows.spread(length_B), self.alpha, self.tau)
        return shape_RW.where(thought_RW, 0.0)

    def _trace(self, view: TokenView) -> None:
        rows, traces, segment_RW = view.rows, view.traces, view.segment_RW
        for name, part in (("structure", STRUCTURE), ("process", PROCESS), ("answer", ANSWER)):
            traces.sequences(f"sca/{name}", rows.sum((segment_RW == part).to(view.trainer_RW.dtype)))
        parsed_B = rows.sum((segment_RW != UNPARSED).to(view.trainer_RW.dtype)) > 0
        traces.sequences("sca/parsed", parsed_B.float())
        traces.sequences("sca/positive", (rows.mean(view.advantage_RW.detach()) > 0).float())

    def metrics(self, moments: MomentsByName) -> dict[str, Metric]:
        return {
            "sca/parse_success_rate": moments["sca/parsed"].mean(),
            "sca/structure_tokens_mean": moments["sca/structure"].mean(),
            "sca/process_tokens_mean": moments["sca/process"].mean(),
            "sca/answer_tokens_mean": moments["sca/answer"].mean(),
            "sca/positive_reward_ratio": moments["sca/positive"].mean(),
        }

    def step_line(self, metrics: Mapping[str, float]) -> str | None:
        return joined(
            self.tag,
            "SCA",
            metrics,
            parse_success_rate="sca/parse_success_rate",
            process_tokens="sca/process_tokens_mean",
            answer_tokens="sca/answer_tokens_mean",
        )

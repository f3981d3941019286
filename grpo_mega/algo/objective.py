"""The policy loss on packed sequences: ratio -> credit -> objective -> aggregate, plus KL and entropy.

    l = trainer - behaviour;  r = clamp(exp(clamp(l)))       behaviour: the policy that sampled
    A. s = level(smoothing(r))                                ema, then one of token, amic, gspo
    B. w = credit weights, constants to the gradient          gradient_adaptive, temporal_decay or sca
    C. objective(s, A)                                        one of clip, cispo, gmpo, ptrw, asymmetric
    loss = sum_t weight_t (-w_t objective_t + kl_coef KL_t - entropy_coef H_t),  weight_t from `aggregate`

w multiplies the objective after the clip and leaves KL and entropy alone. Everything is per token until the
sum, whose denominators are global: parts add up to the loss of the update, however it is split.

# T packed tokens, R rows of W valid tokens, B sequences
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from grpo_mega.algo.aggregate import (
    Denominators,
    aggregation_weights,
    check_norm_length,
    local_denominators,
)
from grpo_mega.algo.correction import (
    correction_metrics,
    correction_weight,
    mismatch_metrics,
    trace_mismatch,
)
from grpo_mega.algo.fused import fused_policy_loss, supports
from grpo_mega.algo.innovations._base import Credit, Level, Objective, Smoothing
from grpo_mega.algo.inputs import LossInputs, row_inputs
from grpo_mega.algo.rows import Rows, TokenView, to_be_compiled
from grpo_mega.algo.traces import MomentsByName, Traces
from grpo_mega.kernels.implementation import Implementation, prepare_torch_compile
from grpo_mega.monitor import histogram
from grpo_mega.monitor.metrics import Metric, Metrics
from grpo_mega.recipe.blocks import LossBlock

LOG_RATIO_BOUND = 10.0  # exp(10) = 22,026: beyond it float32 ratios only carry noise
RATIO_BOUNDS = (1e-4, 1e4)
CLAMPED_BEYOND = min(LOG_RATIO_BOUND, math.log(RATIO_BOUNDS[1]))  # 9.21: the tighter of the two


Evaluated = tuple[torch.Tensor, torch.Tensor, dict[str, Metric]]
Evaluation = Callable[[Rows, dict[str, torch.Tensor], torch.Tensor], Evaluated]


@dataclass(frozen=True, slots=True)
class PolicyLossOutput:
    """`loss` is this micro-batch's part of the update's loss: its numerator over the global denominator."""

    loss: torch.Tensor
    metrics: Metrics
    per_token: torch.Tensor  # T, the loss before aggregation, detached; 0 at tokens that do not count


class PolicyLoss:
    """The loss a recipe's `loss:` block describes. A dictionary is validated like the block.

    Example: one response token, ratio 1.5, advantage 1, clip .2 -> objective 1.2, loss -1.2.
    """

    def __init__(
        self,
        config: LossBlock | Mapping[str, Any],
        *,
        default_norm_length: int | None = None,
        implementation: Implementation = "eager",
        reject_not_finite: bool = True,
    ):
        """`reject_not_finite` false: such a value makes the loss nan, and whoever applies the gradient must
        look."""
        self.config = config if isinstance(config, LossBlock) else LossBlock.model_validate(config)
        self.norm_length = self.config.norm_length or default_norm_length
        check_norm_length(self.config.aggregate, self.norm_length)
        self.innovations = self.config.innovations.picked()
        self.surrogate = self.config.surrogate
        self.not_in_triton = supports(self.config) if implementation == "triton" else None
        """The key of the recipe for whose sake a loss asked for in Triton is computed eagerly."""
        self.implementation: Implementation = "eager" if self.not_in_triton else implementation
        self.reject_not_finite = reject_not_finite
        self._evaluate = self._compiled() if self.implementation == "compiled" else self._composed

    def __call__(
        self,
        trainer_logprobs_T: torch.Tensor,
        sampler_logprobs_T: torch.Tensor,
        advantages: torch.Tensor,  # B, one for each sequence, or T
        cu_seqlens: torch.Tensor,
        reference_logprobs_T: torch.Tensor | None = None,
        entropy_T: torch.Tensor | None = None,
        sq_prob_T: torch.Tensor | None = None,  # read by gradient_adaptive with norm: logit
        response_mask_T: torch.Tensor | None = None,
        denominators: Denominators | None = None,
        proximal_logprobs_T: torch.Tensor | None = None,  # read by a correction: the trainer's as it sampled
        segments_T: torch.Tensor | None = None,  # read by sca
        uids: tuple[str, ...] | None = None,  # names of the sequences, for messages
    ) -> PolicyLossOutput:
        tokens = LossInputs(
            trainer_T=trainer_logprobs_T,
            sampler_T=sampler_logprobs_T,
            advantages=advantages,
            cu_seqlens=cu_seqlens,
            reference_T=reference_logprobs_T if self.config.kl.coef else None,
            entropy_T=entropy_T,
            sq_prob_T=sq_prob_T,
            response_mask_T=response_mask_T,
            proximal_T=proximal_logprobs_T if self.corrects else None,
            segments_T=segments_T,
            uids=uids,
        )
        if self.config.kl.coef and reference_logprobs_T is None:
            raise ValueError("kl.coef is above 0: the KL penalty needs reference_logprobs_T")
        if self.implementation == "triton" or self._in_native(trainer_logprobs_T):
            return PolicyLossOutput(*self._fused(tokens, denominators))
        rows, given = row_inputs(tokens, reject=self.reject_not_finite)
        counts = denominators or local_denominators(rows)
        dtype = given["trainer"].dtype
        counts_2 = torch.tensor(
            [max(counts.tokens, 1.0), max(counts.sequences, 1.0)], dtype=dtype, device=cu_seqlens.device
        )
        loss, per_token_RW, metrics = self._evaluate(rows, given, counts_2)
        return PolicyLossOutput(loss, metrics, rows.to_tokens(per_token_RW))

    def _in_native(self, trainer_logprobs_T: torch.Tensor) -> bool:
        """What is compiled for a CPU is C++ as a whole, where that knows the loss; float64 is composed."""
        if self.implementation != "compiled" or trainer_logprobs_T.dtype == torch.float64:
            return False
        return trainer_logprobs_T.device.type == "cpu" and supports(self.config) is None

    def _fused(
        self, tokens: LossInputs, denominators: Denominators | None
    ) -> tuple[torch.Tensor, dict[str, Metric], torch.Tensor]:
        loss, per_token_T, metrics = fused_policy_loss(
            self.config,
            tokens,
            self._metrics,
            norm_length=self.norm_length,
            denominators=denominators,
            reject=self.reject_not_finite,
            by_cpu=self.implementation == "compiled",
        )
        return loss, metrics, per_token_T

    def _compiled(self) -> Evaluation:
        """For any number of rows: only their width is compiled in, one of two."""
        # What was compiled is kept with the code object: each loss gets its own, or they would crowd each
        # other out.
        prepare_torch_compile()
        to_be_compiled()
        function = type(self)._composed
        own = FunctionType(function.__code__.replace(), function.__globals__)
        compiled = torch.compile(own, fullgraph=True)

        def evaluate(rows: Rows, given: dict[str, torch.Tensor], counts_2: torch.Tensor) -> Evaluated:
            for tensor in (*given.values(), *rows.tensors()):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            return compiled(self, rows, given, counts_2)

        return evaluate

    @property
    def corrects(self) -> bool:
        return self.config.correction.kind != "none"

    def derived(self, reduced: Mapping[str, float]) -> dict[str, float]:
        """The reduced metrics of an update and what follows from them."""
        result = dict(reduced)
        for innovation in self.innovations.values():
            result |= innovation.derived(result)
        if "actor/log_ratio_p99" in result:
            result["actor/ratio_p99"] = math.exp(result["actor/log_ratio_p99"])
        return result

    def startup_lines(self) -> list[str]:
        return [innovation.startup_line for innovation in self.innovations.values()]

    def step_lines(self, reduced: Mapping[str, float]) -> list[str]:
        """One of each innovation, from the metrics that `derived` returned."""
        lines = (innovation.step_line(reduced) for innovation in self.innovations.values())
        return [line for line in lines if line is not None]

    def _composed(self, rows: Rows, given: dict[str, torch.Tensor], counts_2: torch.Tensor) -> Evaluated:
        """Loss, per-token loss and metrics from inputs laid out in rows: the place to read the algorithm."""
        traces = Traces(rows.valid_RW, rows.length_B)
        trainer_RW, sampler_RW, advantage_RW = given["trainer"], given["sampler"], given["advantage"]
        view = TokenView(rows, traces, trainer_RW, advantage_RW, given.get("sq_prob"), given.get("segment"))
        proximal_RW = given.get("proximal", trainer_RW.detach())
        log_ratio_RW = trainer_RW - (proximal_RW if self.corrects else sampler_RW)
        ratio_RW = log_ratio_RW.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().clamp(*RATIO_BOUNDS)

        level_RW, weight_RW = self._ratio_and_credit(ratio_RW, view)
        objective = self.surrogate.objective(level_RW, view)
        if self.corrects:
            mismatch_RW = proximal_RW - sampler_RW
            weight_RW = weight_RW * correction_weight(self.config.correction, mismatch_RW, rows, traces)
        policy_RW = -weight_RW * objective.value_RW
        loss_RW = policy_RW + self._regularisers(trainer_RW, given, traces)

        loss_RW = loss_RW.where(rows.valid_RW, 0.0)
        share_R1 = aggregation_weights(self.config.aggregate, rows, counts_2, self.norm_length)
        loss = (share_R1 * loss_RW).sum()
        policy = (share_R1 * policy_RW.where(rows.valid_RW, 0.0)).sum()
        self._trace(view, ratio_RW, log_ratio_RW, objective, given)
        traces.tokens("final_ratio", level_RW, shift=1.0, spread=True)
        traces.tokens("final_weight", weight_RW, shift=1.0, spread=True)
        trace_mismatch(proximal_RW, sampler_RW, traces)
        # parts of one sum, so that the reported loss is the optimised one whatever `aggregate` is
        metrics = {"actor/loss": _part(loss), "actor/policy_loss": _part(policy)}
        metrics |= self._metrics(traces.moments())
        metrics |= _quantiles(log_ratio_RW.detach(), (proximal_RW - sampler_RW).detach(), rows, self.corrects)
        return loss, loss_RW.detach(), metrics

    def _ratio_and_credit(self, ratio_RW: torch.Tensor, view: TokenView) -> tuple[torch.Tensor, torch.Tensor]:
        """Module A, then module B."""
        picked = self.innovations.values()
        for innovation in picked:
            if isinstance(innovation, Smoothing):
                ratio_RW = innovation.smoothed(ratio_RW, view)
        for innovation in picked:
            if isinstance(innovation, Level):
                ratio_RW = innovation.at_level(ratio_RW, view)
        weight_RW = torch.ones_like(ratio_RW)
        for innovation in picked:
            if isinstance(innovation, Credit):
                credit_RW = innovation.weight(view).detach()
                if innovation.inside_ratio:
                    # where there is no token the ratio stays 1: its logarithm may be asked for
                    ratio_RW = (ratio_RW * credit_RW).where(view.rows.valid_RW, 1.0)
                else:
                    weight_RW = weight_RW * credit_RW
        return ratio_RW, weight_RW

    def _regularisers(
        self, trainer_RW: torch.Tensor, given: dict[str, torch.Tensor], traces: Traces
    ) -> torch.Tensor | float:
        added_RW: torch.Tensor | float = 0.0
        if "reference" in given:
            kl_RW = kl_penalty(trainer_RW, given["reference"], self.config.kl.estimator)
            traces.tokens("kl", kl_RW)
            added_RW = self.config.kl.coef * kl_RW
        if "entropy" in given and self.config.entropy_coef:
            added_RW = added_RW - self.config.entropy_coef * given["entropy"]
        return added_RW

    def _trace(
        self,
        view: TokenView,
        ratio_RW: torch.Tensor,
        log_ratio_RW: torch.Tensor,
        objective: Objective,
        given: dict[str, torch.Tensor],
    ) -> None:
        traces, distance_RW = view.traces, log_ratio_RW.detach().abs()
        traces.tokens("ratio", ratio_RW, shift=1.0, extremes=True)
        traces.tokens("log_ratio_abs", distance_RW, extremes=True)
        traces.tokens("clamped", (distance_RW > CLAMPED_BEYOND).float())
        traces.tokens("cut", objective.cut_RW.float())
        traces.tokens("lower", objective.lower_RW.float())
        traces.tokens("advantage", view.advantage_RW, spread=True)
        traces.tokens("logprob", view.trainer_RW)
        for name in ("reference", "entropy"):
            if name in given:
                traces.tokens(name, given[name])

    def _metrics(self, moments: MomentsByName) -> dict[str, Metric]:
        means = {
            "actor/mean_ratio": "ratio",
            "actor/log_ratio_abs_mean": "log_ratio_abs",
            "actor/log_ratio_clamped_fraction": "clamped",
            "actor/clip_fraction": "cut",
            "actor/clip_fraction_lower": "lower",
            "actor/mean_advantage": "advantage",
            "actor/mean_log_prob_current": "logprob",
            "actor/mean_log_prob_ref": "reference",
            "actor/kl_penalty": "kl",
            "actor/entropy": "entropy",
            "innovation/final_ratio_mean": "final_ratio",
            "innovation/final_weight_mean": "final_weight",
        }
        metrics = {
            **{metric: moments[name].mean() for metric, name in means.items() if name in moments},
            "actor/ratio_max": moments["ratio"].max(),
            "actor/ratio_min": moments["ratio"].min(),
            "actor/log_ratio_abs_max": moments["log_ratio_abs"].max(),
            "actor/std_advantage": moments["advantage"].std(),
            "innovation/final_ratio_std": moments["final_ratio"].std(),
            "innovation/final_weight_std": moments["final_weight"].std(),
            **mismatch_metrics(moments),
        }
        if self.corrects:
            metrics |= correction_metrics(moments)
        for innovation in self.innovations.values():
            metrics |= innovation.metrics(moments)
        return metrics


def _quantiles(
    log_ratio_RW: torch.Tensor, mismatch_RW: torch.Tensor, rows: Rows, corrects: bool
) -> dict[str, Metric]:
    """Without a correction the two log-ratios are one and the same: counted once."""
    tokens = rows.length_B.sum()
    ratio_counts = histogram.counts(log_ratio_RW, rows.valid_RW)
    mismatch_counts = histogram.counts(mismatch_RW, rows.valid_RW) if corrects else ratio_counts
    return {
        "actor/log_ratio_p99": Metric(ratio_counts, tokens, "p99"),
        "mismatch/abs_p99": Metric(mismatch_counts, tokens, "abs_p99"),
    }


def _part(total: torch.Tensor) -> Metric:
    return Metric(total.detach(), torch.ones_like(total.detach()), "sum")


def kl_penalty(
    trainer_logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: str
) -> torch.Tensor:
    """Estimators of KL(trainer || reference) from one sampled token; d = reference - trainer, clamped to
    +-10.

    k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d (never negative, low variance), abs = |d|
    """
    difference = (reference_logprobs - trainer_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "abs":
        return difference.abs()
    return torch.expm1(difference) - difference

"""The policy loss as slow, obvious loops in float64: what every fast implementation is measured against.

One function a rule, over the valid tokens of one sequence, t = 0 .. L - 1. A value that carries a gradient is
a 0-dim tensor, and autograd differentiates the loops; a constant to the gradient is a Python float.

# T packed tokens, B sequences, L valid tokens of one sequence
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch

from grpo_mega.algo.innovations._base import Innovation, Surrogate
from grpo_mega.algo.innovations.amic import Amic
from grpo_mega.algo.innovations.asymmetric import Asymmetric
from grpo_mega.algo.innovations.ema import Ema
from grpo_mega.algo.innovations.gradient_adaptive import GradientAdaptive
from grpo_mega.algo.innovations.gspo import Gspo
from grpo_mega.algo.innovations.ptrw import Ptrw
from grpo_mega.algo.innovations.sca import Sca
from grpo_mega.algo.innovations.temporal_decay import TemporalDecay
from grpo_mega.algo.objectives import CispoObjective, ClipObjective, GmpoObjective
from grpo_mega.recipe.blocks import CorrectionBlock, LossBlock

LOG_BOUND = 10.0  # of log-ratios, before exp
RATIO_BOUNDS = (1e-4, 1e4)
UNPARSED, STRUCTURE, PROCESS, ANSWER = range(4)  # what segments_T holds

Scalars = list[torch.Tensor]
Floats = list[float]
Picked = TypeVar("Picked", bound=Innovation)


class Counts(Protocol):
    """The denominators of the whole update."""

    @property
    def tokens(self) -> float: ...

    @property
    def sequences(self) -> float: ...


@dataclass(frozen=True, slots=True)
class ReferenceOutput:
    """In float64; 0 at tokens that do not count."""

    loss: float
    grad_trainer_T: torch.Tensor
    grad_entropy_T: torch.Tensor
    per_token_T: torch.Tensor  # the loss before aggregation
    ratio_T: torch.Tensor  # s, what the objective saw
    weight_T: torch.Tensor  # w, what the objective was multiplied by (a correction aside)


@dataclass(frozen=True, slots=True)
class _Sequence:
    """The valid tokens of one sequence, in their order; None: not given."""

    places_L: list[int]
    trainer_L: Scalars
    sampler_L: Floats
    proximal_L: Floats
    advantage_L: Floats
    reference_L: Floats | None
    entropy_L: Scalars | None
    sq_prob_L: Floats | None
    segment_L: Floats | None


def reference_policy_loss(
    loss: LossBlock,
    trainer_logprobs_T: torch.Tensor,
    sampler_logprobs_T: torch.Tensor,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    reference_logprobs_T: torch.Tensor | None = None,
    entropy_T: torch.Tensor | None = None,
    sq_prob_T: torch.Tensor | None = None,
    response_mask_T: torch.Tensor | None = None,
    denominators: Counts | None = None,
    proximal_logprobs_T: torch.Tensor | None = None,
    segments_T: torch.Tensor | None = None,
    norm_length: int | None = None,
) -> ReferenceOutput:
    """sum over sequences and tokens of share_i (-(w_t corr_t objective_t) + kl_coef KL_t - entropy_coef H_t).

    `advantages`: B (one for each sequence, padding left out or not) or T values. `proximal_logprobs_T`: the
    trainer's own under the weights that sampled, None = the trainer's now. `norm_length`: where the block has
    none.

    Example: one token, trainer ln 1.5, sampler 0, advantage 1 -> ratio 1.5, clipped to 1.2, loss -1.2.
    """
    trainer_T = trainer_logprobs_T.detach().double().clone().requires_grad_()
    entropy_leaf_T = None if entropy_T is None else entropy_T.detach().double().clone().requires_grad_()
    columns: dict[str, Any] = {
        "trainer_L": trainer_T.unbind(),
        "sampler_L": _floats(sampler_logprobs_T),
        "proximal_L": _floats(trainer_T if proximal_logprobs_T is None else proximal_logprobs_T),
        "advantage_L": _advantage_of_tokens(advantages, cu_seqlens, len(trainer_T)),
        "reference_L": _floats(reference_logprobs_T),
        "entropy_L": None if entropy_leaf_T is None else entropy_leaf_T.unbind(),
        "sq_prob_L": _floats(sq_prob_T),
        "segment_L": _floats(segments_T),
    }
    sequences = list(_sequences(columns, cu_seqlens, response_mask_T))
    tokens = denominators.tokens if denominators else sum(len(each.places_L) for each in sequences)
    counted = denominators.sequences if denominators else sum(bool(each.places_L) for each in sequences)
    per_token_T, ratio_T, weight_T = (torch.zeros_like(trainer_T, requires_grad=False) for _ in range(3))
    total = trainer_T.new_zeros(())
    for each in sequences:
        if not each.places_L:
            continue
        share = token_share(loss, len(each.places_L), max(tokens, 1.0), max(counted, 1.0), norm_length)
        ratio_L, weight_L = ratio_and_credit(loss, each)
        for t, value in enumerate(sequence_loss(loss, each, ratio_L, weight_L)):
            total = total + share * value
            place = each.places_L[t]
            per_token_T[place], ratio_T[place], weight_T[place] = value.item(), ratio_L[t].item(), weight_L[t]
    leaves = [trainer_T] if entropy_leaf_T is None else [trainer_T, entropy_leaf_T]
    found = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None, None]
    grads = [torch.zeros_like(trainer_T) if each is None else each for each in (*found, None)]
    return ReferenceOutput(total.item(), grads[0], grads[1], per_token_T, ratio_T, weight_T)


def _floats(values_T: torch.Tensor | None) -> Floats | None:
    return None if values_T is None else values_T.detach().double().tolist()


def _advantage_of_tokens(advantages: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int) -> Floats:
    """Each token's own, or its sequence's; padding comes last and may have none."""
    given, boundaries = advantages.double().tolist(), cu_seqlens.tolist()
    if len(given) == tokens != len(boundaries) - 1:
        return given
    advantage_T = [0.0] * tokens
    for (start, stop), value in zip(pairwise(boundaries), given, strict=False):
        advantage_T[start:stop] = [value] * (stop - start)
    return advantage_T


def _sequences(
    columns: dict[str, Any], cu_seqlens: torch.Tensor, mask_T: torch.Tensor | None
) -> Iterator[_Sequence]:
    """A token is valid inside the mask (None: everywhere) and inside a sequence."""
    for start, stop in pairwise(cu_seqlens.tolist()):
        at = [t for t in range(start, stop) if mask_T is None or bool(mask_T[t])]
        own: dict[str, Any] = {
            name: None if all_T is None else [all_T[t] for t in at] for name, all_T in columns.items()
        }
        yield _Sequence(places_L=at, **own)


def ratio_and_credit(loss: LossBlock, given: _Sequence) -> tuple[Scalars, Floats]:
    """s and w. A legacy weight is a factor of s, any other a factor of w."""
    behaviour_L = given.sampler_L if loss.correction.kind == "none" else given.proximal_L
    ratio_L = [guarded_ratio(a, b) for a, b in zip(given.trainer_L, behaviour_L, strict=True)]
    if ema := _picked(loss, Ema):
        ratio_L = smoothed(ratio_L, ema.beta)
    if _picked(loss, Amic):
        ratio_L = [mean(ratio_L)] * len(ratio_L)
    if gspo := _picked(loss, Gspo):
        ratio_L = geometric(ratio_L, of_sequence=gspo.level == "sequence")
    weight_L = [1.0] * len(ratio_L)
    for credit_L, inside_ratio in _credits(loss, given):
        if inside_ratio:
            ratio_L = [c * s for c, s in zip(credit_L, ratio_L, strict=True)]
        else:
            weight_L = _product(weight_L, credit_L)
    return ratio_L, weight_L


def _credits(loss: LossBlock, given: _Sequence) -> Iterator[tuple[Floats, bool]]:
    """The weights of each credit, and whether they belong inside the ratio."""
    if adaptive := _picked(loss, GradientAdaptive):
        yield adaptive_credit(adaptive, given), adaptive.legacy
    if decay := _picked(loss, TemporalDecay):
        yield decay_credit(decay, len(given.places_L)), decay.legacy
    if sca := _picked(loss, Sca):
        assert given.segment_L is not None, "sca reads segments_T"
        yield structured_credit(sca, given.segment_L), False


def sequence_loss(loss: LossBlock, given: _Sequence, ratio_L: Scalars, weight_L: Floats) -> Scalars:
    """-(w_t corr_t objective_t) + kl_coef KL_t - entropy_coef H_t."""
    objective_L = objective(loss.surrogate, ratio_L, given.advantage_L, given.trainer_L)
    delta_L = [a - b for a, b in zip(given.proximal_L, given.sampler_L, strict=True)]
    weight_L = _product(weight_L, correction(loss.correction, delta_L))
    loss_L = [-(w * value) for w, value in zip(weight_L, objective_L, strict=True)]
    if loss.kl.coef:
        assert given.reference_L is not None, "kl.coef reads reference_logprobs_T"
        for t, (own, other) in enumerate(zip(given.trainer_L, given.reference_L, strict=True)):
            loss_L[t] = loss_L[t] + loss.kl.coef * kl_penalty(loss.kl.estimator, own, other)
    if loss.entropy_coef:
        assert given.entropy_L is not None, "entropy_coef reads entropy_T"
        loss_L = [value - loss.entropy_coef * h for value, h in zip(loss_L, given.entropy_L, strict=True)]
    return loss_L


def _picked(loss: LossBlock, kind: type[Picked]) -> Picked | None:
    return next((each for each in loss.innovations.picked().values() if isinstance(each, kind)), None)


def _product(a_L: Floats, b_L: Floats) -> Floats:
    return [a * b for a, b in zip(a_L, b_L, strict=True)]


def mean(values_L: Scalars) -> torch.Tensor:
    """amic: s = mean_t w'_t."""
    return sum(values_L[1:], values_L[0]) / len(values_L)


def guarded_ratio(trainer: torch.Tensor, behaviour: float) -> torch.Tensor:
    """r = clamp(exp(clamp(l, -10, 10)), 1e-4, 1e4), l = trainer - behaviour; no gradient beyond a bound."""
    return torch.exp(torch.clamp(trainer - behaviour, -LOG_BOUND, LOG_BOUND)).clamp(*RATIO_BOUNDS)


def smoothed(ratio_L: Scalars, beta: float) -> Scalars:
    """w'_0 = w_0; w'_t = beta w_t + (1 - beta) w'_{t-1}."""
    smooth_L = ratio_L[:1]
    for ratio in ratio_L[1:]:
        smooth_L.append(beta * ratio + (1.0 - beta) * smooth_L[-1])
    return smooth_L


def geometric(ratio_L: Scalars, *, of_sequence: bool) -> Scalars:
    """s = exp(mean_t ln w'_t), or with each token's own gradient: sg[s] w'_t / sg[w'_t]."""
    whole = torch.exp(mean([torch.log(ratio) for ratio in ratio_L]))
    if of_sequence:
        return [whole] * len(ratio_L)
    return [whole.item() * ratio / ratio.item() for ratio in ratio_L]


def adaptive_credit(options: GradientAdaptive, given: _Sequence) -> Floats:
    """c_t = min(L exp(g_t / T) / sum_u exp(g_u / T), max_weight); L <= 1 gives 1.

    g = |logp|, or the norm of d(-logp)/d(logits), sqrt(1 - 2 p + sum p^2).
    """
    length = len(given.trainer_L)
    if length <= 1:
        return [1.0] * length
    logp_L = [value.item() for value in given.trainer_L]
    if options.norm == "logp":
        norm_L = [abs(logp) for logp in logp_L]
    else:
        assert given.sq_prob_L is not None, "norm: logit reads sq_prob_T"
        pairs = zip(logp_L, given.sq_prob_L, strict=True)
        norm_L = [math.sqrt(max(0.0, 1.0 - 2.0 * math.exp(logp) + square)) for logp, square in pairs]
    largest = max(norm_L)  # softmax does not change with a shift, and exp then cannot overflow
    exp_L = [math.exp((norm - largest) / options.temperature) for norm in norm_L]
    total = sum(exp_L)
    return [min(length * each / total, options.max_weight) for each in exp_L]


def lspd(length: int, alpha: float, tau: float) -> Floats:
    """d_t = exp(-alpha ln(1 + t/tau) / ln(1 + (L - 1)/tau)); L = 1 gives 1."""
    if length == 1:
        return [1.0]
    last = math.log(1.0 + (length - 1) / tau)
    return [math.exp(-alpha * math.log(1.0 + t / tau) / last) for t in range(length)]


def decay_credit(options: TemporalDecay, length: int) -> Floats:
    """d_t = gamma^t or LSPD; mean: L d / sum d, sum: d / sum d. legacy means sum unless the recipe says."""
    exponential_L = [options.gamma**t for t in range(length)]
    shape_L = exponential_L if options.mode == "exponential" else lspd(length, options.alpha, options.tau)
    normalize = options.normalize or ("sum" if options.legacy else "mean")
    if normalize == "none":
        return shape_L
    total = sum(shape_L)
    return [(length if normalize == "mean" else 1.0) * d / total for d in shape_L]


def structured_credit(options: Sca, segment_L: Floats) -> Floats:
    """Parsed: the credit L is shared among the parts that are there, evenly inside structure and answer, by
    LSPD inside process (t from the thought's first token). Unparsed: 1 everywhere."""
    if UNPARSED in segment_L:
        return [1.0] * len(segment_L)
    shares = {PROCESS: options.process, STRUCTURE: options.structure, ANSWER: options.answer}
    present = sum(share for part, share in shares.items() if part in segment_L) or 1.0  # 0: no credit at all
    weight_L = [0.0] * len(segment_L)
    for part in {int(segment) for segment in segment_L}:
        places = [t for t, segment in enumerate(segment_L) if segment == part]
        shape = lspd(len(places), options.alpha, options.tau) if part == PROCESS else [1.0] * len(places)
        credit = len(segment_L) * shares[part] / present
        total = sum(shape)
        for t, d in zip(places, shape, strict=True):
            weight_L[t] = credit * d / total
    return weight_L


def objective(surrogate: Surrogate, ratio_L: Scalars, advantage_L: Floats, trainer_L: Scalars) -> Scalars:
    """What is maximised at each token."""
    if isinstance(surrogate, GmpoObjective):
        return geometric_objective(surrogate, ratio_L, advantage_L)
    if isinstance(surrogate, Ptrw) and surrogate.legacy:
        ratio_L = [mean(ratio_L)] * len(ratio_L)
    values_L: Scalars = []
    for s, advantage, logp in zip(ratio_L, advantage_L, trainer_L, strict=True):
        match surrogate:
            case ClipObjective():
                value = pessimistic(s, advantage, surrogate.low, surrogate.high, surrogate.dual)
            case Asymmetric():
                value = asymmetric(surrogate, s, advantage)
            case Ptrw():
                value = trust_region(surrogate, s, advantage)
            case CispoObjective():  # sg[clip(s)] A log p
                value = max(surrogate.min_ratio, min(s.item(), surrogate.max_ratio)) * advantage * logp
            case _:
                raise NotImplementedError(type(surrogate).__name__)
        values_L.append(value)
    return values_L


def pessimistic(
    s: torch.Tensor, advantage: float, low: float, high: float, dual: float | None
) -> torch.Tensor:
    """min(A s, A clip(s, 1 - low, 1 + high)); for A < 0 at least dual A. At a tie A s has the gradient."""
    free, clipped = advantage * s, advantage * s.clamp(1.0 - low, 1.0 + high)
    value = clipped if clipped.item() < free.item() else free
    if dual is not None and advantage < 0 and value.item() < dual * advantage:
        return s.new_tensor(dual * advantage)
    return value


def asymmetric(options: Asymmetric, s: torch.Tensor, advantage: float) -> torch.Tensor:
    """The clip with its range by the sign of A; legacy: A clip(s) alone."""
    width = options.clip_pos if advantage > 0 else options.clip_neg
    if options.legacy:
        return advantage * s.clamp(1.0 - width, 1.0 + width)
    return pessimistic(s, advantage, width, width, options.dual)


def trust_region(options: Ptrw, s: torch.Tensor, advantage: float) -> torch.Tensor:
    """phi s A, phi = exp(-(s - 1)^2 / (2 sigma^2)), and 1 where A leads s back to 1 if that is to be kept.
    legacy: phi is differentiated and there is no exemption."""
    phi = torch.exp(-((s - 1.0) ** 2) / (2.0 * options.sigma**2))
    if options.legacy:
        return phi * s * advantage
    corrective = (advantage > 0 and s.item() < 1.0) or (advantage < 0 and s.item() > 1.0)
    if corrective and options.keep_corrective:
        return s * advantage
    return (phi.detach() if options.detach else phi) * s * advantage


def geometric_objective(options: GmpoObjective, ratio_L: Scalars, advantage_L: Floats) -> Scalars:
    """A_t exp(mean_u q_u); q = ln s, at most high where A > 0, at least -low where A < 0."""
    log_L: Scalars = []
    for s, advantage in zip(ratio_L, advantage_L, strict=True):
        log = torch.log(s)
        if advantage > 0:
            log = log.clamp(max=options.high)
        elif advantage < 0:
            log = log.clamp(min=-options.low)
        log_L.append(log)
    whole = torch.exp(mean(log_L))
    return [advantage * whole for advantage in advantage_L]


def correction(options: CorrectionBlock, delta_L: Floats) -> Floats:
    """tis: exp(min(x, ln cap)); mis: exp(x) for ln floor <= x <= ln cap, else 0. x = delta_t = proximal -
    sampler, or its sum over the sequence."""
    x_L = delta_L if options.level == "token" else [sum(delta_L)] * len(delta_L)
    highest = math.log(options.cap)
    lowest = math.log(options.floor) if options.floor else -math.inf
    if options.kind == "none":
        return [1.0] * len(x_L)
    if options.kind == "tis":
        return [math.exp(min(x, highest)) for x in x_L]
    return [math.exp(x) if lowest <= x <= highest else 0.0 for x in x_L]


def kl_penalty(estimator: str, trainer: torch.Tensor, reference: float) -> torch.Tensor:
    """k1 -d, k2 d^2 / 2, k3 e^d - 1 - d, abs |d|; d = clamp(reference - trainer, -10, 10)."""
    d = torch.clamp(reference - trainer, -LOG_BOUND, LOG_BOUND)
    return {"k1": -d, "k2": d**2 / 2.0, "k3": torch.exp(d) - 1.0 - d, "abs": d.abs()}[estimator]


def token_share(
    loss: LossBlock, length: int, tokens: float, sequences: float, norm_length: int | None
) -> float:
    """What a token's loss is multiplied by before all are summed."""
    match loss.aggregate:
        case "token-mean":
            return 1.0 / tokens
        case "seq-mean-token-sum":
            return 1.0 / sequences
        case "seq-mean-token-mean":
            return 1.0 / (sequences * length)
        case "seq-mean-token-sum-norm":
            constant = loss.norm_length or norm_length
            assert constant, "seq-mean-token-sum-norm divides by norm_length"
            return 1.0 / (sequences * constant)

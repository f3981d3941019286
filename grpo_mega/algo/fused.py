"""The policy loss by its kernels, Triton or C++, with the metrics of the composed one.

The kernels leave sums over programs; here they become the moments that PolicyLoss and the innovations make
their metrics from, under the names those use.

# T packed tokens, B sequences, R rows of W valid tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from grpo_mega.algo.aggregate import Denominators
from grpo_mega.algo.innovations.sca import Sca
from grpo_mega.algo.inputs import LossInputs, row_inputs
from grpo_mega.algo.rows import TokenView
from grpo_mega.algo.traces import Moments, MomentsByName, Traces
from grpo_mega.kernels.weighting import (
    TRACES,
    Weighted,
    WeightingInputs,
    WeightingOptions,
    supports,
    weighted_loss,
)
from grpo_mega.kernels.weighting_options import Switches
from grpo_mega.monitor import histogram
from grpo_mega.monitor.metrics import Metric
from grpo_mega.recipe.blocks import LossBlock

__all__ = ["fused_policy_loss", "supports"]


def fused_policy_loss(
    config: LossBlock,
    tokens: LossInputs,
    metrics_of: Callable[[MomentsByName], dict[str, Metric]],
    *,
    norm_length: int | None,
    denominators: Denominators | None,
    reject: bool,
    by_cpu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Metric]]:
    """Loss, per-token loss T and metrics of a loss that `supports` knows. `tokens.reference_T` is given iff
    the KL penalty is on.

    `denominators`: None: those of this micro-batch; `reject`: a value that is not finite is an error, and not
    only a loss that is nan; `by_cpu`: by C++ instead of Triton.
    """
    # C++ looks inside of sequences only
    valid_T = tokens.response_mask_T if by_cpu and denominators is not None else _valid(tokens)
    if denominators is None:
        assert valid_T is not None
        denominators = _counted(tokens.cu_seqlens, valid_T)
    inputs, elsewhere = _inputs(config, tokens, valid_T)
    options = WeightingOptions.of(config, norm_length)
    weighted = weighted_loss(
        inputs, options, tokens=denominators.tokens, sequences=denominators.sequences, by_cpu=by_cpu
    )
    moments = _moments(weighted, options.switches, inputs) | elsewhere
    # only then are the rows worth laying out that say which token it is
    if reject and bool(moments["not_finite"].total > 0):
        row_inputs(tokens, reject=True)
    one = moments["loss"].count.new_ones(())
    metrics = {
        "actor/loss": Metric(moments["loss"].total, one, "sum"),
        "actor/policy_loss": Metric(moments["policy"].total, one, "sum"),
        **metrics_of(MomentsByName(moments)),
        **_quantiles(inputs, valid_T, moments["ratio"].count, weighted.counts_2),
    }
    return weighted.loss, weighted.per_token_T, metrics


def _valid(tokens: LossInputs) -> torch.Tensor:
    """Tokens inside of a sequence that the mask does not leave out."""
    count = tokens.trainer_T.shape[0]
    place_T = torch.arange(count, device=tokens.cu_seqlens.device)
    inside_T = (place_T >= tokens.cu_seqlens[0]) & (place_T < tokens.cu_seqlens[-1])
    mask_T = tokens.response_mask_T
    return inside_T if mask_T is None else inside_T & mask_T.bool()


def _counted(cu_seqlens: torch.Tensor, valid_T: torch.Tensor) -> Denominators:
    before_T = torch.cat([valid_T.new_zeros(1, dtype=torch.int64), valid_T.cumsum(0)])
    length_B = before_T[cu_seqlens.long()].diff()
    tokens, sequences = torch.stack([length_B.sum(), (length_B > 0).sum()]).tolist()
    return Denominators(float(tokens), float(sequences))


def _inputs(
    config: LossBlock, tokens: LossInputs, valid_T: torch.Tensor | None
) -> tuple[WeightingInputs, dict[str, Moments]]:
    """And what was recorded where the weights were made that the kernels only take."""
    picked = config.innovations.picked()
    reads_sq_prob = getattr(picked.get("gradient_adaptive"), "norm", None) == "logit"
    if reads_sq_prob and tokens.sq_prob_T is None:
        raise ValueError(
            "gradient_adaptive with norm: logit needs sq_prob_T, the sum of squared probabilities"
        )
    sca = picked.get("sca")
    weight_T, recorded = _structured(sca, tokens) if isinstance(sca, Sca) else (None, {})
    proximal_T = None
    if config.correction.kind != "none":
        proximal_T = tokens.trainer_T.detach() if tokens.proximal_T is None else tokens.proximal_T
    inputs = WeightingInputs(
        trainer_T=tokens.trainer_T,
        entropy_T=tokens.entropy_T,
        sampler_T=tokens.sampler_T,
        advantages=tokens.advantages,
        cu_seqlens=tokens.cu_seqlens,
        valid_T=valid_T,
        reference_T=tokens.reference_T,
        proximal_T=proximal_T,
        sq_prob_T=tokens.sq_prob_T if reads_sq_prob else None,
        weight_T=weight_T,
    )
    return inputs, recorded


def _structured(sca: Sca, tokens: LossInputs) -> tuple[torch.Tensor, dict[str, Moments]]:
    """SCA finds its segments by sums over rows, which the composed code has: a few small operations."""
    rows, given = row_inputs(tokens, reject=False)
    traces = Traces(rows.valid_RW, rows.length_B)
    trainer_RW = given["trainer"].detach()
    view = TokenView(rows, traces, trainer_RW, given["advantage"], segment_RW=given.get("segment"))
    weight_T = rows.to_tokens(sca.weight(view))
    recorded = {name: moments for name, moments in traces.moments().items() if name.startswith("sca/")}
    return weight_T.float(), recorded


def _moments(weighted: Weighted, switches: Switches, inputs: WeightingInputs) -> dict[str, Moments]:
    length_B = weighted.by_sequence["length"]
    tokens = length_B.sum(dtype=torch.float64)
    moments: dict[str, Moments] = {}
    recorded = set(_recorded(switches, inputs))
    totals, squares = (column.unbind() for column in weighted.totals_N2.unbind(1))
    lowest, highest = weighted.lowest_N.unbind(), weighted.highest_N.unbind()
    for index, (name, form) in enumerate(TRACES.items()):
        if name in recorded:
            moments[name] = Moments(
                tokens,
                totals[index],
                float(form.shift),
                squares[index] if form.spread else None,
                lowest[index] if form.extremes else None,
                highest[index] if form.extremes else None,
            )
    if switches.smooth:
        moments["ema/raw"] = moments["ratio"]
    return moments | dict(_moments_of_sequences(weighted, switches))


def _recorded(switches: Switches, inputs: WeightingInputs) -> Iterator[str]:
    """What launch 2 wrote; all other columns hold whatever was in memory."""
    on = {
        "ema": switches.smooth,
        "gradient_adaptive": bool(switches.adaptive),
        "temporal_decay": bool(switches.decay),
        "ptrw": switches.objective in ("ptrw", "ptrw_legacy"),
        "asymmetric": switches.asymmetric,
        "correction": bool(switches.correction),
        "reference": bool(switches.kl),
        "kl": bool(switches.kl),
        "entropy": inputs.entropy_T is not None,
    }
    return (name for name in TRACES if on.get(name.partition("/")[0], True))


def _moments_of_sequences(weighted: Weighted, switches: Switches) -> Iterator[tuple[str, Moments]]:
    """Of numbers of a sequence, over those that have tokens."""
    of = weighted.by_sequence
    there_B = of["length"] > 0
    count = there_B.sum(dtype=torch.float64)

    def over(values_B: torch.Tensor, shift: float = 0.0) -> Moments:
        shifted_B = (values_B.double() - shift).where(there_B, 0.0)
        return Moments(count, shifted_B.sum(), shift, shifted_B.square().sum())

    yield "length", over(of["length"])
    if switches.level != "token":
        name = switches.level.partition("_")[0]
        yield f"{name}/sequence_weights", over(of["level"], shift=1.0)
        yield f"{name}/token_variance", over(of["token_variance"])
    if switches.decay:
        yield "temporal_decay/sum", over(of["decay_sum"])
        yield "temporal_decay/first", over(of["decay_scale"])  # its first token's weight is 1 times that
        yield "temporal_decay/last", over(of["decay_last"])


def _quantiles(
    inputs: WeightingInputs,
    valid_T: torch.Tensor | None,
    tokens: torch.Tensor,
    counts_2: torch.Tensor | None,
) -> dict[str, Metric]:
    """Without a correction the two log-ratios are one and the same: counted once."""
    corrects = inputs.proximal_T is not None
    if counts_2 is not None:
        ratio_counts, mismatch_counts = counts_2[0], counts_2[1 if corrects else 0]
    else:
        assert valid_T is not None
        trainer_T, sampler_T = inputs.trainer_T.detach().float(), inputs.sampler_T.float()
        proximal_T = sampler_T if inputs.proximal_T is None else inputs.proximal_T.float()
        ratio_counts = mismatch_counts = histogram.counts(trainer_T - proximal_T, valid_T)
        if corrects:
            mismatch_counts = histogram.counts(proximal_T - sampler_T, valid_T)
    return {
        "actor/log_ratio_p99": Metric(ratio_counts, tokens, "p99"),
        "mismatch/abs_p99": Metric(mismatch_counts, tokens, "abs_p99"),
    }

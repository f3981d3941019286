"""The whole policy loss on packed sequences, gradients included: on a GPU in at most three Triton launches,
on a CPU in one pass of C++ (grpo_mega.kernels.native).

The launches:

    1. a program for each sequence: its length, the EMA scan, the sums that levels, objectives and weights
       need
    2. a program for each block of tokens: the loss, its gradients, the sums that metrics are made of
    3. a program for each sequence: the EMA and what couples its tokens, backwards; only where there is such a
       thing

It computes what grpo_mega.algo.objective composes from torch operations, in float32 whatever the inputs'
format. Nothing is compacted: a masked token is the identity of every sum and of the scan.

# T packed tokens, B sequences, P programs of launch 2, N traces
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from grpo_mega.kernels import native
from grpo_mega.kernels.weighting_options import Switches, WeightingOptions, supports

__all__ = [
    "TRACES",
    "TraceForm",
    "Weighted",
    "WeightingInputs",
    "WeightingOptions",
    "supports",
    "weighted_loss",
]

SEQUENCE_BLOCK, SEQUENCE_WARPS = 1024, 8
"""Tokens that a program of launches 1 and 3 takes at a time: their scans join warps through shared memory."""
TOKEN_BLOCK, TOKEN_WARPS = 256, 1
"""Tokens of a program of launch 2: its many sums stay inside one warp."""

TABLE: tuple[str, ...] = (
    "length",  # valid tokens
    "level",  # the sequence's ratio
    "token_variance",  # of the tokens' own ratios
    "top",  # gradient_adaptive: largest exponent
    "share",  # gradient_adaptive: length / sum of exponentials
    "decay_scale",  # temporal_decay: what normalises its weights
    "decay_sum",
    "decay_last",
    "correction",
    "acted",  # 1 where the correction capped or masked
    "target",  # gmpo: geometric mean; ptrw of old: mean of the final ratios
    "credit_mean",  # of the weights inside the ratio
)
"""What launch 1 says of each sequence; rows of an option that is off are not written."""


@dataclass(frozen=True, slots=True)
class TraceForm:
    """Which sums of a quantity are kept: of x (x - 1 with `shift`: exact near 1), of its square, its
    extremes."""

    shift: bool = False
    spread: bool = False
    extremes: bool = False

    @property
    def code(self) -> int:
        return 4 * self.shift + 2 * self.spread + self.extremes


TRACES: Mapping[str, TraceForm] = {
    "loss": TraceForm(),
    "policy": TraceForm(),
    "not_finite": TraceForm(),
    "ratio": TraceForm(shift=True, spread=True, extremes=True),
    "log_ratio_abs": TraceForm(extremes=True),
    "clamped": TraceForm(),
    "cut": TraceForm(),
    "lower": TraceForm(),
    "advantage": TraceForm(spread=True),
    "logprob": TraceForm(),
    "final_ratio": TraceForm(shift=True, spread=True),
    "final_weight": TraceForm(shift=True, spread=True),
    "mismatch/abs": TraceForm(extremes=True),
    "mismatch/k3": TraceForm(),
    "mismatch/trainer": TraceForm(spread=True),
    "mismatch/sampler": TraceForm(spread=True),
    "mismatch/product": TraceForm(),
    "reference": TraceForm(),
    "kl": TraceForm(),
    "entropy": TraceForm(),
    "ema/smoothed": TraceForm(shift=True, spread=True, extremes=True),
    "ema/change": TraceForm(spread=True),
    "ema/relative_change": TraceForm(),
    "gradient_adaptive/norm": TraceForm(extremes=True),
    "gradient_adaptive/weight": TraceForm(shift=True, spread=True),
    "gradient_adaptive/capped": TraceForm(),
    "temporal_decay/weight": TraceForm(shift=True, spread=True, extremes=True),
    "ptrw/trust": TraceForm(shift=True, spread=True, extremes=True),
    "ptrw/corrective": TraceForm(),
    "ptrw/loss": TraceForm(),
    "asymmetric/positive": TraceForm(),
    "asymmetric/positive_cut": TraceForm(),
    "asymmetric/negative_cut": TraceForm(),
    "correction/weight": TraceForm(shift=True, spread=True),
    "correction/acted": TraceForm(),
}
"""What launch 2 sums up over tokens, in the order of its columns, four for each."""


def trace_codes() -> dict[str, int]:
    """Of each trace, place and form as one number that a kernel can be compiled with."""
    return {name: 8 * index + form.code for index, (name, form) in enumerate(TRACES.items())}


@dataclass(frozen=True, slots=True)
class WeightingInputs:
    """A packed micro-batch of any floating formats; only the first two have a gradient."""

    trainer_T: torch.Tensor
    entropy_T: torch.Tensor | None
    sampler_T: torch.Tensor
    advantages: torch.Tensor  # T, or one of each sequence; those that are missing at the end are 0
    cu_seqlens: torch.Tensor
    valid_T: torch.Tensor | None  # bool; None: every token inside a sequence
    reference_T: torch.Tensor | None = None  # given iff the KL penalty is on
    proximal_T: torch.Tensor | None = None  # given iff there is a correction
    sq_prob_T: torch.Tensor | None = None  # given iff gradient_adaptive reads it
    weight_T: torch.Tensor | None = None  # float32: credit weights that were made elsewhere

    @property
    def sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def token_advantages(self) -> bool:
        given = self.advantages.shape[0]
        of_tokens = given == self.trainer_T.shape[0] and given != self.sequences
        assert of_tokens or given <= self.sequences, (self.advantages.shape, self.sequences)
        return of_tokens


@dataclass(frozen=True, slots=True)
class Weighted:
    """`totals_N2`: sums and sums of squares by trace in float64; a trace whose option is off holds no
    number."""

    loss: torch.Tensor
    per_token_T: torch.Tensor
    totals_N2: torch.Tensor
    lowest_N: torch.Tensor
    highest_N: torch.Tensor
    by_sequence: Mapping[str, torch.Tensor]  # B each
    counts_2: torch.Tensor | None  # histograms of log-ratio and mismatch, where they were made on the way


def weighted_loss(
    inputs: WeightingInputs,
    options: WeightingOptions,
    *,
    tokens: float,
    sequences: float,
    by_cpu: bool = False,
) -> Weighted:
    """`tokens`, `sequences`: the denominators, of the whole update. `by_cpu`: by C++, for tensors on a CPU.

    A token with any input that is not finite makes the loss nan, and is counted in the trace `not_finite`.

    Example: one token, ratio 1.5, advantage 1, clip .2 -> loss -1.2
    """
    result: Any = _WeightedLoss.apply(
        inputs.trainer_T, inputs.entropy_T, inputs, options, options.scale(tokens, sequences), by_cpu
    )
    loss, per_token_T, totals_N2, lowest_N, highest_N, table_SB, counts_2 = result
    by_sequence = dict(zip(TABLE, table_SB.unbind(), strict=True))
    return Weighted(loss, per_token_T, totals_N2, lowest_N, highest_N, by_sequence, counts_2)


class _WeightedLoss(torch.autograd.Function):
    """The gradients are there when the loss is; going backwards only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        trainer_T: torch.Tensor,
        entropy_T: torch.Tensor | None,
        inputs: WeightingInputs,
        options: WeightingOptions,
        scale: float,
        by_cpu: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        differentiate_entropy = ctx.needs_input_grad[1] and bool(options.numbers.entropy_coef)
        if by_cpu:
            made = _by_cpu(inputs, options, scale, differentiate_entropy=differentiate_entropy)
            counts_2 = made.counts_2
        else:
            made = _Launches(inputs, options, scale, differentiate_entropy=differentiate_entropy)
            made.run()
            counts_2 = None
        ctx.save_for_backward(made.gradient_T, made.entropy_gradient_T)
        ctx.dtypes = trainer_T.dtype, None if entropy_T is None else entropy_T.dtype
        sums_PN4 = made.sums_PN4
        totals_N2 = sums_PN4[:, :, :2].sum(0)
        results = (
            made.loss_T,
            totals_N2,
            sums_PN4[:, :, 2].amin(0),
            sums_PN4[:, :, 3].amax(0),
            made.table_SB,
        )
        ctx.mark_non_differentiable(*results)
        return (totals_N2[list(TRACES).index("loss"), 0].float(), *results, counts_2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = [
            None if gradient_T is None or not needed else (gradient_T * grads[0]).to(dtype)
            for gradient_T, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True
            )
        ]
        return (*gradients, None, None, None, None)


def _by_cpu(
    inputs: WeightingInputs, options: WeightingOptions, scale: float, *, differentiate_entropy: bool
) -> native.Buffers:
    return native.run(
        options.switches,
        _pointers(inputs),
        {**asdict(options.numbers), "scale": scale},
        TABLE,
        trace_codes(),
        differentiate_entropy=differentiate_entropy,
        token_advantages=inputs.token_advantages,
    )


def _pointers(inputs: WeightingInputs) -> dict[str, torch.Tensor | None]:
    """All that is read of a token or a sequence, by the names that kernels have for it."""
    return {
        "trainer": inputs.trainer_T,
        "base": inputs.sampler_T if inputs.proximal_T is None else inputs.proximal_T,
        "sampler": inputs.sampler_T,
        "reference": inputs.reference_T,
        "entropy": inputs.entropy_T,
        "sq_prob": inputs.sq_prob_T,
        "weight": inputs.weight_T,
        "advantage": inputs.advantages,
        "valid": None if inputs.valid_T is None else inputs.valid_T.bool().view(torch.uint8),
        "cu_seqlens": inputs.cu_seqlens,
    }


class _Launches:
    """The buffers that the launches share, and the launches."""

    def __init__(
        self, inputs: WeightingInputs, options: WeightingOptions, scale: float, *, differentiate_entropy: bool
    ):
        self.inputs, self.options, self.scale = inputs, options, scale
        switches, tokens = options.switches, inputs.trainer_T.shape[0]
        self.programs = max(1, -(-tokens // TOKEN_BLOCK))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=inputs.trainer_T.device)

        def empty_if(used: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
            return empty(tokens, dtype=dtype) if used else None

        self.loss_T = empty(tokens)
        self.gradient_T = empty(tokens)
        self.entropy_gradient_T = empty_if(differentiate_entropy)
        self.table_SB = empty(len(TABLE), inputs.sequences)
        self.sums_PN4 = empty(self.programs, len(TRACES), 4, dtype=torch.float64)
        self.sequence_T = empty(tokens, dtype=torch.int32)
        self.first_B = empty(inputs.sequences, dtype=torch.int32)
        self.position_T = empty_if(bool(switches.decay), torch.int32)
        self.smoothed_T = empty_if(switches.smooth)
        self.pull_T = empty_if(switches.pulled)
        self.factor_T = empty_if(switches.coupled)

    def run(self) -> None:
        # triton is imported where it is used: machines without it have the other implementations
        from grpo_mega.kernels.weighting_triton import sequence_kernel
        from grpo_mega.kernels.weighting_triton_backward import backward_kernel
        from grpo_mega.kernels.weighting_triton_token import token_kernel

        arguments = self._arguments(self.options.switches)
        sequences = self.inputs.sequences
        if sequences:
            self._launch(sequence_kernel, sequences, arguments, SEQUENCE_BLOCK, SEQUENCE_WARPS)
        self._launch(token_kernel, self.programs, arguments, TOKEN_BLOCK, TOKEN_WARPS)
        if sequences and self.options.switches.pulled:
            self._launch(backward_kernel, sequences, arguments, SEQUENCE_BLOCK, SEQUENCE_WARPS)

    def _launch(
        self, kernel: Any, programs: int, arguments: Mapping[str, Any], block: int, warps: int
    ) -> None:
        own = {name: arguments[name] for name in kernel.arg_names if name != "BLOCK"}
        kernel[(programs,)](**own, BLOCK=block, num_warps=warps)

    def _arguments(self, switches: Switches) -> dict[str, Any]:
        """All there are, by the names that kernels have for them."""
        inputs, numbers = self.inputs, self.options.numbers
        pointers = {
            **_pointers(inputs),
            "sequence": self.sequence_T,
            "position": self.position_T,
            "smoothed": self.smoothed_T,
            "first": self.first_B,
            "table": self.table_SB,
            "loss": self.loss_T,
            "gradient": self.gradient_T,
            "entropy_gradient": self.entropy_gradient_T,
            "pull": self.pull_T,
            "factor": self.factor_T,
            "sums": self.sums_PN4,
        }
        return {
            **{
                f"{name}_ptr": None if value is None else value.detach().contiguous()
                for name, value in pointers.items()
            },
            **{name: getattr(numbers, name) for name in type(numbers).__dataclass_fields__},
            **switches.constants(),
            "tokens": inputs.trainer_T.shape[0],
            "sequences": inputs.sequences,
            "given": inputs.advantages.shape[0],
            "scale": self.scale,
            "DIRECT": bool(switches.kl) or switches.objective == "cispo",
            "TOKEN_ADVANTAGES": inputs.token_advantages,
        }

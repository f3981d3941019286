"""Which losses the kernels of the policy loss are compiled ahead of time for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_mega.kernels.aot import AotCase
from grpo_mega.kernels.weighting import SEQUENCE_BLOCK, SEQUENCE_WARPS, TOKEN_BLOCK, TOKEN_WARPS
from grpo_mega.kernels.weighting_options import WeightingOptions
from grpo_mega.kernels.weighting_triton import sequence_kernel
from grpo_mega.kernels.weighting_triton_backward import backward_kernel
from grpo_mega.kernels.weighting_triton_token import token_kernel
from grpo_mega.recipe.blocks import LossBlock

LOSSES: Mapping[str, dict[str, Any]] = {
    "clip": {},
    "ema, gradient_adaptive, temporal_decay, asymmetric, KL, entropy": {
        "innovations": {
            "ema": {},
            "gradient_adaptive": {"norm": "logit"},
            "temporal_decay": {"mode": "lspd"},
            "asymmetric": {},
        },
        "kl": {"coef": 0.1},
        "entropy_coef": 0.01,
    },
    "amic, gradient_adaptive, ptrw": {"innovations": {"amic": {}, "gradient_adaptive": {}, "ptrw": {}}},
    "gspo": {"innovations": {"gspo": {}}, "aggregate": "seq-mean-token-mean"},
    "gmpo": {"objective": {"gmpo": {}}},
    "cispo, tis by sequence, KL": {
        "objective": {"cispo": {}},
        "correction": {"kind": "tis", "level": "sequence"},
        "kl": {"coef": 0.1},
    },
    "all of old: ema, gspo, gradient_adaptive, temporal_decay, ptrw": {
        "innovations": {
            "ema": {},
            "gspo": {},
            "gradient_adaptive": {"norm": "logit", "legacy": True},
            "temporal_decay": {"legacy": True},
            "ptrw": {"legacy": True},
        },
        "kl": {"coef": 0.1},
        "correction": {"kind": "mis", "level": "sequence"},
    },
}
POINTERS = {"valid_ptr": "*u8", "cu_seqlens_ptr": "*i32", "sums_ptr": "*fp64"} | {
    f"{name}_ptr": "*i32" for name in ("sequence", "position", "first")
}
"""Those that are not of float32."""
COUNTS = ("tokens", "sequences", "given")


def _case(title: str, kernel: Any, options: WeightingOptions, block: int, warps: int) -> AotCase:
    switches = options.switches
    absent = {
        "reference_ptr": not switches.kl,
        "entropy_ptr": not options.numbers.entropy_coef,
        "entropy_gradient_ptr": not options.numbers.entropy_coef,
        "sq_prob_ptr": switches.adaptive != "logit",
        "weight_ptr": True,
        "position_ptr": not switches.decay,
        "smoothed_ptr": not switches.smooth,
        "pull_ptr": not switches.pulled,
        "factor_ptr": not switches.coupled,
    }
    constants = {
        "BLOCK": block,
        "TOKEN_ADVANTAGES": False,
        "DIRECT": bool(switches.kl) or switches.objective == "cispo",
        **switches.constants(),
    }
    names = kernel.arg_names
    held = {name: None for name in names if absent.get(name, False)}
    held |= {name: constants[name] for name in names if name.isupper()}
    signature = {
        name: POINTERS.get(name, "*fp32") if name.endswith("_ptr") else "i32" if name in COUNTS else "fp32"
        for name in names
        if name not in held
    }
    return AotCase(title, kernel, signature, held, warps)


def _cases_of(title: str, loss: dict[str, Any]) -> list[AotCase]:
    """One for each launch."""
    options = WeightingOptions.of(LossBlock.model_validate(loss), None)
    cases = [
        _case(title, sequence_kernel, options, SEQUENCE_BLOCK, SEQUENCE_WARPS),
        _case(title, token_kernel, options, TOKEN_BLOCK, TOKEN_WARPS),
    ]
    if options.switches.pulled:
        cases.append(_case(title, backward_kernel, options, SEQUENCE_BLOCK, SEQUENCE_WARPS))
    return cases


AOT_CASES = tuple(case for title, loss in LOSSES.items() for case in _cases_of(title, loss))

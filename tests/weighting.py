"""The policy loss by its kernels, asked the way PolicyLoss is, and held to what torch composes.

# T packed tokens
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch._inductor.codecache import CppCodeCache

from grpo_mega.algo import PolicyLoss
from grpo_mega.algo.aggregate import Denominators
from grpo_mega.algo.fused import fused_policy_loss
from grpo_mega.algo.inputs import LossInputs
from grpo_mega.monitor.metrics import reduce
from tests.strategies import NORM_LENGTH, Answer, Batch, Config


def _header(cls: type, device: str) -> str | None:
    """Each loss is a program of its own; torch's header, half of the compiler's time, is compiled once, but
    not for other processors than this one, for which there are few programs."""
    return None if "ATEN_CPU_CAPABILITY" in os.environ else "ATen/cpu/vec/vec.h"


if shutil.which("openssl"):  # which torch needs for it
    CppCodeCache._get_uncompiled_header = classmethod(_header)  # type: ignore[method-assign]

Asked = tuple[Answer, dict[str, float]]  # and the reduced metrics

COMBINATIONS: dict[str, Config] = {
    "conservative": {"innovations": {"ema": {}, "temporal_decay": {}}},
    "balanced": {"innovations": {"ema": {}, "gradient_adaptive": {}, "asymmetric": {}}},
    "aggressive": {"innovations": {"amic": {}, "gradient_adaptive": {}, "ptrw": {}}},
    "all": {"innovations": {"ema": {}, "gradient_adaptive": {}, "temporal_decay": {}, "asymmetric": {}}},
    "all of old": {
        "innovations": {
            "ema": {},
            "gradient_adaptive": {"legacy": True, "norm": "logit"},
            "temporal_decay": {"legacy": True},
            "asymmetric": {"legacy": True},
        },
        "kl": {"coef": 0.1},
    },
    "amic and ptrw of old, weights inside": {
        "innovations": {
            "ema": {"beta": 0.5},
            "amic": {},
            "gradient_adaptive": {"legacy": True},
            "temporal_decay": {"legacy": True, "normalize": "mean"},
            "ptrw": {"legacy": True},
        }
    },
    "gspo and ptrw of old, weights inside": {
        "innovations": {"gspo": {}, "gradient_adaptive": {"legacy": True}, "ptrw": {"legacy": True}}
    },
    "gspo by token and ptrw of old": {
        "innovations": {
            "gspo": {"level": "token"},
            "temporal_decay": {"legacy": True},
            "ptrw": {"legacy": True},
        }
    },
    "ptrw of old by token, weights inside": {
        "innovations": {"ema": {}, "temporal_decay": {"legacy": True}, "ptrw": {"legacy": True, "sigma": 1.0}}
    },
    "gmpo, weights inside": {
        "innovations": {
            "ema": {},
            "gradient_adaptive": {"legacy": True},
            "temporal_decay": {"legacy": True, "mode": "lspd"},
        },
        "objective": {"gmpo": {"low": 0.2}},
    },
    "cispo over ema": {
        "innovations": {"ema": {}},
        "objective": {"cispo": {"min_ratio": 0.5, "max_ratio": 2.0}},
        "kl": {"coef": 0.1, "estimator": "k1"},
    },
    "cispo over gspo": {"innovations": {"gspo": {}}, "objective": {"cispo": {}}},
    "ptrw, differentiated but where it corrects": {"innovations": {"ptrw": {"detach": False}}},
    "ptrw, exempting nothing": {"innovations": {"amic": {}, "ptrw": {"keep_corrective": False}}},
    "asymmetric without a dual bound": {"innovations": {"asymmetric": {"dual": None}}},
    "a cap below 1": {"innovations": {"gradient_adaptive": {"max_weight": 0.5}}},
    "lspd to the sum, sharp": {
        "innovations": {"temporal_decay": {"mode": "lspd", "normalize": "sum", "tau": 1e6, "alpha": 5.0}}
    },
    "no decay at all": {"innovations": {"temporal_decay": {"gamma": 1.0}}},
    "no smoothing at all": {"innovations": {"ema": {"beta": 1.0}}},
    "a floor": {"correction": {"kind": "mis", "floor": 0.9, "cap": 1.0}},
}

METRIC_FLOOR = 5e-6
"""Numbers near 1 are summed as x - 1 in float32: what is left of a mean or a spread near 0 is off by this."""


def on(batch: Batch, device: str) -> Batch:
    return replace(batch, **{field.name: getattr(batch, field.name).to(device) for field in fields(batch)})


def fused(batch: Batch, config: Config, **options: Any) -> Asked:
    loss = PolicyLoss(config, default_norm_length=NORM_LENGTH)
    trainer_T, entropy_T = _leaves(batch)
    tokens = LossInputs(
        trainer_T=trainer_T,
        sampler_T=batch.sampler_T,
        advantages=batch.advantages,
        cu_seqlens=batch.cu_seqlens,
        reference_T=batch.reference_T if loss.config.kl.coef else None,
        entropy_T=entropy_T,
        sq_prob_T=batch.sq_prob_T,
        response_mask_T=batch.mask_T,
        proximal_T=batch.proximal_T if loss.corrects else None,
        segments_T=batch.segments_T,
    )
    given: dict[str, Any] = {"denominators": None, "reject": True, **options}
    total, per_token_T, metrics = fused_policy_loss(
        loss.config, tokens, loss._metrics, norm_length=loss.norm_length, **given
    )
    return _answer(total, per_token_T, trainer_T, entropy_T), reduce(metrics)


def composed(batch: Batch, config: Config, denominators: Denominators | None = None) -> Asked:
    trainer_T, entropy_T = _leaves(batch)
    output = PolicyLoss(config, default_norm_length=NORM_LENGTH)(
        trainer_T,
        batch.sampler_T,
        batch.advantages,
        batch.cu_seqlens,
        entropy_T=entropy_T,
        denominators=denominators,
        **batch.options(),
    )
    return _answer(output.loss, output.per_token, trainer_T, entropy_T), reduce(output.metrics)


def _leaves(batch: Batch) -> list[torch.Tensor]:
    return [value_T.detach().clone().requires_grad_() for value_T in (batch.trainer_T, batch.entropy_T)]


def _answer(
    loss: torch.Tensor, per_token_T: torch.Tensor, trainer_T: torch.Tensor, entropy_T: torch.Tensor
) -> Answer:
    loss.backward()
    gradients = [
        torch.zeros_like(leaf_T) if leaf_T.grad is None else leaf_T.grad for leaf_T in (trainer_T, entropy_T)
    ]
    return Answer(loss.detach(), per_token_T, *gradients)


def assert_same_loss(
    found: Answer, expected: Answer, tolerance: float, gradients: float | None = None
) -> None:
    """To the largest entry. A loss is a sum of terms of either sign: they are its measure, too."""
    gradients = tolerance if gradients is None else gradients
    largest = float(expected.per_token_T.abs().max()) if expected.per_token_T.numel() else 0.0
    allowed = tolerance * max(abs(float(expected.loss)), largest)
    assert abs(float(found.loss) - float(expected.loss)) <= allowed
    for name, part in (
        ("per_token_T", tolerance),
        ("grad_trainer_T", gradients),
        ("grad_entropy_T", gradients),
    ):
        value_T, right_T = getattr(found, name).double(), getattr(expected, name).double()
        assert value_T.shape == right_T.shape
        if right_T.numel():
            error, scale = float((value_T - right_T).abs().max()), float(right_T.abs().max())
            assert error <= part * scale, f"{name}: off by {error} of {scale}"


def assert_same_metrics(found: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    wrong = {
        name: (found[name], value)
        for name, value in expected.items()
        if not _close(*_summed(name, found[name], value), tolerance)
    }
    assert not wrong


def _summed(name: str, *values: float) -> list[float]:
    """What was summed: of a standard deviation its square."""
    return [value * value if name.endswith("std") else value for value in values]


def _close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * abs(expected) + METRIC_FLOOR


def assert_agrees(
    batch: Batch,
    config: Config,
    tolerance: float,
    ask: Callable[..., Asked] = composed,
    asked: Callable[..., Asked] | None = None,
) -> None:
    """float32 or bfloat16 inputs; the gradients of the latter are rounded to their format."""
    (answer, metrics), (expected, right) = (asked or fused)(batch, config), ask(batch, config)
    gradients = 1e-2 if batch.trainer_T.dtype == torch.bfloat16 else tolerance
    assert_same_loss(answer, expected, tolerance, gradients)
    assert_same_metrics(metrics, right, tolerance)

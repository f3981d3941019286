"""What the kernels of the policy loss are told: compile-time switches and numbers, from a recipe's `loss:`
block.

No triton and no torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from grpo_mega.algo.innovations._base import Surrogate
from grpo_mega.algo.innovations.amic import Amic
from grpo_mega.algo.innovations.asymmetric import Asymmetric
from grpo_mega.algo.innovations.ema import Ema
from grpo_mega.algo.innovations.gradient_adaptive import GradientAdaptive
from grpo_mega.algo.innovations.gspo import Gspo
from grpo_mega.algo.innovations.ptrw import Ptrw
from grpo_mega.algo.innovations.sca import Sca
from grpo_mega.algo.innovations.temporal_decay import NEGLIGIBLE, TemporalDecay
from grpo_mega.algo.objectives import SMALLEST, CispoObjective, ClipObjective, GmpoObjective
from grpo_mega.recipe.blocks import LossBlock

LOG_RATIO_BOUND = 10.0
RATIO_BOUNDS = (1e-4, 1e4)
CLAMPED_BEYOND = min(LOG_RATIO_BOUND, math.log(RATIO_BOUNDS[1]))
SMALLEST_RATIO = SMALLEST
NEGLIGIBLE_EXPONENT = math.log(NEGLIGIBLE)

INNOVATIONS = (Ema, Amic, Gspo, GradientAdaptive, TemporalDecay, Sca, Ptrw, Asymmetric)
SURROGATES = (ClipObjective, CispoObjective, GmpoObjective, Ptrw, Asymmetric)


def supports(loss: LossBlock) -> str | None:
    """None: the kernels compute this loss; else the key in the recipe that they do not know.

    A class derived from a known one may compute anything: it counts as unknown.
    """
    for name, innovation in loss.innovations.picked().items():
        if type(innovation) not in INNOVATIONS:
            return f"loss.innovations.{name}"
    return None if type(loss.surrogate) in SURROGATES else "loss.objective"


@dataclass(frozen=True, slots=True)
class Switches:
    """Compiled in: what is off costs nothing."""

    smooth: bool = False
    level: str = "token"  # token, amic, gspo, gspo_token
    adaptive: str = ""  # logp, logit
    adaptive_inside: bool = False  # the weight multiplies the ratio
    decay: str = ""  # exponential, lspd
    decay_inside: bool = False
    normalize: str = "none"  # mean, sum, none
    objective: str = "clip"  # clip, clamp, cispo, gmpo, ptrw, ptrw_legacy
    asymmetric: bool = False
    dual: bool = False
    detach: bool = True
    keep_corrective: bool = False
    correction: str = ""  # tis, mis
    by_sequence: bool = False  # the correction's level
    kl: str = ""  # k1, k2, k3, abs
    per_length: bool = False  # a token counts for 1 / length of its sequence

    @property
    def inside(self) -> bool:
        return self.adaptive_inside or self.decay_inside

    @property
    def shared(self) -> bool:
        """The objective is one number of the sequence."""
        return self.objective in ("gmpo", "ptrw_legacy")

    @property
    def walks(self) -> bool:
        """Launch 1 needs the ratios, after what it needs of the weights."""
        return self.smooth or self.level != "token" or self.shared

    @property
    def coupled(self) -> bool:
        """A token's ratio reaches the loss of all others of its sequence."""
        return self.shared or (self.level in ("amic", "gspo") and self.objective != "cispo")

    @property
    def pulled(self) -> bool:
        """Launch 3 is needed."""
        return self.coupled or (self.smooth and self.objective != "cispo")

    def constants(self) -> dict[str, Any]:
        """Arguments of kernels."""
        derived = {name: getattr(self, name) for name in ("inside", "shared", "walks", "coupled", "pulled")}
        return {name.upper(): value for name, value in (asdict(self) | derived).items()}


@dataclass(frozen=True, slots=True)
class Numbers:
    """Arguments of kernels, under the same names there. What a recipe does not use keeps its value here, and
    is not read."""

    beta: float = 1.0
    keep: float = 0.0  # 1 - beta
    temperature: float = 1.0
    max_weight: float = 1.0
    log_gamma: float = 0.0
    alpha: float = 0.0
    tau: float = 1.0
    bottom_positive: float = 0.0  # range of the ratio where the advantage is above 0
    top_positive: float = 0.0
    bottom_negative: float = 0.0
    top_negative: float = 0.0
    dual_bound: float = 0.0
    two_variances: float = 1.0
    log_low: float = 0.0
    log_high: float = 0.0
    min_ratio: float = 0.0
    max_ratio: float = 0.0
    log_cap: float = 0.0
    log_floor: float = -math.inf
    kl_coef: float = 0.0
    entropy_coef: float = 0.0


@dataclass(frozen=True, slots=True)
class WeightingOptions:
    switches: Switches
    numbers: Numbers
    aggregate: str
    norm_length: int | None  # seq-mean-token-sum-norm

    @classmethod
    def of(cls, loss: LossBlock, norm_length: int | None) -> WeightingOptions:
        """`loss` is one that `supports` knows."""
        assert supports(loss) is None, supports(loss)
        switches: dict[str, Any] = {
            "kl": loss.kl.estimator if loss.kl.coef else "",
            "per_length": loss.aggregate == "seq-mean-token-mean",
        }
        numbers: dict[str, float] = {"kl_coef": loss.kl.coef, "entropy_coef": loss.entropy_coef}
        places = [*loss.innovations.picked().values(), loss.surrogate, loss.correction]
        for place in places:
            own_switches, own_numbers = _told(place)
            switches |= own_switches
            numbers |= own_numbers
        floats = {name: float(value) for name, value in numbers.items()}
        return cls(Switches(**switches), Numbers(**floats), loss.aggregate, norm_length)

    def scale(self, tokens: float, sequences: float) -> float:
        """What each token's loss is multiplied by, but for the length of its sequence."""
        if self.aggregate == "token-mean":
            return 1.0 / max(tokens, 1.0)
        if self.aggregate == "seq-mean-token-sum-norm":
            assert self.norm_length is not None
            return 1.0 / (max(sequences, 1.0) * self.norm_length)
        return 1.0 / max(sequences, 1.0)


Told = tuple[Mapping[str, Any], Mapping[str, float]]


def _told(place: Any) -> Told:
    """Switches and numbers of an innovation, an objective or a correction."""
    if isinstance(place, Surrogate):
        return _told_of_objective(place)
    if isinstance(place, Ema):
        return {"smooth": True}, {"beta": place.beta, "keep": 1.0 - place.beta}
    if isinstance(place, Amic):
        return {"level": "amic"}, {}
    if isinstance(place, Gspo):
        return {"level": "gspo" if place.level == "sequence" else "gspo_token"}, {}
    if isinstance(place, GradientAdaptive):
        switches = {"adaptive": place.norm, "adaptive_inside": place.legacy}
        return switches, {"temperature": place.temperature, "max_weight": place.max_weight}
    if isinstance(place, TemporalDecay):
        switches = {"decay": place.mode, "decay_inside": place.legacy, "normalize": place.normalization}
        return switches, {"log_gamma": math.log(place.gamma), "alpha": place.alpha, "tau": place.tau}
    if isinstance(place, Sca):
        return {}, {}  # its weights come as a tensor
    if place.kind == "none":
        return {}, {}
    log_floor = math.log(place.floor) if place.floor else -math.inf
    switches = {"correction": place.kind, "by_sequence": place.level == "sequence"}
    return switches, {"log_cap": math.log(place.cap), "log_floor": log_floor}


def _told_of_objective(surrogate: Surrogate) -> Told:
    if isinstance(surrogate, ClipObjective):
        return {"dual": surrogate.dual is not None}, {
            "bottom_positive": 1.0 - surrogate.low,
            "top_positive": 1.0 + surrogate.high,
            "bottom_negative": 1.0 - surrogate.low,
            "top_negative": 1.0 + surrogate.high,
            "dual_bound": surrogate.dual or 0.0,
        }
    if isinstance(surrogate, Asymmetric):
        objective = "clamp" if surrogate.legacy else "clip"
        dual = surrogate.dual is not None and not surrogate.legacy
        return {"objective": objective, "asymmetric": True, "dual": dual}, {
            "bottom_positive": 1.0 - surrogate.clip_pos,
            "top_positive": 1.0 + surrogate.clip_pos,
            "bottom_negative": 1.0 - surrogate.clip_neg,
            "top_negative": 1.0 + surrogate.clip_neg,
            "dual_bound": surrogate.dual or 0.0,
        }
    if isinstance(surrogate, CispoObjective):
        return {"objective": "cispo"}, {
            "min_ratio": surrogate.min_ratio,
            "max_ratio": surrogate.max_ratio,
        }
    if isinstance(surrogate, GmpoObjective):
        return {"objective": "gmpo"}, {"log_low": surrogate.low, "log_high": surrogate.high}
    assert isinstance(surrogate, Ptrw)
    return {
        "objective": "ptrw_legacy" if surrogate.legacy else "ptrw",
        "detach": surrogate.detach and not surrogate.legacy,
        "keep_corrective": surrogate.keep_corrective and not surrogate.legacy,
    }, {"two_variances": 2.0 * surrogate.sigma**2}

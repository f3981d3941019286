"""The whole policy loss on packed sequences on a CPU, as C++ that is built for one loss: sequence by
sequence, a vector of tokens at a time.

The C++ files beside this one hold the arithmetic; what is on or off, the numbers' names and the places of
sums are written here from the same tables that the Triton kernels read. torch's own builder compiles it, with
the flags of torch.compile, once for each loss on each machine.

# T packed tokens, B sequences, P programs, N traces
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from grpo_mega.kernels.implementation import prepare_torch_compile
from grpo_mega.kernels.weighting_options import (
    CLAMPED_BEYOND,
    LOG_RATIO_BOUND,
    NEGLIGIBLE_EXPONENT,
    RATIO_BOUNDS,
    SMALLEST_RATIO,
    Numbers,
    Switches,
)
from grpo_mega.monitor import histogram

TOKENS_OF_A_PROGRAM = 8192
"""Sequences that begin within so many tokens are one program's, and one thread's."""

FLOATS = (
    "trainer",
    "base",
    "sampler",
    "reference",
    "entropy",
    "sq_prob",
    "weight",
    "advantage",
    "table",
    "loss",
    "gradient",
    "entropy_gradient",
)
POINTERS = {
    **dict.fromkeys(FLOATS, "float"),
    "valid": "uint8_t",
    "cu_seqlens": "int64_t",
    "sums": "double",
    "counts": "int32_t",
}
INTEGERS = ("tokens", "sequences", "given", "programs", "threads")
NUMBERS = (*Numbers.__dataclass_fields__, "scale")

CONSTANTS: Mapping[str, float | int] = {
    "LOG_BOUND": LOG_RATIO_BOUND,
    "LOWEST_RATIO": RATIO_BOUNDS[0],
    "HIGHEST_RATIO": RATIO_BOUNDS[1],
    "SMALLEST_RATIO": SMALLEST_RATIO,
    "NEGLIGIBLE_EXPONENT": NEGLIGIBLE_EXPONENT,
    "CLAMPED_BEYOND": CLAMPED_BEYOND,
    "TOKENS_OF_A_PROGRAM": TOKENS_OF_A_PROGRAM,
    "BIN_SHIFT": histogram.SHIFT,
    "SMALLEST_BIN": histogram.SMALLEST,
    "BIN_SIDE": histogram.SIDE,
    "BINS": histogram.BINS,
}


class Arguments(ctypes.Structure):
    """What the C++ function is given; a pointer may be null."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in INTEGERS),
        *((name, ctypes.c_float) for name in NUMBERS),
    )


@dataclass(frozen=True, slots=True)
class Buffers:
    """What the loss leaves: see grpo_mega.kernels.weighting. `counts_2`: histograms of the log-ratio and of
    the mismatch."""

    loss_T: torch.Tensor
    gradient_T: torch.Tensor
    entropy_gradient_T: torch.Tensor | None
    table_SB: torch.Tensor
    sums_PN4: torch.Tensor
    counts_2: torch.Tensor


def run(
    switches: Switches,
    pointers: Mapping[str, torch.Tensor | None],
    numbers: Mapping[str, float],
    rows: tuple[str, ...],
    codes: Mapping[str, int],
    *,
    differentiate_entropy: bool,
    token_advantages: bool,
) -> Buffers:
    """`pointers`: the inputs by their names here, in any floating format."""
    trainer_T, cu_seqlens = pointers["trainer"], pointers["cu_seqlens"]
    assert trainer_T is not None and cu_seqlens is not None
    tokens, sequences = trainer_T.shape[0], cu_seqlens.shape[0] - 1
    programs = max(1, -(-tokens // TOKENS_OF_A_PROGRAM))
    made = Buffers(
        # tokens outside of every sequence are nobody's
        torch.zeros(tokens),
        torch.zeros(tokens),
        torch.zeros(tokens) if differentiate_entropy else None,
        torch.zeros(len(rows), sequences),
        torch.zeros(programs, len(codes), 4, dtype=torch.float64),
        torch.zeros(2, histogram.BINS, dtype=torch.int32),
    )
    given = {name: _as_read(name, value) for name, value in pointers.items()}
    given |= {
        "loss": made.loss_T,
        "gradient": made.gradient_T,
        "entropy_gradient": made.entropy_gradient_T,
        "table": made.table_SB,
        "sums": made.sums_PN4,
        "counts": made.counts_2,
    }
    advantages = given["advantage"]
    assert advantages is not None
    arguments = Arguments(
        **{name: None if value is None else value.data_ptr() for name, value in given.items()},
        **numbers,
        tokens=tokens,
        sequences=sequences,
        given=advantages.shape[0],
        programs=programs,
        threads=min(torch.get_num_threads(), programs),
    )
    function = _built(switches, token_advantages, rows, tuple(codes.items()))
    function(ctypes.byref(arguments))
    return made


def _as_read(name: str, value: torch.Tensor | None) -> torch.Tensor | None:
    if value is None:
        return None
    dtype = {"float": torch.float32, "uint8_t": torch.uint8, "int64_t": torch.int64}[POINTERS[name]]
    if value.dtype == torch.bool:
        value = value.view(torch.uint8)
    return value.detach().to(dtype).contiguous()


@cache
def _built(
    switches: Switches, token_advantages: bool, rows: tuple[str, ...], codes: tuple[tuple[str, int], ...]
) -> Any:
    # seconds of import, which a run without this kernel does not pay
    from torch._inductor.codecache import CppCodeCache

    prepare_torch_compile()
    source = "\n".join([prelude(switches, token_advantages, rows, dict(codes)), *_files()])
    function = CppCodeCache.load(source).policy_loss
    function.argtypes, function.restype = [ctypes.c_void_p], None
    return function


def _files() -> list[str]:
    """As one: the builder takes one source."""
    folder = Path(__file__).parent
    texts = [(folder / name).read_text() for name in ("lanes.h", "sequence.h", "weighting.cpp")]
    kept = ('#include "', "#pragma once")
    return ["\n".join(line for line in text.splitlines() if not line.startswith(kept)) for text in texts]


def prelude(
    switches: Switches, token_advantages: bool, rows: tuple[str, ...], codes: Mapping[str, int]
) -> str:
    """The constants of one loss, what its function is given, and where it leaves what."""
    constants = {**CONSTANTS, **switches.constants(), "TOKEN_ADVANTAGES": token_advantages}
    fields = [
        *(f"{kind}* {name};" for name, kind in POINTERS.items()),
        *(f"int64_t {name};" for name in INTEGERS),
        *(f"float {name};" for name in NUMBERS),
    ]
    places = [_constant(name, place) for place, name in enumerate(rows)]
    traces = [_constant(_plain(name), code) for name, code in codes.items()]
    return "\n".join(
        [
            "#include <cstdint>",
            "#include <string_view>",
            *(_constant(name, value) for name, value in constants.items()),
            f"struct Arguments {{ {' '.join(fields)} }};",
            f"namespace row {{ {' '.join(places)} }}",
            f"namespace trace {{ {' '.join(traces)} }}",
            f"constexpr int TRACE_COUNT = {len(codes)};",
        ]
    )


def _plain(name: str) -> str:
    return name.replace("/", "_")


def _constant(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, str):
        return f'constexpr std::string_view {name} = "{value}";'
    if isinstance(value, int):
        return f"constexpr int {name} = {value};"
    return f"constexpr float {name} = {value!r}f;"

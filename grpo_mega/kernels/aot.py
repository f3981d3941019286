"""What is compiled ahead of time to see a Triton kernel's registers and spills without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AotCase:
    """One kernel with one choice of its compile-time options. Each *_triton module lists its own in
    AOT_CASES."""

    title: str
    kernel: Any  # a triton.jit function
    signature: Mapping[str, str]  # argument -> Triton's type: *fp32, i32, ...
    constants: Mapping[str, Any]
    warps: int

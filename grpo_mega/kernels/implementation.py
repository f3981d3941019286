"""Which code computes the kernels, decided once for a run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Literal

from grpo_mega.errors import UserError

Implementation = Literal["eager", "compiled", "triton"]

COMPILING_PAYS_FROM = 16384
"""Vocabulary from which, on a CPU, saved seconds outweigh the minute that torch.compile takes at the
start."""


def choose(
    requested: Literal["auto", "eager", "compiled", "triton"], *, on_gpu: bool, vocab: int
) -> Implementation:
    """auto: triton on a GPU, where its package is there; on a CPU compiled for large vocabularies, where a
    compiler is there; else eager."""
    if requested == "auto":
        if on_gpu:
            return "triton" if triton_installed() else "eager"
        return "compiled" if vocab >= COMPILING_PAYS_FROM and has_compiler() else "eager"
    if requested == "triton" and not (triton_installed() and (on_gpu or interpreting())):
        raise UserError(
            "train.kernels is triton, which cannot be used here",
            where="train.kernels",
            law="Triton kernels need the triton package and a GPU (or TRITON_INTERPRET=1, which is slow)",
            remedy="set train.kernels: auto",
        )
    if requested == "compiled" and not (triton_installed() if on_gpu else has_compiler()):
        raise UserError(
            f"train.kernels is compiled, and there is no {'triton package' if on_gpu else 'C++ compiler'}",
            where="train.kernels",
            law="torch.compile builds Triton kernels for a GPU, and C++ for a CPU",
            remedy=f"install {'triton' if on_gpu else 'g++ or clang'}, or set train.kernels: eager",
        )
    return requested


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Triton's own switch: its kernels then run, slowly, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def suit_torch_compile() -> None:
    """Before the first torch.compile. Its cache does not tell processors apart: where one has other vectors
    (another node with the same home, or ATEN_CPU_CAPABILITY), gradients would be wrong. And it calls openssl
    for a header that it can do without."""
    import torch
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    vectors = torch.backends.cpu.get_cpu_capability().lower()
    folder = Path(cache_dir())
    if folder.name != vectors:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / vectors)
    if shutil.which("openssl") is None:
        config.cpp_cache_precompile_headers = False


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))

"""Which code computes the kernels, decided once for a run."""

from __future__ import annotations

import hashlib
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


def prepare_torch_compile() -> None:
    """Call it before torch compiles anything. It gives torch's cache a folder for this kind of processor, and
    lets torch compile where there is no openssl.

    torch's cache does not tell processors apart. In a cache that two of them share (nodes with one home, or
    ATEN_CPU_CAPABILITY set for some runs) one finds the other's code, and gradients are wrong. openssl is
    only used to check a header that is compiled beforehand, and that can be left out.
    """
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder, own = Path(cache_dir()), kind_of_processor()
    if folder.name != own:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / own)
    if shutil.which("openssl") is None:
        config.cpp_cache_precompile_headers = False


def kind_of_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What code compiled here may rely on: the vectors torch uses, and a hash of all the instructions the
    system lists.

    Example: "avx512-1f0c3a9e"
    """
    import torch

    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    listed = " ".join(sorted(instructions.partition(":")[2].split()))
    digest = hashlib.blake2b(listed.encode(), digest_size=4).hexdigest()
    return f"{torch.backends.cpu.get_cpu_capability().lower()}-{digest}"


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))

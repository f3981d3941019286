"""Which code computes the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config

from grpo_mega.errors import UserError
from grpo_mega.kernels import implementation
from grpo_mega.kernels.implementation import choose, kind_of_processor, prepare_torch_compile


@pytest.mark.parametrize(
    ("on_gpu", "vocab", "compiler", "expected"),
    [
        (False, 99, True, "eager"),
        (False, 151936, True, "compiled"),
        (False, 151936, False, "eager"),
        (True, 99, True, "triton"),
    ],
)
def test_auto(
    on_gpu: bool, vocab: int, compiler: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "has_compiler", lambda: compiler)
    monkeypatch.setattr(implementation, "triton_installed", lambda: True)
    assert choose("auto", on_gpu=on_gpu, vocab=vocab) == expected


def test_what_cannot_be_had_is_refused_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(implementation, "has_compiler", lambda: False)
    with pytest.raises(UserError, match=r"train\.kernels is triton"):
        choose("triton", on_gpu=False, vocab=10)
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        choose("compiled", on_gpu=False, vocab=10)


def test_triton_runs_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", on_gpu=False, vocab=10) == "triton"


def test_every_kind_of_processor_has_its_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set[str]()
    for kind in ("avx512-0", "avx2-0", "avx2-1"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(implementation, "kind_of_processor", lambda kind=kind: kind)
        for _ in range(2):  # by whoever compiles, and by processes that inherit the folder
            prepare_torch_compile()
            folders.add(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folders == {str(tmp_path / kind) for kind in ("avx512-0", "avx2-0", "avx2-1")}


def test_processors_differ_by_their_instructions(tmp_path: Path) -> None:
    """The same vectors are not enough: code is compiled for all that the processor has."""
    kinds = list[str]()
    for name, flags in (("one", "fpu avx2"), ("other", "fpu avx2 bmi2"), ("ordered", "avx2 fpu")):
        file = tmp_path / name
        file.write_text(f"model name\t: some\nflags\t\t: {flags}\n")
        kinds.append(kind_of_processor(file))
    assert kinds[0] != kinds[1] and kinds[0] == kinds[2]
    vectors = torch.backends.cpu.get_cpu_capability().lower()
    assert kind_of_processor(tmp_path / "missing").startswith(f"{vectors}-")


_CHECK = """
import torch
from grpo_mega.kernels.logprob_check import check_linear_logprob
check_linear_logprob("compiled", torch.device("cpu"), torch.float32)
"""


@pytest.mark.exhaustive  # each compiles: ten seconds
def test_one_cache_serves_vectors_of_every_width(tmp_path: Path) -> None:
    """The widest first: code without vectors is right everywhere. In processes of their own: torch asks for
    the width once."""
    for width in (torch.backends.cpu.get_cpu_capability().lower(), "avx2", "default"):
        own = {"ATEN_CPU_CAPABILITY": width, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", _CHECK], env=os.environ | own, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_openssl_is_not_needed_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with config.patch(cpp_cache_precompile_headers=True):
        prepare_torch_compile()
        assert not config.cpp_cache_precompile_headers

"""Which code computes the kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch._inductor import config

from grpo_mega.errors import UserError
from grpo_mega.kernels import implementation
from grpo_mega.kernels.implementation import choose, suit_torch_compile


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


def test_what_was_compiled_is_kept_by_the_width_of_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's cache gives a processor what was compiled for another one, and gradients are wrong."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for width in ("AVX512", "AVX2"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda width=width: width)
        for _ in range(2):  # by whoever compiles
            suit_torch_compile()
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / width.lower())


def test_openssl_is_not_needed_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with config.patch(cpp_cache_precompile_headers=True):
        suit_torch_compile()
        assert not config.cpp_cache_precompile_headers

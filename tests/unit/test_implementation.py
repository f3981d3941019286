"""Which code computes the kernels."""

from __future__ import annotations

import pytest

from grpo_mega.errors import UserError
from grpo_mega.kernels import implementation
from grpo_mega.kernels.implementation import choose


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

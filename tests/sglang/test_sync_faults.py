"""Weights that do not arrive: a server has another model, or a disk is full."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grpo_mega.errors import UserError
from grpo_mega.rollout.sglang import SglangEngine
from tests.sglang.conftest import Model, make_model
from tests.sglang.test_sampling_and_sync import greedy_of, greedy_of_trainer

pytestmark = pytest.mark.sglang

Engines = Callable[..., SglangEngine]


def test_another_model_than_the_trainers_is_noticed(external: Engines, model: Model, tmp_path: Path):
    """The server's has biases that the trainer's has not."""
    other = make_model("llama", tmp_path / "llama")
    engine = external(transport="tensor", retries=0)
    engine.model = other.facts
    with pytest.raises(UserError, match="did not get the new weights"):
        engine.load(other.first)
    with pytest.raises(UserError, match="proved"):
        greedy_of(engine)


@pytest.fixture
def file_size_limit() -> Iterator[Callable]:
    """What a full disk is to the one who writes: no more bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    yield limit


def test_a_full_disk_stops_a_sync_and_leaves_nothing(model: Model, external: Engines, file_size_limit):
    engine = external(transport="disk", retries=1)
    engine.load(model.first)
    version, size = engine.version, sum(tensor.nbytes for _, tensor in model.first)
    with file_size_limit(size // 2), pytest.raises(UserError, match="did not get the new weights") as caught:
        engine.load(model.second)
    assert "File too large" in str(caught.value)
    left = [folder.name for folder in (engine.run_dir / "servers").glob("weights-*")]
    assert left == [f"weights-{version}"]
    with pytest.raises(UserError, match="proved"):
        greedy_of(engine)
    engine.load(model.second)
    assert greedy_of(engine) == greedy_of_trainer(model, model.second)

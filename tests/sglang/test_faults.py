"""Servers that die, hang, refuse or are told nonsense: no sample is lost, doubled or from other weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from grpo_mega.errors import UserError
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.rollout.server import ServerPool
from grpo_mega.rollout.sglang import SglangEngine
from grpo_mega.sync.servers import ControlPlane
from grpo_mega.types import Group
from tests.fake_sglang import FakeServer
from tests.sglang.conftest import Model, Owner, members
from tests.sglang.test_sampling_and_sync import greedy_of, greedy_of_trainer, prompts

pytestmark = pytest.mark.sglang

LONG = SamplingParams(max_new_tokens=80)
Engines = Callable[..., SglangEngine]


def _all_there(groups: Sequence[Group], prompt_count: int, group_size: int) -> bool:
    uids = Counter(sample.uid for group in groups for sample in group.samples)
    return uids == Counter(f"train-{i}/{k}" for i in range(prompt_count) for k in range(group_size))


def _once(action: Callable[[], None]) -> Callable[[int], None]:
    done: list[int] = []

    def advance(count: int) -> None:
        if not done:
            action()
        done.append(count)

    return advance


@pytest.mark.parametrize("end", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.exhaustive)])
def test_a_server_that_stands_still_or_is_killed_is_replaced_and_costs_no_sample(
    owner: Owner, model: Model, end: signal.Signals
):
    engine = owner.engine
    engine.load(model.first)
    assert engine._client is not None
    pid, restarts, version = owner.pid, owner.pool.restarts, engine.version
    patience = engine._client.patience
    engine._client.patience = type(patience)(timeout_seconds=3, retries=3, unreachable_seconds=4)
    (server,) = psutil.Process(pid).children()
    stop = _once(lambda: os.killpg(pid, end) if end == signal.SIGSTOP else server.kill())
    groups = engine.generate(prompts(8), 8, LONG, seed=1, advance=stop)
    assert _all_there(groups, 8, 8)
    assert owner.pool.restarts == restarts + 1 and owner.pid != pid
    assert not psutil.pid_exists(pid)
    assert engine.version != version
    assert greedy_of(engine) == greedy_of_trainer(model, model.first)  # the new one has the weights


class _Proxy(FakeServer):
    """Passes everything on to a server, but answers 503 to some of it."""

    def __init__(self, target: str, refuses: Callable[[int], bool]):
        super().__init__()
        self._target = httpx.Client(base_url=target, timeout=60)
        self._refuses = refuses
        self.refused = self.passed = 0

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/generate":
            with self._lock:
                number = self.refused + self.passed
                refuse = self._refuses(number)
                self.refused += refuse
                self.passed += not refuse
            if refuse:
                return 503, "busy"
        reads = path in ("/health", "/model_info", "/server_info", "/openapi.json")
        answer = self._target.get(path) if reads else self._target.post(path, json=body)
        return answer.status_code, answer.text


def test_503_is_waited_out(owner: Owner, model: Model, external: Engines):
    proxy = _Proxy(owner.url, lambda number: number < 6 or number % 5 == 0)
    with proxy:
        engine = external(proxy.url, transport="tensor", retries=5, concurrency=4)
        engine.load(model.first)
        groups = engine.generate(prompts(8), 4, LONG, seed=2)
        assert _all_there(groups, 8, 4)
        assert engine.metrics["rollout/retried_requests"] == proxy.refused > 6
        assert proxy.passed == 32


def test_a_folder_that_the_server_cannot_see(model: Model, external: Engines, monkeypatch):
    """Refused with 400, tried again, given up with a message; nothing is sampled until a sync succeeds."""
    engine = external(transport="disk", retries=1)
    engine.load(model.first)
    version, paths = engine.version, list[str]()
    whole = ControlPlane.call

    def elsewhere(self: ControlPlane, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "update_weights_from_disk":
            body = body | {"model_path": "/nowhere/" + Path(body["model_path"]).name}
            paths.append(body["model_path"])
        return whole(self, url, path, body)

    monkeypatch.setattr(ControlPlane, "call", elsewhere)
    with pytest.raises(UserError, match="update_weights_from_disk: status 400") as caught:
        engine.load(model.second)
    assert len(set(paths)) == 2 and "disk" in str(caught.value.remedy)
    left = [folder.name for folder in (engine.run_dir / "servers").glob("weights-*")]
    assert left == [f"weights-{version}"]  # nothing of the failed attempts
    with pytest.raises(UserError, match="proved"):
        greedy_of(engine)
    monkeypatch.undo()
    engine.load(model.second)
    assert greedy_of(engine) == greedy_of_trainer(model, model.second)


def test_too_long_a_prompt_is_refused_with_a_remedy(owner: Owner, model: Model):
    owner.engine.load(model.first)
    with pytest.raises(UserError, match="refuses sample train-0/0") as caught:
        owner.engine.generate(prompts(1), 1, SamplingParams(max_new_tokens=500), 0)
    assert "context" in str(caught.value.remedy)


def test_a_server_dies_with_a_killed_trainer(sglang_python: str, owner: Owner, tmp_path: Path):
    """Its children too, even while it starts."""
    spec = owner.pool.spec
    code = (
        "import sys, time; from pathlib import Path; from grpo_mega.rollout.server import *;"
        f"spec = ServerSpec({sglang_python!r}, Path({str(spec.model)!r}), 'float32', Path({str(tmp_path)!r}),"
        "on_gpu=False); server = ManagedServer(spec, 0); server.start(); print(server.pid, flush=True);"
        "time.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    group = int(trainer.stdout.readline())
    deadline = time.monotonic() + 120
    while len(members(group)) < 3:  # the server has its scheduler
        assert time.monotonic() < deadline and trainer.poll() is None
        time.sleep(0.2)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while members(group):
        assert time.monotonic() < deadline, members(group)
        time.sleep(0.1)


def test_a_server_that_cannot_start_says_why(sglang_python: str, owner: Owner, tmp_path: Path):
    spec = replace(owner.pool.spec, folder=tmp_path, extra_args=("--no-such-flag",))
    with pytest.raises(UserError, match="no-such-flag") as caught:
        ServerPool(spec, count=1, max_restarts=0).start()
    assert str(tmp_path) in str(caught.value.where)

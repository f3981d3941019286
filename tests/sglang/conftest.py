"""One real SGLang server for all tests that do not need their own, and engines that sample from it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from grpo_mega.data.tokenizer import scratch_tokenizer
from grpo_mega.recipe.rollout_block import RolloutBlock, SglangBlock
from grpo_mega.rollout.managed import ModelFacts
from grpo_mega.rollout.server import PYTHON_VARIABLE, ServerPool
from grpo_mega.rollout.sglang import SglangEngine
from grpo_mega.sync.stream import HfDirectory
from tests import tiny
from tests.beside import Body, Outcome, running

INSTALLER = Path(__file__).parents[2] / "tools" / "install_sglang_cpu.sh"
INSTALL_SECONDS = 1200


@dataclass(frozen=True)
class Weights:
    """A model's tensors by Hugging Face name, all over again each time they are iterated."""

    tensors: dict[str, torch.Tensor]
    scale: float = 1.0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter([(name, tensor * self.scale) for name, tensor in self.tensors.items()])


@dataclass
class Model:
    directory: Path
    hf: PretrainedConfig
    facts: ModelFacts
    first: Weights
    second: Weights  # others, that give other samples


@dataclass
class Owner:
    """The engine that started the server, and the engines that a test sampled with besides."""

    engine: SglangEngine
    group: set[int] = field(default_factory=set[int])  # process groups of all servers so far

    @property
    def pool(self) -> ServerPool:
        assert self.engine.fleet.pool is not None
        return self.engine.fleet.pool

    @property
    def url(self) -> str:
        return self.pool.urls[0]

    @property
    def pid(self) -> int:
        pid = self.pool.servers[0].pid
        assert pid is not None
        self.group.add(pid)
        return pid


@pytest.fixture(scope="session")
def sglang_python() -> str:
    return installed_sglang()


def installed_sglang() -> str:
    """Its Python: of the environment variable's environment, else of one made here and kept."""
    if PYTHON_VARIABLE not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grpo-mega" / "sglang-cpu"
        home.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([INSTALLER, home], check=True, timeout=INSTALL_SECONDS)
        os.environ[PYTHON_VARIABLE] = str(home / "bin" / "python")
    return os.environ[PYTHON_VARIABLE]


@pytest.fixture(scope="session", autouse=True)
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """One after another, beside the tests of the shared server."""
    tmp_path_factory.getbasetemp()  # made here: two threads that ask first would get two

    def call(body: Body) -> None:
        body(installed_sglang(), tmp_path_factory.mktemp(body.__name__[:30]))

    with running(request.session.items, call, at_once=1) as outcome:
        yield outcome


def make_model(family: str, directory: Path) -> Model:
    tiny.save_model(family, directory)
    hf = AutoConfig.from_pretrained(directory)
    source = HfDirectory(directory)
    tensors = {name: source(name) for name in source.names}
    facts = ModelFacts(hf, scratch_tokenizer(), "float32", on_gpu=False)
    return Model(directory, hf, facts, Weights(tensors), Weights(tensors, 0.7))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model("qwen2", tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def owner(sglang_python: str, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    sglang = SglangBlock(timeout_seconds=60, retries=3, max_restarts=8, concurrency=16)
    block = RolloutBlock(engine="sglang", sglang=sglang)
    engine = SglangEngine(block, model.facts, tmp_path_factory.mktemp("managed"))
    owner = Owner(engine)
    try:
        engine.load(model.first)
        assert owner.pid
        yield owner
        assert owner.pid
    finally:
        engine.close()
    left = [process for group in owner.group for process in members(group)]
    assert not left, f"these outlived their server: {left}"


def members(group: int) -> list[psutil.Process]:
    """The processes of a process group that still live."""
    return [p for p in psutil.process_iter() if _group_of(p) == group and p.status() != psutil.STATUS_ZOMBIE]


def processes_about(run_dir: Path) -> list[psutil.Process]:
    """Those that were told of this folder: a run's ranks, servers and guards."""
    processes = psutil.process_iter(["cmdline"])
    return [process for process in processes if str(run_dir) in " ".join(process.info["cmdline"] or [])]


def assert_all_gone(run_dir: Path) -> None:
    deadline = time.monotonic() + 15
    while left := processes_about(run_dir):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def _group_of(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


@pytest.fixture
def external(owner: Owner, model: Model, tmp_path: Path) -> Iterator[Callable[..., SglangEngine]]:
    """external(url=..., transport=...) is an engine of a server that somebody else started."""
    engines: list[SglangEngine] = []

    def make(url: str | None = None, staleness: int = 0, **options: object) -> SglangEngine:
        sglang = {"mode": "external", "urls": (url or owner.url,), "retries": 2, "timeout_seconds": 30}
        given = {"engine": "sglang", "max_staleness": staleness, "sglang": sglang | options}
        block = RolloutBlock.model_validate(given)
        engines.append(SglangEngine(block, model.facts, tmp_path / str(len(engines))))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()

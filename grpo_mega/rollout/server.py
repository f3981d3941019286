"""SGLang servers that belong to a run: started, watched, restarted, and gone when it is."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from grpo_mega.errors import UserError
from grpo_mega.ports import LOOPBACK, free_port
from grpo_mega.recipe.rollout_block import SglangBlock
from grpo_mega.rollout.guarded import STOP_SECONDS, GuardedProcess, outside_environment

PYTHON_VARIABLE = "GRPO_MEGA_SGLANG_PYTHON"
"""Environment: the Python of the virtual environment that holds sglang."""

HEALTH_SECONDS = 10.0
ANY_ADDRESS = "0.0.0.0"

_CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1"}
# Plain torch everywhere. Deterministic inference, and with it seeds, wants attention kernels that need a GPU.
_CPU_FLAGS = (
    "--sleep-on-idle",  # else a server that waits takes a whole core from the trainer
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch"),
    *("--cuda-graph-backend-decode", "disabled"),
    *("--cuda-graph-backend-prefill", "disabled"),
    *("--mem-fraction-static", "0.1"),
    *("--max-total-tokens", "65536"),
)


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """How to start a server. It starts with random weights: the first sync brings the real ones.

    Example: ServerSpec(python="/venv/bin/python", model=Path("run/servers/model"), dtype="float32",
                        folder=Path("run/servers"), on_gpu=False)
    """

    python: str
    model: Path  # config.json of the model
    dtype: str
    folder: Path  # logs
    on_gpu: bool
    host: str = LOOPBACK  # the address that it listens at
    tp: int = 1
    saves_memory: bool = False  # can give it back
    cpu_threads: int = 1
    seed: int = 0
    startup_seconds: float = 300.0
    extra_args: tuple[str, ...] = ()

    def command(self, port: int, index: int) -> list[str]:
        return [
            *(self.python, "-m", "sglang.launch_server"),
            *("--model-path", str(self.model.resolve())),
            *("--load-format", "dummy"),
            *("--dtype", self.dtype),
            *("--host", self.host, "--port", str(port)),
            *("--tp-size", str(self.tp)),
            *(("--base-gpu-id", str(index * self.tp)) if self.on_gpu else ()),
            *("--random-seed", str(self.seed + index)),
            "--skip-tokenizer-init",
            *(("--enable-memory-saver",) if self.saves_memory and self.on_gpu else ()),
            *(() if self.on_gpu else _CPU_FLAGS),
            *self.extra_args,
        ]

    @property
    def reached_at(self) -> str:
        """What other hosts call it: one that listens everywhere is called by this machine's name."""
        return socket.gethostname() if self.host == ANY_ADDRESS else self.host

    def environment(self) -> dict[str, str]:
        cpu = {} if self.on_gpu else _CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(self.cpu_threads)}
        return outside_environment() | {"HF_HUB_OFFLINE": "1"} | cpu


def server_python(configured: str | None) -> str:
    """The recipe's, else the environment's; it is checked that it runs."""
    python = configured or os.environ.get(PYTHON_VARIABLE)
    if python and os.access(python, os.X_OK):
        return python
    raise UserError(
        f"{python} is no program that can be run" if python else "no Python to run SGLang servers with",
        where="rollout.sglang.python" if configured or not python else f"environment {PYTHON_VARIABLE}",
        law="SGLang lives in a virtual environment of its own: its pinned packages are not the trainer's",
        remedy=f"set rollout.sglang.python, or {PYTHON_VARIABLE}, to that environment's bin/python; "
        "without a GPU, tools/install_sglang_cpu.sh DIR makes one",
    )


def deterministic_flags(block: SglangBlock, *, on_gpu: bool) -> tuple[str, ...]:
    """What makes a server's results repeat, as the recipe wants it."""
    target = () if block.on_policy_target is None else ("--rl-on-policy-target", block.on_policy_target)
    flags = (*(("--enable-deterministic-inference",) if block.deterministic else ()), *target)
    if flags and not on_gpu:
        raise UserError(
            f"a server on a CPU does not take {flags[0]}",
            where="rollout.sglang.deterministic and on_policy_target",
            law="SGLang's deterministic inference is made of kernels that need a GPU",
            remedy="remove the keys; engine local repeats to the last bit on a CPU",
        )
    return flags


@dataclass(eq=False)
class ManagedServer:
    """One server; its address changes when it is started again."""

    spec: ServerSpec
    index: int
    url: str = field(default="", init=False)
    _process: GuardedProcess = field(init=False)

    def __post_init__(self) -> None:
        self._process = GuardedProcess(self.spec.folder / f"server-{self.index}.log")

    @property
    def log(self) -> Path:
        return self._process.log

    @property
    def pid(self) -> int | None:
        """Of the guard, which is also the process group's."""
        return self._process.pid

    def start(self) -> None:
        """Returns at once; `wait_until_ready` follows."""
        port = free_port(self.spec.host)
        self._process.start(self.spec.command(port, self.index), self.spec.environment())
        self.url = f"http://{self.spec.reached_at}:{port}"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.spec.startup_seconds
        while not self.is_healthy():
            if not self.is_running or time.monotonic() > deadline:
                raise self._not_started()
            time.sleep(0.2)

    def _not_started(self) -> UserError:
        if self.is_running:
            what = f"server {self.index} is not ready after {self.spec.startup_seconds:g} s"
            self.stop()
        else:
            what = f"server {self.index} ended with exit code {self._process.exit_code} while starting"
        return UserError(
            f"{what}\n  {self._process.last_words}",
            where=f"{self.log}",
            law="a managed server answers /health before it is used",
            remedy="read the log; correct rollout.sglang.extra_args or the environment at "
            f"{self.spec.python}, or raise rollout.sglang.startup_seconds",
        )

    @property
    def is_running(self) -> bool:
        return self._process.is_running

    def is_healthy(self, *, thoroughly: bool = True) -> bool:
        """It runs and answers; thoroughly: its scheduler too, which takes a second."""
        if not self.is_running:
            return False
        url = f"{self.url}/{'health' if thoroughly else 'model_info'}"
        try:
            answer = httpx.get(url, timeout=HEALTH_SECONDS, trust_env=False, verify=False)  # no certificates
            return answer.status_code == 200
        except httpx.HTTPError:
            return False

    def ask_to_end(self) -> None:
        self._process.ask_to_end()

    def stop(self, limit_seconds: float = STOP_SECONDS) -> None:
        self._process.stop(limit_seconds)


@dataclass(eq=False)
class ServerPool:
    """All servers of a run.

    Example:
        pool = ServerPool(spec, count=2, max_restarts=3)
        pool.start()  # pool.urls
        pool.revive()  # before each sync: whoever died is started again
    """

    spec: ServerSpec
    count: int
    max_restarts: int
    restarts: int = 0  # so far, of all servers
    _servers: list[ManagedServer] = field(default_factory=list[ManagedServer], init=False)

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(server.url for server in self._servers)

    @property
    def servers(self) -> tuple[ManagedServer, ...]:
        return tuple(self._servers)

    def start(self) -> None:
        self._servers = [ManagedServer(self.spec, index) for index in range(self.count)]
        self._start(self._servers)

    def _start(self, servers: list[ManagedServer]) -> None:
        try:
            for server in servers:
                server.start()
            for server in servers:
                server.wait_until_ready()
        except BaseException:
            self.stop(limit_seconds=0)
            raise

    def revive(self, *, thoroughly: bool = True) -> int:
        """Start again every server that does not answer; how many those were. Their weights are random."""
        dead = [server for server in self._servers if not server.is_healthy(thoroughly=thoroughly)]
        if not dead:
            return 0
        if self.restarts + len(dead) > self.max_restarts:
            self.stop(limit_seconds=0)
            raise UserError(
                f"server {dead[0].index} died or hangs, and {self.restarts} restarts were made already",
                where=f"{dead[0].log}",
                law=f"servers are restarted at most rollout.sglang.max_restarts ({self.max_restarts}) times",
                remedy="read the log for why it died (memory, most often); lower the load or raise the limit",
            )
        self.restarts += len(dead)
        for server in dead:
            server.stop(limit_seconds=0)  # what hangs does not hear a request to end
        self._start(dead)
        return len(dead)

    def stop(self, limit_seconds: float = STOP_SECONDS) -> None:
        """All at once, within the limit."""
        if limit_seconds > 0:
            for server in self._servers:
                server.ask_to_end()
        for server in self._servers:
            server.stop(limit_seconds)

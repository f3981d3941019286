"""SGLang's router (the package sglang-router) in front of a run's servers.

It sends a request to the server that has read most of it already, as long as no server has much more to do
than another: the turns of a sample, and the samples of a prompt, meet what they share in one server's cache.
Only requests for samples pass through it; weights and their proof go to every server.
"""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grpo_mega.errors import UserError
from grpo_mega.ports import LOOPBACK, free_port
from grpo_mega.rollout.addresses import healthy_workers
from grpo_mega.rollout.guarded import GuardedProcess, outside_environment

PACKAGE = "sglang-router==0.3.2"
"""The version that was run."""
START_SECONDS = 60.0
LOOK_EVERY_SECONDS = 0.1
IMPORT_SECONDS = 60.0

# Not its own command, which loads all of sglang and takes as long as a server.
_START = """
import json, sys
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs
Router.from_args(RouterArgs(**json.loads(sys.argv[1]))).start()
"""
_IMPORT = "import sglang_router.router, sglang_router.router_args"


def check_router(python: str) -> None:
    """Before servers are started: whether their environment has the router."""
    found = subprocess.run(
        [python, "-c", _IMPORT],
        env=outside_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=IMPORT_SECONDS,
    )
    if found.returncode:
        last = found.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(
            f"{python} cannot start SGLang's router: {last[0][:200]}",
            where="rollout.sglang.mode router",
            law="the router is a package of its own, beside sglang in the servers' environment",
            remedy=f"{python} -m pip install {PACKAGE}, or set rollout.sglang.mode to managed",
        )


@dataclass(eq=False)
class Router:
    """Example:
    router = Router("/venv/bin/python", Path("run/servers"), concurrency=256, timeout_seconds=600)
    url = router.before(("http://127.0.0.1:30000", "http://127.0.0.1:30001"))
    """

    python: str
    folder: Path  # its log
    concurrency: int  # requests in flight over all servers
    timeout_seconds: float  # of one request
    url: str = field(default="", init=False)
    _servers: tuple[str, ...] = field(default=(), init=False)
    _process: GuardedProcess = field(init=False)

    def __post_init__(self) -> None:
        self._process = GuardedProcess(self.folder / "router.log")

    @property
    def pid(self) -> int | None:
        """Of its guard."""
        return self._process.pid

    def before(self, servers: Sequence[str]) -> str:
        """Its address, once it knows that these servers are well. Another router when they are others, or
        when the one there is does not answer: it knows nothing that is worth keeping."""
        if tuple(servers) != self._servers or self._well() != set(servers):
            self.stop()
            self._start(tuple(servers))
        return self.url

    def stop(self) -> None:
        self._process.stop(limit_seconds=0)  # it would wait for requests
        self._servers = ()

    def _start(self, servers: tuple[str, ...]) -> None:
        port = free_port()
        settings = json.dumps(self.settings(servers, port))
        self._process.start([self.python, "-c", _START, settings], outside_environment())
        self.url = f"http://{LOOPBACK}:{port}"
        deadline = time.monotonic() + START_SECONDS
        while self._well() != set(servers):
            if not self._process.is_running or time.monotonic() > deadline:
                said = self._process.last_words
                self.stop()
                raise UserError(
                    f"the router does not come up before {', '.join(servers)}\n  {said}",
                    where=str(self._process.log),
                    law=f"a router finds its servers well within {START_SECONDS:g} s",
                    remedy=f"read the log; the version that is known to work is {PACKAGE}; "
                    "rollout.sglang.mode managed does without",
                )
            time.sleep(LOOK_EVERY_SECONDS)
        self._servers = servers

    def settings(self, servers: Sequence[str], port: int) -> dict[str, object]:
        """What fails is asked again by who asked, under another id; so the router itself repeats nothing."""
        return {
            "worker_urls": list(servers),
            "host": LOOPBACK,
            "port": port,
            "policy": "cache_aware",
            # above this difference in requests the idler server is taken, whatever it has read
            "balance_abs_threshold": max(1, self.concurrency // (2 * len(servers))),
            "disable_retries": True,
            "cb_failure_threshold": 2,
            "cb_timeout_duration_secs": 10,
            "health_check_endpoint": "/model_info",  # /health samples a token, and waits while weights change
            "health_check_interval_secs": 5,
            "worker_startup_check_interval": 1,
            "request_timeout_secs": math.ceil(self.timeout_seconds),
            "log_level": "warn",
        }

    def _well(self) -> set[str]:
        """Servers that it sends requests to."""
        return healthy_workers(self.url) if self._process.is_running else set()

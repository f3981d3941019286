"""What W&B costs a step, also when its server is away, fails, dawdles or dies.

python -m tools.bench_trackers           # a table of step times, relative to metrics.jsonl alone
python -m tools.bench_trackers --steps 40 --rounds 8

A step is matrix products of about a tenth of a second and one report of 120 metrics. Each variant has a
process of its own, its server is in another one, and metrics.jsonl alone is measured before and after; the
best round of each counts. The rounds of a server that dies are those after its death. On a busy machine the
clock says little; the processor's time of the training thread is what that thread does itself.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from grpo_mega.monitor.trackers import Trackers, open_trackers
from grpo_mega.types import StepReport
from tests.wandb_server import DUMMY_KEY, Health, WandbServer

METRICS = {f"actor/metric_{index}": float(index) for index in range(120)}
SLOW_SECONDS = 5.0
CONNECT_SECONDS = 300.0
NOBODY = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Variant:
    name: str
    health: Health | None = None  # None: there is no server
    mode: str = "online"
    dies: bool = False


VARIANTS = (
    Variant("offline", mode="offline"),
    Variant("server healthy", health="healthy"),
    Variant("server away"),
    Variant("server answers 500", health="error 500"),
    Variant("server answers after 5 s", health="slow"),
    Variant("server dies in the run", health="healthy", dies=True),
)


@dataclass(frozen=True)
class Cost:
    """Seconds a step, reporting included."""

    clock: float
    processor: float  # of the thread that trains

    def least(self, other: Cost) -> Cost:
        return Cost(min(self.clock, other.clock), min(self.processor, other.processor))


class Workload:
    """Steps that are reported; their numbers grow."""

    def __init__(self, trackers: Trackers):
        self._trackers, self._number = trackers, 0
        self._left, self._right = torch.rand(640, 640), torch.rand(640, 640)

    def step(self) -> None:
        value = self._left
        for _ in range(24):
            value = torch.tanh(value @ self._right)
        self._number += 1
        self._trackers.write(StepReport(self._number, "grpo", METRICS), self._number)

    def best(self, steps: int, rounds: int) -> Cost:
        best = Cost(math.inf, math.inf)
        for _ in range(rounds):
            clock, processor = time.perf_counter(), time.thread_time()
            for _ in range(steps):
                self.step()
            clock, processor = time.perf_counter() - clock, time.thread_time() - processor
            best = best.least(Cost(clock / steps, processor / steps))
        return best


def measure(tracker: str, steps: int, rounds: int, meet: Callable[[Workload], None]) -> Cost:
    """`meet`: what is done before the rounds that count."""
    with tempfile.TemporaryDirectory() as folder:
        trackers = open_trackers(
            (tracker,),
            Path(folder),
            resume_step=0,
            project="bench",
            run_name="bench",
            wandb_policy="auto",
            say=lambda _: None,
        )
        trackers.start({}, resumed_from_step=None)
        workload = Workload(trackers)
        meet(workload)
        best = workload.best(steps, rounds)
        threading.Thread(target=trackers.finish, daemon=True).start()
        time.sleep(1.0)
    return best


def child(pipe: Connection, environment: dict[str, str], steps: int, rounds: int, talks: bool) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)

    def meet(workload: Workload) -> None:
        if not talks:
            return
        while not pipe.poll():  # until the server knows the run
            workload.step()
        pipe.recv()
        workload.best(steps, 1)
        pipe.send("go on")
        pipe.recv()

    def nobody(workload: Workload) -> None: ...

    alone = measure("jsonl", steps, rounds, nobody)
    tracked = measure("wandb", steps, rounds, meet)
    alone = alone.least(measure("jsonl", steps, rounds, nobody))
    pipe.send(Cost(tracked.clock / alone.clock, tracked.processor / alone.processor))
    os._exit(0)  # a connection that is still tried would hold the interpreter up


def ratio_of(variant: Variant, steps: int, rounds: int) -> tuple[Cost, int]:
    """Its step time relative to metrics.jsonl alone, and the requests that its server had."""
    server = None if variant.health is None else WandbServer()
    url = NOBODY if server is None else server.url
    environment = {"WANDB_MODE": variant.mode, "WANDB_BASE_URL": url, "WANDB_API_KEY": DUMMY_KEY}
    talks = variant.health == "healthy"
    if server is not None and variant.health is not None:
        server.health, server.slow_seconds = variant.health, SLOW_SECONDS
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, environment, steps, rounds, talks), daemon=True)
    process.start()
    if server is not None and talks:
        deadline = time.monotonic() + CONNECT_SECONDS
        while not server.runs:
            assert time.monotonic() < deadline and process.is_alive(), "the server never heard of the run"
            time.sleep(0.1)
        ours.send("connected")
        ours.recv()
        if variant.dies:
            server.die()
        ours.send("go on")
    ratio = ours.recv()
    process.join()
    if server is not None:
        server.die()
    return ratio, 0 if server is None else len(server.requests)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    print("| W&B | step time | processor time | requests the server had |\n|---|---|---|---|")
    for variant in VARIANTS:
        ratio, requests = ratio_of(variant, options.steps, options.rounds)
        print(f"| {variant.name} | {ratio.clock:.3f} | {ratio.processor:.3f} | {requests} |", flush=True)


if __name__ == "__main__":
    main()

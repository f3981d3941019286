"""What W&B costs a step, also when its server is away, fails or dawdles.

python tools/bench_trackers.py           # a table of step times, relative to metrics.jsonl alone
python tools/bench_trackers.py --steps 40 --rounds 8

A step is matrix products of about a tenth of a second and one report of 120 metrics. All is done in one
process, metrics.jsonl alone before and after each variant; the best round of each counts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from grpo_mega.monitor.trackers import open_trackers
from grpo_mega.types import StepReport

METRICS = {f"actor/metric_{index}": float(index) for index in range(120)}
SLOW_SECONDS = 5.0


class Failing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(500)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None: ...


class Slow(Failing):
    def do_POST(self) -> None:
        time.sleep(SLOW_SECONDS)
        super().do_POST()

    do_GET = do_POST


def serve(handler: type[BaseHTTPRequestHandler]) -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def work() -> Callable[[], None]:
    left, right = torch.rand(640, 640), torch.rand(640, 640)

    def step() -> None:
        value = left
        for _ in range(24):
            value = torch.tanh(value @ right)

    return step


def measure(steps: int, rounds: int, url: str | None, mode: str, names: tuple[str, ...]) -> float:
    """The best round's seconds a step, reporting included."""
    os.environ["WANDB_MODE"] = mode
    if url is not None:
        os.environ.update({"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40})
    step, best = work(), float("inf")
    with tempfile.TemporaryDirectory() as folder:
        trackers = open_trackers(
            names,
            Path(folder),
            resume_step=0,
            project="bench",
            run_name="bench",
            wandb_policy="auto",
            say=lambda _: None,
        )
        trackers.start({}, resumed_from_step=None)
        number = 0
        for _ in range(rounds):
            began = time.perf_counter()
            for _ in range(steps):
                step()
                number += 1
                trackers.write(StepReport(number, "grpo", METRICS), number)
            best = min(best, (time.perf_counter() - began) / steps)
        threading.Thread(target=trackers.finish, daemon=True).start()
        time.sleep(1.0)
    return best


VARIANTS: dict[str, tuple[type[BaseHTTPRequestHandler] | str | None, str]] = {
    "offline": (None, "offline"),
    "server away": ("http://127.0.0.1:9", "online"),
    "server answers 500": (Failing, "online"),
    "server answers after 5 s": (Slow, "online"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| tracker | of metrics.jsonl alone |\n|---|---|")
    for name, (server, mode) in VARIANTS.items():
        url = serve(server) if isinstance(server, type) else server
        alone = measure(options.steps, options.rounds, None, "offline", ("jsonl",))
        tracked = measure(options.steps, options.rounds, url, mode, ("wandb",))
        alone = min(alone, measure(options.steps, options.rounds, None, "offline", ("jsonl",)))
        print(f"| wandb, {name} | {tracked / alone:.3f} |", flush=True)
    os._exit(0)  # a connection that is still tried would hold the interpreter up


if __name__ == "__main__":
    main()

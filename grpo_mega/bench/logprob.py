"""`linear_logprob` against the naive way: all logits at once.

Each variant has a process of its own, so that its peak of memory is its own. All are ready before any is
timed, and they take turns, so that a busy machine is busy for all.

# T tokens, H hidden, V vocabulary
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from grpo_mega.kernels.implementation import prepare_torch_compile
from grpo_mega.kernels.logprob import linear_logprob

MEBIBYTE = 2**20
COMPARED_COLUMNS = 2000
"""Rows of the weight's gradient that are written down for comparison."""
Values = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Best times, largest peaks of memory above the inputs (a weight gradient is part of the peak), and what
    each is of the naive way's."""

    variant: str
    forward_ms: float
    total_ms: float  # forward and backward
    forward_mib: float
    total_mib: float
    of_naive_forward_time: float
    of_naive_time: float
    of_naive_forward_memory: float
    of_naive_memory: float
    forward_tflops: float  # 2 T H V
    effective_tflops: float  # 6 T H V over forward and backward, whatever is computed twice
    error: float  # of log-prob, entropy and both gradients, relative to the largest magnitude


@dataclass(frozen=True, slots=True)
class Job:
    """What one process measures."""

    variant: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str
    keep: str  # where results are left for comparison


@dataclass(frozen=True, slots=True)
class Turn:
    """One forward pass without gradients, then one with its backward pass."""

    forward_ms: float
    total_ms: float
    forward_mib: float
    total_mib: float


def run(
    tokens: int = 2048,
    hidden: int = 896,
    vocab: int = 151936,
    dtype: str = "float32",
    repeats: int = 1,
    *,
    compiled_naive: bool = False,
) -> list[Row]:
    """`repeats` rounds, in each of which every variant takes one turn."""
    variants = ["naive", "eager", "compiled"]
    variants += ["naive compiled"] if compiled_naive else []
    variants += ["triton"] if torch.cuda.is_available() else []
    with tempfile.TemporaryDirectory() as directory:
        files = {variant: str(Path(directory) / f"{variant}.pt") for variant in variants}
        workers = [Worker(Job(v, tokens, hidden, vocab, dtype, files[v])) for v in variants]
        try:
            turns = [[worker.take_turn() for worker in workers] for _ in range(repeats)]
        finally:
            for worker in workers:
                worker.close()
        results = [torch.load(file) for file in files.values()]
    merged = [_merged([turn[index] for turn in turns]) for index in range(len(variants))]
    work = 2.0 * tokens * hidden * vocab
    return [
        _row(variant, turn, merged[0], work, _error(result, results[0]))
        for variant, turn, result in zip(variants, merged, results, strict=True)
    ]


def _merged(turns: list[Turn]) -> Turn:
    return Turn(
        min(t.forward_ms for t in turns),
        min(t.total_ms for t in turns),
        max(t.forward_mib for t in turns),
        max(t.total_mib for t in turns),
    )


def _row(variant: str, turn: Turn, naive: Turn, work: float, error: float) -> Row:
    return Row(
        variant,
        **asdict(turn),
        of_naive_forward_time=turn.forward_ms / naive.forward_ms,
        of_naive_time=turn.total_ms / naive.total_ms,
        of_naive_forward_memory=turn.forward_mib / naive.forward_mib,
        of_naive_memory=turn.total_mib / naive.total_mib,
        forward_tflops=work / turn.forward_ms / 1e9,
        effective_tflops=3.0 * work / turn.total_ms / 1e9,
        error=error,
    )


def _error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


class Worker:
    """A process that prepares itself, and then measures once for each line it is sent."""

    def __init__(self, job: Job):
        self._process: Any = subprocess.Popen(
            [sys.executable, "-m", "grpo_mega.bench.logprob", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def take_turn(self) -> Turn:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Turn(**json.loads(self._read()))

    def _read(self) -> str:
        line = self._process.stdout.readline()
        assert line, f"the benchmark's process ended with code {self._process.wait()}"
        return line

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass
class Problem:
    """Random inputs, as a transformer's last layer and its output layer have them."""

    job: Job

    def __post_init__(self) -> None:
        job, generator = self.job, torch.Generator().manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, job.dtype)
        hidden_TH = torch.randn(job.tokens, job.hidden, generator=generator)
        weight_VH = torch.randn(job.vocab, job.hidden, generator=generator).mul_(0.05)
        self.hidden_TH = hidden_TH.to(self.device, dtype).requires_grad_()
        self.weight_VH = weight_VH.to(self.device, dtype).requires_grad_()
        self.target_T = torch.randint(job.vocab, (job.tokens,), generator=generator).to(self.device)
        self.above_2T = torch.randn(2, job.tokens, generator=generator).to(self.device) / job.tokens

    @cached_property
    def _values(self) -> Callable[..., Values]:
        if self.job.variant == "naive":
            return naive
        if self.job.variant == "naive compiled":
            prepare_torch_compile()
            return torch.compile(naive)
        return self._ours

    def _ours(self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor) -> Values:
        implementation: Any = self.job.variant
        return linear_logprob(hidden_TH, weight_VH, target_T, 1.0, implementation=implementation)[:2]

    def forward(self) -> Values:
        with torch.no_grad():
            return self._values(self.hidden_TH, self.weight_VH, self.target_T)

    def both(self) -> Values:
        values = self._values(self.hidden_TH, self.weight_VH, self.target_T)
        torch.autograd.backward(values, list(self.above_2T))
        return values

    def turn(self) -> Turn:
        forward_ms, forward_mib = self._measured(self.forward)
        total_ms, total_mib = self._measured(self.both)
        return Turn(forward_ms, total_ms, forward_mib, total_mib)

    def _measured(self, step: Callable[[], Values]) -> tuple[float, float]:
        """Milliseconds, and mebibytes above what was held before."""
        self.hidden_TH.grad = self.weight_VH.grad = None
        before = _start_of_peak(self.device)
        began = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        milliseconds = (time.perf_counter() - began) * 1e3
        return milliseconds, (_peak(self.device) - before) / MEBIBYTE

    def keep_results(self) -> None:
        self.hidden_TH.grad = self.weight_VH.grad = None
        values = self.both()
        assert self.hidden_TH.grad is not None and self.weight_VH.grad is not None
        gradients = self.hidden_TH.grad, self.weight_VH.grad[:COMPARED_COLUMNS].clone()
        torch.save([*(value.detach() for value in values), *gradients], self.job.keep)


def naive(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor) -> Values:
    logits_TV = (hidden_TH @ weight_VH.t()).float()
    logp_TV = torch.log_softmax(logits_TV, -1)
    return logp_TV.gather(1, target_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def _start_of_peak(device: torch.device) -> float:
    """Forget the peak so far; bytes held now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # else what is left of earlier calls hides what this one needs
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _serve(job: Job) -> None:
    problem = Problem(job)
    problem.keep_results()  # compiles on the way
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(problem.turn())), flush=True)


if __name__ == "__main__":
    _serve(Job(**json.loads(sys.argv[1])))

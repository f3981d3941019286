"""Symbolic equality with the answer, by math-verify in a process of its own.

math-verify guards itself with signal.alarm, which works on the main thread only and cannot stop a computation
inside C (9**9**9**9 alone can take a machine down). A child process has its own main thread, timer and memory
limit, so this reward works from any thread, and the worst response costs one time-out.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import MathReward
from grpo_mega.reward.base import RewardResult, require_answer
from grpo_mega.types import Prompt, Sample

log = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("math_worker.py")
LOGGED_CHARACTERS = 200
"""Of a response that the worker could not survive."""


class MathScorer:
    """1 if the last boxed, or else the last plain, expression equals the answer; 0 if not, or not in time."""

    def __init__(self, block: MathReward, name: str):
        self.name, self._timeout_seconds = name, block.timeout_seconds
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner: int | None = None
        self._unreadable_answers: set[str] = set()

    def score(self, prompt: Prompt, sample: Sample) -> RewardResult:
        answer = require_answer(prompt, self.name)
        with self._lock:
            verdict = self._ask(answer, sample.text)
        if verdict == "unreadable answer" and prompt.uid not in self._unreadable_answers:
            self._unreadable_answers.add(prompt.uid)
            log.warning(
                "reward %s: the answer of prompt %s, %r, is no expression: 0", self.name, prompt.uid, answer
            )
        value = float(verdict == "equal")
        return RewardResult(value, pass_rate=value)

    def close(self) -> None:
        """Ends the worker; the next score starts another."""
        if self._worker is not None and self._owner == os.getpid():
            self._worker.kill()
            self._worker.communicate()
        self._worker = None

    def _ask(self, answer: str, response: str) -> str:
        worker = self._running_worker()
        assert worker.stdin is not None and worker.stdout is not None
        request = {"answer": answer, "response": response, "timeout_seconds": self._timeout_seconds}
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if line:
            return str(json.loads(line)["verdict"])
        code = worker.wait()
        self.close()
        reason = (
            f"took longer than {self._timeout_seconds} s"
            if code == -signal.SIGALRM
            else f"ended the worker ({code})"
        )
        log.warning(
            "reward %s: a response %s and scores 0: %r", self.name, reason, response[:LOGGED_CHARACTERS]
        )
        return "no verdict"

    def _running_worker(self) -> subprocess.Popen[bytes]:
        # A forked child inherits the object but must not share the parent's pipes.
        if self._worker is not None and self._owner == os.getpid() and self._worker.poll() is None:
            return self._worker
        self._owner = os.getpid()
        # -P: the script's folder holds a math.py, which must not hide Python's own.
        self._worker = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._worker.stdout is not None
        ready = self._worker.stdout.readline()
        if ready.strip() != b"ready":
            raise UserError(
                f"the process that compares expressions did not start: {ready.decode().strip() or '?'}",
                where="reward.math",
                law="the math reward needs the packages math-verify and sympy",
                remedy=f"try: {sys.executable} -P {WORKER}",
            )
        return self._worker

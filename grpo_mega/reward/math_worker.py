"""The process behind the math reward: one JSON request a line in, one verdict a line out. Imports no sibling.

It limits itself: past the time-out the kernel's default action for SIGALRM ends it, even inside C code and
when the parent is gone; past the memory limit Python raises MemoryError.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from functools import lru_cache

MEMORY_LIMIT_BYTES = 4 * 2**30
NO_TIMER = 0  # math-verify's own; this process has a harder one

try:
    from math_verify import parse, verify
except ImportError as error:
    print(error, flush=True)
    sys.exit(1)


@lru_cache(maxsize=256)  # a group's samples share their answer
def parse_answer(answer: str) -> list:
    """An answer is an expression as a whole, with or without delimiters of its own."""
    marked = "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer
    return parse(answer if marked else f"\\boxed{{{answer}}}", parsing_timeout=NO_TIMER)


def last_boxed(response: str) -> str:
    """The last whole \\boxed{...}, or all of the response. Of several, math-verify would make a set."""
    start = response.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for place in range(start + len("\\boxed"), len(response)):
            depth += {"{": 1, "}": -1}.get(response[place], 0)
            if depth == 0:
                return response[start : place + 1]
        start = response.rfind("\\boxed{", 0, start)
    return response


def verdict_of(answer: str, response: str) -> str:
    expected = parse_answer(answer)
    if not expected:
        return "unreadable answer"
    found = parse(last_boxed(response), parsing_timeout=NO_TIMER)
    return "equal" if verify(expected, found, timeout_seconds=NO_TIMER) else "different"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable(
        logging.CRITICAL
    )  # it would report every expression it cannot parse, and its timers being off
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["timeout_seconds"])
        try:
            verdict = verdict_of(request["answer"], request["response"])
        except Exception:
            verdict = "different"  # whatever the response made the parser do, it is not the answer
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"verdict": verdict}), flush=True)


if __name__ == "__main__":
    main()

"""Tests that run beside others, in threads: for those that mostly wait, or leave a processor idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest

Body = Callable[..., None]
Outcome = Callable[[Body], None]


def beside_others(body: Body) -> Callable[[Outcome], None]:
    """`body` is called with what the fixture `beside` of its directory gives it.

    It starts with the first of all chosen tests of this kind, and the test waits for its end."""

    @wraps(body)
    def test(beside: Outcome) -> None:
        beside(body)

    del test.__wrapped__  # pytest would ask for the body's arguments
    test.body = body  # type: ignore[attr-defined]
    return test


@contextmanager
def running(items: list[pytest.Item], call: Callable[[Body], Any], at_once: int | None) -> Iterator[Outcome]:
    """Starts `call(body)` for the bodies of all these tests, and gives what waits for one of them."""
    tests = [getattr(item, "function", None) for item in items]
    bodies = [body for test in tests if (body := getattr(test, "body", None)) is not None]
    executor = ThreadPoolExecutor(at_once or max(1, len(bodies)))
    started = {body: executor.submit(call, body) for body in bodies}
    try:
        yield lambda body: started[body].result()
    finally:
        executor.shutdown(cancel_futures=True)

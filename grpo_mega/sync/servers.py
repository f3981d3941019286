"""The control side of SGLang servers: the calls that change weights, to all servers at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

ResultT = TypeVar("ResultT")

CONNECT_SECONDS = 5.0
PIECE_BYTES = 1 << 20


class SyncFailed(Exception):
    """One attempt to bring weights to the servers failed; the weights there are not to be used."""


@dataclass(eq=False)
class ControlPlane:
    """Example: ControlPlane(("http://127.0.0.1:30000",)).post("flush_cache", {})"""

    urls: Sequence[str]
    tp: int = 1
    timeout_seconds: float = 600.0
    _http: httpx.Client = field(init=False)
    _threads: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        timeout = httpx.Timeout(self.timeout_seconds, connect=CONNECT_SECONDS)
        secure = any(url.startswith("https:") for url in self.urls)  # certificates take long to load
        self._http = httpx.Client(timeout=timeout, trust_env=False, verify=secure)
        self._threads = ThreadPoolExecutor(max(1, len(self.urls)), thread_name_prefix="weight-sync")

    def close(self) -> None:
        self._http.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def each(self, call: Callable[[int, str], ResultT]) -> list[ResultT]:
        """`call(index, url)` for all servers at once; waits for all, then raises the first failure."""
        return self.started(call)()

    def started(self, call: Callable[[int, str], ResultT]) -> Callable[[], list[ResultT]]:
        """Like `each`, without waiting: calling the result waits."""
        futures = [self._threads.submit(call, index, url) for index, url in enumerate(self.urls)]

        def wait() -> list[ResultT]:
            failures = [failure for future in futures if (failure := future.exception()) is not None]
            if failures:
                raise failures[0]
            return [future.result() for future in futures]

        return wait

    def post(self, path: str, body: dict[str, Any]) -> None:
        """To all servers; raises SyncFailed unless all succeed."""
        self.each(lambda _, url: self.call(url, path, body))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Requests in flight keep their tokens and go on afterwards with the weights there are then, which
        read all tokens anew: a token's log-prob is that of the weights it is stamped with."""
        try:
            self.post("pause_generation", {"mode": "retract"})  # one may fail while others are paused
            yield
        finally:
            self.post("continue_generation", {})

    def call(self, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        try:
            response = self._http.post(f"{url}/{path}", content=_pieces(content), headers=headers)
        except httpx.HTTPError as error:
            raise SyncFailed(f"{url}/{path}: {type(error).__name__} {error}") from error
        if response.status_code != 200:
            raise SyncFailed(f"{url}/{path}: status {response.status_code}: {response.text[:300]}")
        try:
            answer = response.json()
        except ValueError:
            answer = {}  # some calls answer with a line of text
        answer = {} if answer is None else answer  # and some with nothing
        if not isinstance(answer, dict) or answer.get("success") is False:
            raise SyncFailed(f"{url}/{path}: {response.text[:300]}")
        return answer

    def get(self, url: str, path: str) -> dict[str, Any]:
        try:
            return self._http.get(f"{url}/{path}").raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise SyncFailed(f"{url}/{path}: {type(error).__name__} {error}") from error

    def has(self, url: str, path: str) -> bool:
        """Whether a server of this version knows the call."""
        return f"/{path}" in self.get(url, "openapi.json")["paths"]


def _pieces(content: bytes) -> Iterator[bytes]:
    """The client copies what is left of a piece after each write to the socket: weights in one piece would be
    copied a hundred times."""
    for begin in range(0, len(content), PIECE_BYTES):
        yield content[begin : begin + PIECE_BYTES]

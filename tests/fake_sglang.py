"""A few lines that speak SGLang's /generate, and misbehave on request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
Misbehaviour = Callable[[int, dict[str, Any]], "Answer | None"]


@dataclass(eq=False)
class FakeServer:
    """`misbehave(number of the request, its body)` returns (status, body) to answer with, status 0 to break
    the connection, or None to behave."""

    misbehave: Misbehaviour = lambda number, body: None
    version: str = "v1"
    healthy: bool = True
    workers: dict[str, bool] = field(default_factory=dict[str, bool])  # of a router: which of them are well
    generated: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # bodies, as they arrived
    aborted: list[str] = field(default_factory=list[str])
    connections: int = 0
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> FakeServer:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        if path == "/health":
            return (200 if self.healthy else 503), {}
        if path == "/model_info":
            return 200, {"weight_version": self.version}
        if path == "/workers":
            return 200, {"workers": [{"url": u, "is_healthy": well} for u, well in self.workers.items()]}
        if path == "/abort_request":
            self.aborted.append(body["rid"])
            return 200, {}
        if path != "/generate":
            return 404, {}
        with self._lock:
            self.generated.append(body)
            number = len(self.generated) - 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self.misbehave(number, body) or (200, completion(body, self.version))
        finally:
            with self._lock:
                self._at_once -= 1


def completion(body: dict[str, Any], version: str, reason: str = "length") -> dict[str, Any]:
    """Echoes the prompt."""
    ids = body["input_ids"]
    return {
        "output_ids": ids,
        "meta_info": {
            "id": body["rid"],
            "finish_reason": {"type": reason},
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
            "output_token_logprobs": [[-token / 10, token, None] for token in ids],
        },
    }


def slowly(seconds: float) -> None:
    time.sleep(seconds)


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server.connections += 1

        def do_GET(self) -> None:
            self._reply(server.answer(self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._reply(server.answer(self.path, body))

        def _reply(self, answer: Answer) -> None:
            status, body = answer
            if status == 0:
                self.close_connection = True
                self.connection.close()
                return
            text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            except OSError:
                pass  # the client did not wait

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler

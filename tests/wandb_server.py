"""A small wandb server on loopback: as much of the protocol as a run needs, and the ways in which servers
fail.

Like the real one it numbers the rows of a run: a row sent again under its number takes the place of the
first."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

ENTITY = "somebody"
DUMMY_KEY = "0" * 40

Health = Literal["healthy", "error 500", "slow"]


class WandbServer:
    """rows[run id] = {row number: row}"""

    def __init__(self):
        self.health: Health = "healthy"
        self.slow_seconds = 1.0
        self.drop_rows = False  # accept connections, and answer 500 to rows only
        self.runs: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.requests: list[str] = []
        self._port = 0
        self.revive()

    def revive(self) -> None:
        """Under its old address, with all it knew."""
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _QuietHttpServer(("127.0.0.1", self._port), handler)
        self._port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self._alive = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": DUMMY_KEY, "WANDB_MODE": "online"}

    def all_rows(self) -> list[dict[str, Any]]:
        return [row for rows in self.rows.values() for _, row in sorted(rows.items())]

    def die(self) -> None:
        """Connections are refused from here on."""
        if not self._alive:
            return
        self._alive = False
        self._http.shutdown()
        self._http.server_close()
        self._http.cut_connections()
        self._thread.join()


class _QuietHttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def cut_connections(self) -> None:
        """Clients keep theirs open between requests."""
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients are killed in the middle of a request: that is what the tests are about."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    try:
        yield server
    finally:
        server.die()


class _Handler(BaseHTTPRequestHandler):
    owner: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        owner, body = self.owner, self._body()
        owner.requests.append(self.path)
        if owner.health == "slow":
            time.sleep(owner.slow_seconds)
        is_rows = "file_stream" in self.path
        if owner.health == "error 500" or (owner.drop_rows and is_rows):
            self._reply({"error": "out of order"}, 500)
        elif is_rows:
            self._take_rows(self.path.split("/")[-2], json.loads(body))
            self._reply({"exitcode": None, "limits": {}})
        elif "graphql" in self.path:
            question = json.loads(body)
            self._reply({"data": self._answer(question["query"], question.get("variables") or {})})
        else:
            self._reply({})

    def _take_rows(self, run_id: str, body: dict[str, Any]) -> None:
        history = body.get("files", {}).get("wandb-history.jsonl")
        if history:
            rows = self.owner.rows.setdefault(run_id, {})
            for number, line in enumerate(history["content"], start=history["offset"]):
                rows[number] = json.loads(line)

    def _answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}
        if "createRunFiles" in query:
            base = f"http://{self.headers['host']}/upload/"
            files = [{"name": name, "uploadUrl": base + name} for name in variables["files"]]
            return {"createRunFiles": {"runID": "Qg==", "uploadHeaders": [], "files": files}}
        if "RunResumeStatus" in query or "model(" in query:
            return {"model": self._resume_status(variables)}
        if "project(" in query:
            return {"project": {"run": self._public_run(variables["name"])}}
        if "viewer" in query:
            viewer = {"id": "VQ==", "entity": ENTITY, "username": ENTITY, "flags": "{}", "admin": False}
            return {"viewer": viewer | {"teams": {"edges": []}}, "serverInfo": None}
        return {"serverInfo": None, "model": None, "project": None}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.owner.runs.setdefault(variables["name"], {})
        run.update({key: value for key, value in variables.items() if value is not None})
        return {
            "id": "Qg==",
            "name": run["name"],
            "displayName": run.get("displayName") or run["name"],
            "description": None,
            "config": run.get("config") or "{}",
            "sweepName": None,
            "project": {"id": "UA==", "name": run.get("project") or "p", "entity": _ENTITY_OBJECT},
            "historyLineCount": len(self.owner.rows.get(run["name"], {})),
        }

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        name = variables.get("name")
        if name not in self.owner.runs:
            return None
        rows = self.owner.rows.get(name, {})
        tail = [json.dumps(rows[max(rows)])] if rows else []
        bucket = {
            "id": "Qg==",
            "name": name,
            "summaryMetrics": "{}",
            "displayName": name,
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": self.owner.runs[name].get("config") or "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }
        return {"id": "UA==", "name": "p", "entity": _ENTITY_OBJECT, "bucket": bucket}

    def _public_run(self, name: str) -> dict[str, Any] | None:
        if name not in self.owner.runs:
            return None
        return {
            "id": "Qg==",
            "name": name,
            "displayName": name,
            "projectId": "1",
            "tags": [],
            "state": "finished",
            "config": "{}",
            "group": None,
            "jobType": None,
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "description": None,
            "notes": None,
            "systemMetrics": "{}",
            "summaryMetrics": "{}",
            "historyLineCount": len(self.owner.rows.get(name, {})),
            "user": {"name": ENTITY, "username": ENTITY},
            "historyKeys": None,
            "sweepName": None,
        }

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _reply(self, content: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(content).encode()
        try:
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client was killed meanwhile
            pass


_ENTITY_OBJECT = {"id": "RQ==", "name": ENTITY}

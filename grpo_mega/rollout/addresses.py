"""A file of server addresses, one on each line: how a run finds servers that somebody else starts, perhaps
later and on another host. It is there while all of them answer, and away while one is started again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from grpo_mega.errors import UserError

LOOK_EVERY_SECONDS = 0.5
ANSWER_SECONDS = 5.0


def write_addresses(path: Path, urls: Sequence[str]) -> None:
    """Nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.writing")
    draft.write_text("".join(f"{url}\n" for url in urls), encoding="utf-8")
    draft.replace(path)


def wait_for_addresses(path: Path, limit_seconds: float) -> tuple[str, ...]:
    """What the file says once every server in it answers; it may be left over from servers that are gone."""
    deadline = time.monotonic() + limit_seconds
    while True:
        urls = _read(path)
        silent = next((url for url in urls if not _answers(url)), None)
        if urls and silent is None:
            return urls
        if time.monotonic() >= deadline:
            what = f"{path} names {silent}, which does not answer" if urls else f"{path} names no servers"
            raise UserError(
                f"{what}, after {limit_seconds:g} s",
                where="rollout.sglang.urls_file",
                law="the file has the address of each server on a line of its own, and all of them answer",
                remedy="look at what should have started them (grpo-mega serve RECIPE --urls FILE), or raise "
                "rollout.sglang.urls_wait_seconds",
            )
        time.sleep(LOOK_EVERY_SECONDS)


def _read(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    urls = tuple(line.strip().rstrip("/") for line in lines if line.strip())
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"{url!r} is no address of a server",
                where=str(path),
                law="each line is http://host:port of one server",
                remedy="correct the file, or let `grpo-mega serve --urls` write it",
            )
    return urls


def _answers(url: str) -> bool:
    try:
        secure = url.startswith("https:")
        answer = httpx.get(f"{url}/model_info", timeout=ANSWER_SECONDS, trust_env=False, verify=secure)
        return answer.status_code == 200
    except httpx.HTTPError:
        return False

"""How a run finds servers that somebody else starts, perhaps later and on another host.

A file has their addresses, one on each line: it is there while all of them answer, and away while one is
started again. Or a router in front of them tells which they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
    return _wait_for(
        lambda: _read(path),
        str(path),
        limit_seconds,
        where="rollout.sglang.urls_file",
        law="the file has the address of each server on a line of its own, and all of them answer",
        remedy="look at what should have started them (grpo-mega serve RECIPE --urls FILE), or raise "
        "rollout.sglang.urls_wait_seconds",
    )


def wait_for_workers(router: str, limit_seconds: float) -> tuple[str, ...]:
    """The servers behind a router, once there is one and all that it thinks well of answer."""
    return _wait_for(
        lambda: tuple(sorted(healthy_workers(router))),
        router,
        limit_seconds,
        where="rollout.sglang.router",
        law="the router lists its servers at /workers, by addresses that the trainer reaches: each of them "
        "is given weights",
        remedy="look at the router and its servers, name the servers in rollout.sglang.urls, or raise "
        "rollout.sglang.urls_wait_seconds",
    )


def healthy_workers(router: str) -> set[str]:
    """Servers that a router sends requests to; none, when it does not answer."""
    try:
        workers = _get(f"{router.rstrip('/')}/workers").raise_for_status().json()["workers"]
        return {worker["url"].rstrip("/") for worker in workers if worker["is_healthy"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError):  # TypeError: JSON of another shape
        return set()


def _wait_for(
    read: Callable[[], tuple[str, ...]],
    source: str,
    limit_seconds: float,
    *,
    where: str,
    law: str,
    remedy: str,
) -> tuple[str, ...]:
    deadline = time.monotonic() + limit_seconds
    while True:
        urls = read()
        silent = next((url for url in urls if not _answers(url)), None)
        if urls and silent is None:
            return urls
        if time.monotonic() >= deadline:
            what = f"{source} names {silent}, which does not answer" if urls else f"{source} names no servers"
            raise UserError(f"{what}, after {limit_seconds:g} s", where=where, law=law, remedy=remedy)
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
        return _get(f"{url}/model_info").status_code == 200
    except httpx.HTTPError:
        return False


def _get(url: str) -> httpx.Response:
    secure = url.startswith("https:")  # else without certificates, which take long to load
    return httpx.get(url, timeout=ANSWER_SECONDS, trust_env=False, verify=secure)

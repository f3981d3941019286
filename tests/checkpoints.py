"""A folder of checkpoints as a run writes it, without weights worth the name."""

from __future__ import annotations

from pathlib import Path

from grpo_mega.checkpoints import (
    LATEST,
    Fingerprint,
    RunState,
    folder_of,
    partial_of,
    point_to,
    publish,
    write_state,
)


def write(directory: Path, step: int, *, pass_rate: float | None = None, point: bool = True) -> Path:
    target = folder_of(directory, step)
    partial = partial_of(target)
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(bytes(range(200)) * step)
    (partial / "common.pt").write_bytes(b"common")
    write_state(partial, RunState(step, 0, step, pass_rate, {"guard": {"tier": 1}}))
    publish(partial, {"__0_0.distcp": Fingerprint.of(partial / "__0_0.distcp")})
    if point:
        point_to(directory, LATEST, target)
    return target

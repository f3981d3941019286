"""Distributed checkpoints: every rank writes its shards, any layout reads them back.

checkpoints/step_000050/   Megatron's torch_dist format (weights and optimizer) plus state.json (where the run
stands) checkpoints/latest         the name of the newest complete checkpoint, replaced atomically, last of
all
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from dataclasses import asdict, dataclass
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from grpo_mega.engine.model import unwrap
from grpo_mega.engine.optimizer import allocate_state
from grpo_mega.engine.parallel import checkpoint_metadata
from grpo_mega.engine.policy import PolicyEngine
from grpo_mega.errors import UserError
from grpo_mega.lifetime import die_with_parent


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands: everything else it needs follows from its recipe, its seed and these numbers.

    Example: RunState(step=180, stage_index=1, stage_step=30): 30 steps of the second stage are done, 180 in
    all. At a stage's end stage_step is its length: given more steps, a finished run goes on.
    """

    step: int
    stage_index: int
    stage_step: int


def save_checkpoint(engine: PolicyEngine, directory: Path, state: RunState, keep: int) -> Path:
    """Write and only then name a checkpoint; drop all but the newest `keep`. A collective."""
    target = directory / f"step_{state.step:06d}"
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    dist.barrier()
    _save(_sharded_state(engine, is_loading=False), target)
    if dist.get_rank() == 0:
        (target / "state.json").write_text(json.dumps(asdict(state)))
        _write_atomically(directory / "latest", target.name)
        for old in sorted(directory.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def load_checkpoint(engine: PolicyEngine, directory: Path) -> RunState:
    """Restore weights and optimizer from a checkpoint written on any layout. A collective."""
    loaded = _load(_sharded_state(engine, is_loading=True), directory)
    _take_weights(engine, loaded)
    engine.optimizer.load_state_dict(loaded["optimizer"])
    return read_state(directory)


def read_state(directory: Path) -> RunState:
    return RunState(**json.loads((directory / "state.json").read_text()))


def save_weights(engine: PolicyEngine, directory: Path) -> None:
    """Weights alone, such as a reference model's. A collective."""
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    dist.barrier()
    _save(_sharded_models(engine), directory)


def load_weights(engine: PolicyEngine, directory: Path) -> None:
    """The weights of any checkpoint, without its optimizer. A collective."""
    _take_weights(engine, _load(_sharded_models(engine), directory))
    engine.weights_changed()


def _save(sharded: dict[str, Any], directory: Path) -> None:
    """Megatron's writer starts a helper process that it would leave behind when a rank is killed: ours ends
    with the rank."""
    if filesystem_async._results_queue is None:
        helper = SyncManager(ctx=multiprocessing.get_context("spawn"))
        helper.start(die_with_parent, (os.getpid(),))
        filesystem_async._results_queue = helper.Queue()
    dist_checkpointing.save(sharded, str(directory))


def _load(sharded: dict[str, Any], directory: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", dist_checkpointing.load(sharded, str(directory)))


def _take_weights(engine: PolicyEngine, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(engine.chunks):
        unwrap(chunk).load_state_dict(loaded[_chunk_key(engine, index)])


def find_checkpoint(directory: Path, step: int | None = None) -> Path:
    """The newest complete checkpoint, or that of a step."""
    latest = directory / "latest"
    if step is None and latest.is_file():
        return directory / latest.read_text().strip()
    wanted = directory / f"step_{step or 0:06d}"
    if step is not None and (wanted / "state.json").is_file():
        return wanted
    present = sorted(path.name for path in directory.glob("step_*") if (path / "state.json").is_file())
    raise UserError(
        f"no checkpoint {'of step ' + str(step) if step is not None else ''} in {directory}".replace(
            "  ", " "
        ),
        where=str(directory),
        law="a run's checkpoints are folders step_NNNNNN with a state.json",
        remedy=f"choose one of {', '.join(present)}" if present else "train the run first",
    )


def _chunk_key(engine: PolicyEngine, index: int) -> str:
    return f"model{index}" if len(engine.chunks) > 1 else "model"


def _sharded_models(engine: PolicyEngine) -> dict[str, Any]:
    return {
        _chunk_key(engine, index): unwrap(chunk).sharded_state_dict(metadata=checkpoint_metadata())
        for index, chunk in enumerate(engine.chunks)
    }


def _sharded_state(engine: PolicyEngine, *, is_loading: bool) -> dict[str, Any]:
    allocate_state(engine.optimizer)
    state = _sharded_models(engine)
    models = dict(state) if len(engine.chunks) > 1 else state["model"]
    state["optimizer"] = engine.optimizer.sharded_state_dict(
        models, is_loading=is_loading, metadata=checkpoint_metadata()
    )
    return state


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    os.replace(temporary, path)

"""What of a model goes into a checkpoint, and back: Megatron's torch_dist format, readable on any layout.

How the folders are named, checked and kept stands in `checkpoints`; how they are written in `engine.saver`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing

from grpo_mega.checkpoints import RunState, candidates, faults, read_state
from grpo_mega.engine.model import unwrap
from grpo_mega.engine.optimizer import allocate_state
from grpo_mega.engine.parallel import checkpoint_metadata
from grpo_mega.engine.policy import PolicyEngine
from grpo_mega.errors import UserError


def load_checkpoint(engine: PolicyEngine, folder: Path) -> RunState:
    """Restore weights and optimizer from a checkpoint written on any layout. A collective."""
    loaded = _load(sharded_state(engine, is_loading=True), folder)
    _take_weights(engine, loaded)
    engine.optimizer.load_state_dict(loaded["optimizer"])
    return read_state(folder)


def load_weights(engine: PolicyEngine, folder: Path) -> None:
    """The weights of any checkpoint, without its optimizer. A collective."""
    _take_weights(engine, _load(sharded_models(engine), folder))
    engine.weights_changed()


def sound_checkpoint(directory: Path, say: Callable[[str], None], step: int | None = None) -> Path:
    """The newest checkpoint whose every byte is as it was written, or that of a step. A collective."""
    damaged: list[str] = []
    for folder in candidates(directory, step):
        found = damage(folder)
        if not found:
            return folder
        damaged += found
        say(f"{folder.name} is damaged: {'; '.join(found)}")
    raise UserError(
        "every checkpoint is damaged: " + "; ".join(damaged),
        where=str(directory),
        law="each file has the size and the hash that its checkpoint's manifest.json lists",
        remedy="restore the files from a copy, or start the run again with --overwrite",
    )


def damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files; the ranks share the reading. A collective."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, faults(folder, share=(dist.get_rank(), dist.get_world_size())))
    return list(dict.fromkeys(fault for part in found for fault in part))


def sharded_models(engine: PolicyEngine) -> dict[str, Any]:
    """The model's part of a checkpoint: this rank's shards."""
    return {
        _chunk_key(engine, index): unwrap(chunk).sharded_state_dict(metadata=checkpoint_metadata())
        for index, chunk in enumerate(engine.chunks)
    }


def sharded_state(engine: PolicyEngine, *, is_loading: bool) -> dict[str, Any]:
    """Model and optimizer."""
    allocate_state(engine.optimizer)
    state = sharded_models(engine)
    models = dict(state) if len(engine.chunks) > 1 else state["model"]
    state["optimizer"] = engine.optimizer.sharded_state_dict(
        models, is_loading=is_loading, metadata=checkpoint_metadata()
    )
    return state


def _load(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", dist_checkpointing.load(sharded, str(folder)))


def _take_weights(engine: PolicyEngine, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(engine.chunks):
        unwrap(chunk).load_state_dict(loaded[_chunk_key(engine, index)])


def _chunk_key(engine: PolicyEngine, index: int) -> str:
    return f"model{index}" if len(engine.chunks) > 1 else "model"

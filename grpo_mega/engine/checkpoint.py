"""What of a model goes into a checkpoint, and back: Megatron's torch_dist format, readable on any layout.

How the folders are named, checked and kept stands in `checkpoints`; how they are written in `engine.saver`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import load_tensors_metadata
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import MegatronOptimizer

from grpo_mega.checkpoints import RunState, candidates, faults, read_state
from grpo_mega.engine.model import unwrap
from grpo_mega.engine.optimizer import allocate_state
from grpo_mega.engine.parallel import checkpoint_metadata
from grpo_mega.errors import UserError


class Engine(Protocol):
    """A model with its optimizer on this rank: the policy's, or one beside it."""

    optimizer: MegatronOptimizer

    @property
    def chunks(self) -> Sequence[torch.nn.Module]: ...

    def weights_changed(self) -> None: ...


Companions = Mapping[str, Engine]
"""Engines beside the policy's, by the name under which a checkpoint holds them."""


def load_checkpoint(engine: Engine, folder: Path, companions: Companions | None = None) -> RunState:
    """Restore weights and optimizers from a checkpoint written on any layout. A collective."""
    companions = companions or {}
    for name in companions:
        _require(name, folder)
    loaded = _load(sharded_states(engine, companions, is_loading=True), folder)
    for each, state in ((engine, loaded), *((companions[name], loaded[name]) for name in companions)):
        _take_weights(each, state)
        each.optimizer.load_state_dict(state["optimizer"])
    return read_state(folder)


def _require(companion: str, folder: Path) -> None:
    """That the checkpoint holds a model of this name: every rank looks, and every rank stops."""
    if any(key.startswith(f"{companion}.") for key in load_tensors_metadata(str(folder))):
        return
    raise UserError(
        f"{folder.name} holds no {companion}, and this recipe has one",
        where=str(folder),
        law="--resume goes on with every model of the recipe, from the run's newest checkpoint",
        remedy=f"resume with {companion}.kind=none, or begin a new run: another run.dir, or --overwrite; to "
        "start from what this one has learnt, grpo-mega export it and set model.hf to that directory",
    )


def load_weights(engine: Engine, folder: Path) -> None:
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


def sharded_models(engine: Engine) -> dict[str, Any]:
    """The model's part of a checkpoint: this rank's shards."""
    return {
        _chunk_key(engine, index): unwrap(chunk).sharded_state_dict(metadata=checkpoint_metadata())
        for index, chunk in enumerate(engine.chunks)
    }


def sharded_states(engine: Engine, companions: Companions, *, is_loading: bool) -> dict[str, Any]:
    """The policy's model and optimizer, and those of every companion under its name."""
    state = sharded_state(engine, is_loading=is_loading)
    for name, companion in companions.items():
        state[name] = sharded_state(companion, is_loading=is_loading)
        add_prefix_for_sharding(state[name], f"{name}.")
    return state


def sharded_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
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


def _take_weights(engine: Engine, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(engine.chunks):
        unwrap(chunk).load_state_dict(loaded[_chunk_key(engine, index)])


def _chunk_key(engine: Engine, index: int) -> str:
    return f"model{index}" if len(engine.chunks) > 1 else "model"

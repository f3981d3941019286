"""Writes checkpoints: every rank its shards, in the background where asked, and either whole or not at all.

A checkpoint grows in a folder called `.partial`. A rank that cannot write tells the others; then the folder
goes, and the checkpoints that were there stay. Only when all is on disk do the folder and then `latest` get
their names.

Every function here that is called on one rank is called on all of them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import queue
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller

from grpo_mega.checkpoints import (
    BEST,
    LATEST,
    Fingerprint,
    RunState,
    best_so_far,
    folder_of,
    partial_of,
    point_to,
    prune,
    publish,
    write_state,
)
from grpo_mega.engine.checkpoint import Companions, Engine, sharded_models, sharded_states
from grpo_mega.errors import UserError
from grpo_mega.lifetime import die_with_parent, serve_parent

PRINTS = ".prints_"
"""What a rank's writer leaves for rank 0: the fingerprints of its files."""
ROOM = 1.05
"""Free space asked for, relative to the tensors' bytes."""
PROBE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a checkpoint. `fault` is None when it is complete."""

    name: str
    seconds: float
    fault: str | None = None


class Saver:
    """A run's checkpoints.

    saver.save(state)     # starts; one that is still being written is finished first
    saver.poll()          # after every step: what has finished meanwhile
    saver.finish()        # waits for what is being written
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        *,
        keep: int,
        keep_best: bool,
        background: bool,
        companions: Companions | None = None,
    ):
        self._engine, self._directory, self._companions = engine, directory, companions or {}
        self._keep, self._keep_best, self._background = keep, keep_best, background
        self._writing: _Writing | None = None
        self._state: RunState | None = None

    def save(self, state: RunState, *, wait: bool = False) -> list[Outcome]:
        outcomes = self.finish()
        target = folder_of(self._directory, state.step)
        began = time.monotonic()
        sharded = sharded_states(self._engine, self._companions, is_loading=False)
        fault = _agree(_no_room(sharded, target))
        if fault is not None:
            return [*outcomes, Outcome(target.name, time.monotonic() - began, fault)]
        self._writing = _Writing(sharded, target, background=self._background and not wait)
        self._state = state
        return [*outcomes, *(self.finish() if wait or not self._background else [])]

    def poll(self) -> list[Outcome]:
        if self._writing is None or not self._writing.is_done():
            return []
        return self.finish()

    def finish(self) -> list[Outcome]:
        if self._writing is None:
            return []
        writing, self._writing = self._writing, None
        assert self._state is not None
        return [writing.complete(partial(self._name, self._state), self._state)]

    def save_weights(self, target: Path) -> list[Outcome]:
        """Weights alone, such as a reference model's. One writer at a time: Megatron keeps one queue of
        results for all of them."""
        outcomes = self.finish()
        save_weights(self._engine, target)
        return outcomes

    def _name(self, state: RunState, target: Path) -> None:
        """On rank 0, once the folder is complete."""
        best = best_so_far(self._directory)
        if self._keep_best and state.pass_rate is not None and (best is None or state.pass_rate > best):
            point_to(self._directory, BEST, target)
        point_to(self._directory, LATEST, target)
        prune(self._directory, self._keep, (LATEST, BEST) if self._keep_best else (LATEST,))


def save_weights(engine: Engine, target: Path) -> None:
    """Weights alone, all or nothing. Not while a `Saver` is writing: see `Saver.save_weights`."""
    sharded = sharded_models(engine)
    fault = _agree(_no_room(sharded, target))
    if fault is None:
        fault = _Writing(sharded, target, background=False).complete(_stay_unnamed, None).fault
    if fault is not None:
        raise UserError(fault, where=str(target), remedy="make room there, or set run.dir to another disk")


def _stay_unnamed(target: Path) -> None:
    """No pointer names a folder of weights alone."""


class _Writing:
    """One checkpoint on its way to the disk."""

    def __init__(self, sharded: dict[str, Any], target: Path, *, background: bool):
        self._target, self._partial, self._began = target, partial_of(target), time.monotonic()
        _share_results()
        request = dist_checkpointing.save(sharded, str(self._partial), async_sharded_save=True)
        assert request is not None
        write: Callable[..., None] | None = request.async_fn
        if write is not None:
            write = partial(_write_and_hash, write, self._partial, os.getpid())
        self._request: AsyncRequest = request._replace(async_fn=write)
        self._results: Any = request.async_fn_args[2] if write is not None else None
        self._caller = TemporalAsyncCaller() if background else None
        if self._caller is not None:
            self._caller.schedule_async_call(self._request)
        elif write is not None:
            rank, buckets, results = self._request.async_fn_args
            write(rank, self._request.preload_fn() if self._request.preload_fn else buckets, results)

    def is_done(self) -> bool:
        """On all ranks."""
        assert self._caller is not None
        return self._caller.is_current_async_call_done(blocking=False)

    def complete(self, name: Callable[[Path], None], state: RunState | None) -> Outcome:
        """Wait for the shards of all ranks, then give the folder its name, or take it away."""
        if self._caller is not None:
            self._caller.is_current_async_call_done(blocking=True)
        fault = _agree(self._fault())
        if fault is None:
            for finalize in self._request.finalize_fns:
                finalize()
            fault = _agree(self._publish(name, state) if dist.get_rank() == 0 else None)
        if fault is not None and dist.get_rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        return Outcome(self._target.name, time.monotonic() - self._began, fault)

    def _fault(self) -> str | None:
        """Of this rank's writer. Its results are put back for Megatron, unless they are a failure."""
        if self._results is None:
            return None
        try:
            results = self._results.get_nowait()
        except queue.Empty:
            return f"rank {dist.get_rank()}: the writer of {self._partial.name} died"
        missing = not (self._partial / f"{PRINTS}{dist.get_rank()}").is_file()
        if isinstance(results, Exception) or missing:
            free = shutil.disk_usage(self._partial).free / 1e9
            return (
                f"rank {dist.get_rank()} could not write {self._partial.name} ({free:.2f} GB free): {results}"
            )
        self._results.put(results)
        return None

    def _publish(self, name: Callable[[Path], None], state: RunState | None) -> str | None:
        try:
            prints: dict[str, Fingerprint] = {}
            for note in sorted(self._partial.glob(f"{PRINTS}*")):
                prints |= {file: Fingerprint(**entry) for file, entry in json.loads(note.read_text()).items()}
                note.unlink()
            if state is not None:
                write_state(self._partial, state)
            name(publish(self._partial, prints))
        except OSError as error:
            return f"{self._partial.name} could not be completed: {error}"
        return None


def _write_and_hash(
    write: Callable[..., None], folder: Path, parent: int, rank: int, buckets: Sequence[Any], results: Any
) -> None:
    """In the writer's process: the shards, then what they must look like when they are read."""
    if os.getpid() != parent:
        serve_parent(parent)
        # Megatron writes in a process of its own below this one, and that ends with this one, too.
        os.register_at_fork(after_in_child=die_with_parent)
    write(rank, buckets, results)
    paths = [Path(bucket[0]) for bucket in buckets]
    with suppress(OSError):  # a file that is not there: the results say why
        prints = {path.name: Fingerprint.of(path) for path in paths}
        note = {name: {"size": entry.size, "blake2b": entry.blake2b} for name, entry in prints.items()}
        (folder / f"{PRINTS}{rank}").write_text(json.dumps(note))


def _no_room(sharded: dict[str, Any], target: Path) -> str | None:
    """Clear the way; why not, where the disk has no room: found before the first collective of the
    writers."""
    needed = torch.tensor([_bytes_of(sharded)], dtype=torch.int64)
    gathered: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(gathered, int(needed))
    if dist.get_rank() != 0:
        return None
    folder = partial_of(target)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        free, total = shutil.disk_usage(folder).free, int(sum(gathered) * ROOM)
        if free < total:
            folder.rmdir()
            return (
                f"{target.name} needs {total / 1e9:.2f} GB and {folder.parent} has {free / 1e9:.2f} GB free"
            )
        probe = folder / "probe"
        probe.write_bytes(bytes(PROBE_BYTES))  # quotas do not show in the free space
        probe.unlink()
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return f"{target.name} cannot be written: {error}"
    return None


def _bytes_of(sharded: dict[str, Any]) -> int:
    """Of this rank's part; replicas are counted too, which only asks for more room."""
    parts = (getattr(value, "data", None) for value in nested_values(sharded))
    return sum(data.numel() * data.element_size() for data in parts if isinstance(data, torch.Tensor))


def _agree(fault: str | None) -> str | None:
    """The first fault of any rank, on all ranks."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, fault)
    return next((text for text in found if text is not None), None)


def _share_results() -> None:
    """Megatron's writer starts a helper process that it would leave behind when a rank is killed: ours ends
    with the rank."""
    if filesystem_async._results_queue is None:
        helper = SyncManager(ctx=multiprocessing.get_context("spawn"))
        helper.start(serve_parent, (os.getpid(),))
        filesystem_async._results_queue = _Packed(helper.Queue())


@dataclass(frozen=True, slots=True)
class _Packed:
    """What Megatron asks of a queue. The helper only holds bytes: for results it would import torch."""

    results: queue.Queue[bytes]

    def put(self, item: Any) -> None:
        self.results.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        return pickle.loads(self.results.get_nowait())

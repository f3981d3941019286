"""New weights for SGLang servers: streamed bucket by bucket, proved, then called by their new version.

    disk         safetensors in a folder that appears when complete; servers must see it.
    tensor       the bytes themselves, over HTTP (a third larger on the way: base64).
    distributed  a broadcast from rank 0 in a process group with all servers (gloo on CPU, NCCL on GPU).

A transport is used in this order: begin, send for each bucket, finish; or abandon, when something failed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from grpo_mega.sync.fingerprint import Fingerprint
from grpo_mega.sync.group import lead_group
from grpo_mega.sync.servers import ControlPlane, SyncFailed

NamedTensors = list[tuple[str, torch.Tensor]]
BUCKET_BYTES = 256 * 1024**2
"""The most that is held besides the model, unless one tensor is larger."""
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class SyncReport:
    """Example: SyncReport(version="a3-7", seconds=.4, bytes=2_000_000, attempts=1)"""

    version: str
    seconds: float
    bytes: int
    attempts: int

    def metrics(self) -> dict[str, float]:
        return {
            "sync/seconds": self.seconds,
            "sync/bytes": float(self.bytes),
            "sync/mb_per_second": self.bytes / 1e6 / self.seconds,
            "sync/attempts": float(self.attempts),
        }


class Transport(Protocol):
    def begin(self, version: str) -> None: ...
    def send(self, bucket: NamedTensors) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...


def buckets(tensors: Iterator[tuple[str, torch.Tensor]], limit: int = BUCKET_BYTES) -> Iterator[NamedTensors]:
    """Tensors on the CPU or where they are, as copies: the stream may use its memory again."""
    held: NamedTensors = []
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            yield held
            held, size = [], 0
        held.append((name, tensor.detach().clone(memory_format=torch.contiguous_format)))
        size += tensor.nbytes
    if held:
        yield held


def push(
    tensors: Iterator[tuple[str, torch.Tensor]],
    version: str,
    transport: Transport,
    prove: Callable[[Fingerprint], None],
    bucket_bytes: int = BUCKET_BYTES,
) -> int:
    """One attempt; the bytes sent. A failure raises SyncFailed after the stream is at its end: it is a
    collective, and the other ranks must not wait for this one."""
    fingerprint, size = Fingerprint(), 0
    try:
        transport.begin(version)
        for bucket in buckets(tensors, bucket_bytes):
            for name, tensor in bucket:
                fingerprint.add(name, tensor)
                size += tensor.nbytes
            transport.send(bucket)
        transport.finish()
        prove(fingerprint)
    except (SyncFailed, OSError, SafetensorError) as failure:
        for _ in tensors:
            pass
        with suppress(SyncFailed, OSError):
            transport.abandon()
        if isinstance(failure, SyncFailed):
            raise
        raise SyncFailed(f"{type(failure).__name__}: {failure}") from failure
    return size


@dataclass(eq=False)
class DiskTransport:
    """Publishes `weights-<version>` below `folder`; the previous one goes when the servers have the next."""

    servers: ControlPlane
    folder: Path
    model: Path  # config.json, for who reads the folder as a model
    _draft: Path = field(init=False)
    _published: Path = field(init=False)
    _files: dict[str, str] = field(init=False)
    _weight_map: dict[str, str] = field(init=False)

    def begin(self, version: str) -> None:
        self._published = self.folder / f"weights-{version}"
        self._draft = self.folder / f"weights-{version}.writing"
        self._files, self._weight_map = {}, {}
        shutil.rmtree(self._draft, ignore_errors=True)
        self._draft.mkdir(parents=True)

    def send(self, bucket: NamedTensors) -> None:
        name = f"model-{len(self._files) + 1:05d}.safetensors"
        on_cpu = {key: tensor.cpu() for key, tensor in bucket}
        save_file(on_cpu, self._draft / name, metadata={"format": "pt"})
        self._files[name] = sha256_of(self._draft / name)
        self._weight_map |= dict.fromkeys(on_cpu, name)

    def finish(self) -> None:
        index = {"metadata": {}, "weight_map": self._weight_map}
        (self._draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for file in self.model.glob("*.json"):
            shutil.copy(file, self._draft)
        (self._draft / MANIFEST).write_text(json.dumps({"sha256": self._files}, indent=1))
        shutil.rmtree(self._published, ignore_errors=True)
        self._draft.rename(self._published)
        check_manifest(self._published)
        self.servers.post(
            "update_weights_from_disk",
            {"model_path": str(self._published.resolve()), "load_format": "auto", "flush_cache": True},
        )
        for folder in self.folder.glob("weights-*"):
            if folder != self._published:
                shutil.rmtree(folder, ignore_errors=True)

    def abandon(self) -> None:
        shutil.rmtree(self._draft, ignore_errors=True)
        shutil.rmtree(self._published, ignore_errors=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_manifest(folder: Path) -> None:
    """Every file is what was written, as read back from the file system."""
    for name, expected in json.loads((folder / MANIFEST).read_text())["sha256"].items():
        if sha256_of(folder / name) != expected:
            raise SyncFailed(f"{folder / name} is not what was written there")


@dataclass(eq=False)
class _Session:
    """Newer servers take weights only between two calls, in which they unpack and repack them."""

    servers: ControlPlane
    _needed: bool | None = None  # not asked yet

    def open(self) -> None:
        if self._needed is None:
            self._needed = all(self.servers.has(url, "begin_weight_update") for url in self.servers.urls)
        if self._needed:
            with suppress(SyncFailed):
                self.servers.post("end_weight_update", {})  # one that a failed attempt left open
            self.servers.post("begin_weight_update", {})

    def close(self) -> None:
        if self._needed:
            self.servers.post("end_weight_update", {})


@dataclass(eq=False)
class TensorTransport:
    servers: ControlPlane
    _session: _Session = field(init=False)

    def __post_init__(self) -> None:
        self._session = _Session(self.servers)

    def begin(self, version: str) -> None:
        self._session.open()

    def send(self, bucket: NamedTensors) -> None:
        # Plain pickle, bytes included: handles to shared memory would kill a server elsewhere.
        plain = [(name, tensor.cpu()) for name, tensor in bucket]
        payload = base64.b64encode(pickle.dumps(plain)).decode()
        self.servers.post(
            "update_weights_from_tensor",
            {"serialized_named_tensors": [payload] * self.servers.tp, "flush_cache": False},
        )

    def finish(self) -> None:
        self._session.close()
        self.servers.post("flush_cache", {})

    def abandon(self) -> None:
        self._session.close()


@dataclass(eq=False)
class DistributedTransport:
    """Rank 0 of the group is here; then come the ranks of each server."""

    servers: ControlPlane
    address: str
    free_port: Callable[[], int]
    backend: str
    limit_seconds: float = 120.0
    _session: _Session = field(init=False)
    _group: Any = field(default=None, init=False)
    _name: str = field(default="", init=False)
    _groups_so_far: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._session = _Session(self.servers)

    def begin(self, version: str) -> None:
        if self._group is None:
            self._join(version)
        self._session.open()

    def _join(self, version: str) -> None:
        port, size = self.free_port(), 1 + self.servers.tp * len(self.servers.urls)
        self._name = f"weights-{version}"
        body = {
            "master_address": self.address,
            "master_port": port,
            "world_size": size,
            "group_name": self._name,
            "backend": self.backend,
        }
        joined = self.servers.started(
            lambda index, url: self.servers.call(
                url, "init_weights_update_group", body | {"rank_offset": 1 + index * self.servers.tp}
            )
        )
        try:
            self._group = lead_group(self.address, port, size, self._name, self.backend, self.limit_seconds)
        except (RuntimeError, ValueError) as error:  # torch's errors of meeting and of transport
            raise SyncFailed(f"no group with the servers: {error}") from error
        joined()

    def send(self, bucket: NamedTensors) -> None:
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._name,
            "flush_cache": False,
        }
        received = self.servers.started(
            lambda _, url: self.servers.call(url, "update_weights_from_distributed", body)
        )
        try:
            for _, tensor in bucket:
                dist.broadcast(tensor, src=0, group=self._group)
        except RuntimeError as error:
            raise SyncFailed(f"the broadcast broke: {error}") from error
        received()

    def finish(self) -> None:
        self._session.close()
        self.servers.post("flush_cache", {})

    def abandon(self) -> None:
        """A group that lost a member never recovers: the next attempt makes another."""
        group, self._group = self._group, None
        if group is not None:
            with suppress(RuntimeError):
                dist.destroy_process_group(group)
        with suppress(SyncFailed):
            self.servers.post("destroy_weights_update_group", {"group_name": self._name})
        self._session.close()

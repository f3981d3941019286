"""Two run folders, compared to the last bit: metrics that no clock makes, and all tensors. For golden.py."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

CLOCK = ("time", "perf/*", "sync/seconds", "sync/mb_per_second")
"""What a clock makes: these have to be there, with any value."""
PLACE = ("step", "stage", "stage_step")
ABSENT = "absent"


@dataclass(frozen=True)
class Tolerance:
    """Metrics whose values may differ by this much of the larger one."""

    pattern: str
    relative: float


@dataclass
class Comparison:
    """`first` is the first difference in words; names are those of metrics and tensors that differ."""

    numbers: int = 0
    tensors: int = 0
    first: str | None = None
    metric_names: set[str] = field(default_factory=set)
    tensor_names: set[str] = field(default_factory=set)
    tolerated: dict[str, float] = field(default_factory=dict)  # name: largest relative difference

    def differs(self, text: str) -> None:
        self.first = self.first or text

    def verdict(self) -> str:
        if self.first is None:
            return f"equal: {self.numbers:,} numbers, {self.tensors:,} tensors"
        metrics, tensors = len(self.metric_names), f"{len(self.tensor_names)} of {self.tensors}"
        return f"DIFFERENT {self.first}; different metrics: {metrics}, tensors: {tensors}"


def compare(folders: tuple[Path, Path], tolerances: Sequence[Tolerance], into: Comparison) -> None:
    """Two run folders."""
    base, new = (_lines(folder / "metrics.jsonl") for folder in folders)
    for folder, lines in zip(folders, (base, new), strict=True):
        if not lines:
            into.differs(f"no metrics in {folder}")
    for old_line, new_line in zip(base, new, strict=False):
        _compare_lines(old_line, new_line, tolerances, into)
    if len(base) != len(new):
        into.differs(f"lines of metrics.jsonl: {len(base)} against {len(new)}")
    _compare_tensors(_tensors(folders[0]), _tensors(folders[1]), into)


def _lines(path: Path) -> list[dict[str, Any]]:
    """In the order of the steps; a step may have several: its own and that of an evaluation."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(lines, key=lambda line: line["step"])


def _compare_lines(
    base: dict[str, Any], new: dict[str, Any], tolerances: Sequence[Tolerance], into: Comparison
) -> None:
    for name in dict.fromkeys((*base, *new)):
        old_value, new_value = base.get(name, ABSENT), new.get(name, ABSENT)
        into.numbers += 1
        in_both = name in base and name in new
        if repr(old_value) == repr(new_value) or (in_both and _matches(name, CLOCK)):
            continue
        distance = _relative(old_value, new_value)
        allowed = [each.relative for each in tolerances if fnmatchcase(name, each.pattern)]
        if name not in PLACE and distance <= max(allowed, default=-1.0):
            into.tolerated[name] = max(distance, into.tolerated.get(name, 0.0))
            continue
        into.metric_names.add(name)
        into.differs(f"{name} at step {base['step']}: {old_value!r} against {new_value!r}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _relative(base: object, new: object) -> float:
    """Infinite where one is no number: NaN is a text in metrics.jsonl, and equal to itself alone."""
    if not isinstance(base, int | float) or not isinstance(new, int | float):
        return math.inf
    return abs(base - new) / max(abs(base), abs(new), sys.float_info.min)


def _tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of the exported model, and of the newest checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted((run_dir / "hf").glob("*.safetensors")):
        found |= {f"hf/{name}": tensor for name, tensor in load_file(path).items()}
    latest = run_dir / "checkpoints" / "latest"
    if latest.is_file():
        loaded = _checkpoint(latest.with_name(latest.read_text(encoding="utf-8").strip()))
        found |= {f"checkpoint/{name}": tensor for name, tensor in loaded.items()}
    return found


def _checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Whole tensors, whatever ranks wrote them; without Megatron, which would want its model."""
    reader = FileSystemReader(folder)
    kept = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in kept.items()
        if isinstance(each, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a single process
        load(state, storage_reader=reader, no_dist=True)
    return state


def _compare_tensors(base: dict[str, torch.Tensor], new: dict[str, torch.Tensor], into: Comparison) -> None:
    for kind in ("hf/", "checkpoint/"):
        for which, tensors in (("first", base), ("second", new)):
            if not any(name.startswith(kind) for name in tensors):
                into.differs(f"no tensors in {kind} of the {which} run")
    for name in dict.fromkeys((*base, *new)):
        into.tensors += 1
        if name not in base or name not in new:
            into.tensor_names.add(name)
            into.differs(f"{name} is only in the {'first' if name in base else 'second'} run")
        elif (text := _tensor_difference(base[name], new[name])) is not None:
            into.tensor_names.add(name)
            into.differs(f"{name}: {text}")


def _tensor_difference(base: torch.Tensor, new: torch.Tensor) -> str | None:
    kinds = [f"{each.dtype} {tuple(each.shape)}" for each in (base, new)]
    if kinds[0] != kinds[1]:
        return " against ".join(kinds)
    old_bytes, new_bytes = (each.contiguous().reshape(-1).view(torch.uint8) for each in (base, new))
    if torch.equal(old_bytes, new_bytes):
        return None
    return f"other bytes, largest distance {(base.double() - new.double()).abs().max().item():.3g}"

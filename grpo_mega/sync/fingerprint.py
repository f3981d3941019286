"""What a server's weights must hash to, computed while they stream past.

SGLang lays q, k and v of a layer one after the other in one matrix, likewise gate and up, likewise all
experts of a layer: hashing the parts in that order hashes the whole, and only a part that comes too early is
held. It pads the rows of vocabulary matrices with zeros. Its checksum of a tensor on a CPU is the first 8
bytes of SHA-256 over its bytes. On a GPU it is another one, which cannot be computed from parts, and with
tensor parallelism each rank has its own: there the log-probs of a probe must do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_FUSED = re.compile(r"(.+)\.(q|k|v|gate|up)_proj\.(weight|bias)")
_OUTPUT_LAYER = "lm_head.weight"
_VOCABULARY = ("embed_tokens.weight", _OUTPUT_LAYER)
VOCAB_MULTIPLE = 64
"""SGLang pads vocabularies to it."""


def place_of(name: str) -> tuple[str, int]:
    """The server's tensor that this one is part of, and the number of the part.

    Example: model.layers.0.mlp.up_proj.weight is part 1 of model.layers.0.mlp.gate_up_proj.weight
    """
    if expert := _EXPERT.fullmatch(name):
        prefix, index, part = expert[1], int(expert[2]), expert[3]
        if part == "down":
            return f"{prefix}.w2_weight", index
        return f"{prefix}.w13_weight", 2 * index + (part == "up")
    if fused := _FUSED.fullmatch(name):
        prefix, part, kind = fused.groups()
        parts = ("q", "k", "v") if part in "qkv" else ("gate", "up")
        return f"{prefix}.{'qkv' if part in 'qkv' else 'gate_up'}_proj.{kind}", parts.index(part)
    return name, 0


@dataclass(eq=False, slots=True)
class _Whole:
    """A tensor of the server, as far as its parts have come."""

    hasher: Any = field(default_factory=hashlib.sha256)
    next_part: int = 0
    early: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    padding: int = 0  # bytes

    def add(self, part: int, tensor: torch.Tensor) -> None:
        self.early[part] = tensor
        while self.next_part in self.early:
            self.hasher.update(_bytes(self.early.pop(self.next_part)))
            self.next_part += 1

    def checksums(self) -> tuple[str, ...]:
        """Without and with padding; none while parts are missing."""
        if self.early:
            return ()
        padded = self.hasher.copy()
        padded.update(bytes(self.padding))
        return self.hasher.digest()[:8].hex(), padded.digest()[:8].hex()


@dataclass(eq=False)
class Fingerprint:
    """Example:
    fingerprint = Fingerprint()
    for name, tensor in stream: fingerprint.add(name, tensor)
    fingerprint.differences(checksums)  # [] when the server has exactly these weights
    """

    _wholes: dict[str, _Whole] = field(default_factory=dict[str, _Whole], init=False)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        place, part = place_of(name)
        whole = self._wholes.setdefault(place, _Whole())
        whole.add(part, tensor)
        if name.endswith(_VOCABULARY):
            rows = -tensor.shape[0] % VOCAB_MULTIPLE
            whole.padding = rows * (tensor.numel() // tensor.shape[0]) * tensor.element_size()

    def differences(self, checksums: Mapping[str, str]) -> list[str]:
        """Tensors that are not the same, or that one side lacks. An output layer tied to the embedding may be
        named by one side only."""
        mine, theirs = set(self._wholes), set(checksums)
        if (_OUTPUT_LAYER in mine) != (_OUTPUT_LAYER in theirs):
            mine.discard(_OUTPUT_LAYER)
            theirs.discard(_OUTPUT_LAYER)
        changed = {name for name in mine & theirs if checksums[name] not in self._wholes[name].checksums()}
        return sorted((mine ^ theirs) | changed)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())

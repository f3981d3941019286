"""Lets the stock sglang wheel run beside a CPU build of torch. Started by `sglang_cpu_shim.pth` with every
interpreter of the environment, so it does next to nothing until torchvision is imported.

torchvision on PyPI is linked against CUDA. Beside torch+cpu its compiled operators do not load, yet its
Python part registers fakes for two of them and fails when they were never declared. Declared they are, here,
without an implementation: nothing in text generation calls them.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _DeclareBeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; being asked for torchvision is the moment to act."""

    def __init__(self) -> None:
        self._library: object = None  # a declaration lives as long as its library object

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and self._library is None:
            import torch

            self._library = library = torch.library.Library("torchvision", "DEF")
            library.define(f"nms{_SCHEMA}")
            library.define(f"qnms{_SCHEMA}")
        return None


sys.meta_path.insert(0, _DeclareBeforeTorchvision())

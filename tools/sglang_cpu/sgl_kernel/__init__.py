"""Stands in for the CUDA-only `sglang-kernel` wheel on a machine without a GPU.

`torch.ops.sgl_kernel` stays empty, so sglang sees no CPU kernels either and takes its paths in plain torch.
What it imports by name from here raises when called, but for the one function its CPU memory pool relies on.
"""

from __future__ import annotations

from typing import NoReturn

import torch

__version__ = "0.0.0+cpu"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    *_unused: object,
) -> None:
    """Write each request's new cache places into its row: row r, columns start to end."""
    first = 0
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for request, start, end in rows:
        count = end - start
        req_to_token[request, start:end] = out_cache_loc[first : first + count].to(req_to_token.dtype)
        first += count


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_arguments: object, **_options: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU; this environment has a stand-in")

    missing.__name__ = name
    return missing

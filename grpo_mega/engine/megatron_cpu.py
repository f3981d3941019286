"""megatron-core on a machine without a GPU: the real library, in which "cuda" means "cpu".

Each loaded `megatron.core` module gets a private view of `torch`; `torch` itself stays as it is, but for two
things that cannot be given a view: `Tensor.cuda`, which on a CPU build could only raise, and `Tensor.type`
for the length of a few Megatron calls that compare its string. Written against megatron-core 0.16.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
]
_MODULES = (
    "distributed",
    "dist_checkpointing",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.torch",
    "models.gpt",
    "models.gpt.gpt_layer_specs",
    "optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "tensor_parallel.random",
    "timers",
    "transformer.moe.moe_layer",
)


def enable() -> None:
    """Import the parts of Megatron that grpo_mega uses and show them a CPU where they ask for CUDA."""
    _import_without_jit_fuser()
    view = _torch_view()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            setattr(module, "torch", view)  # noqa: B010 -- a module attribute pyright cannot know
    _give_cpu_random_state()
    _let_type_strings_say_cuda()
    _let_expert_splits_be_numbers()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _import_without_jit_fuser() -> None:
    """Megatron binds its fuser to torch.compile when first imported, which costs a C++ build for each fused
    function on CPU. Bind it to the identity instead; torch.compile stays available to our own kernels."""

    def identity(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return function if function is not None else lambda f: f

    original = torch.compile
    torch.compile = identity  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Apex and Transformer Engine are absent is no news on a CPU
            for module in _MODULES:
                importlib.import_module(f"megatron.core.{module}")
    finally:
        torch.compile = original


def _view(module: types.ModuleType, **replacements: Any) -> types.ModuleType:
    view = types.ModuleType(module.__name__)
    view.__dict__.update(module.__dict__)
    view.__dict__.update(replacements)
    # type: ignore[method-assign]  # submodules loaded later
    view.__getattr__ = lambda name: getattr(module, name)
    return view


class _FinishedStream:
    """A stream or an event on a device that works in order: whatever is asked of it has already happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Callable[..., _FinishedStream]:
        return lambda *args, **kwargs: self


def _torch_view() -> types.ModuleType:
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    cuda = _view(
        torch.cuda,
        current_device=lambda: _CPU,
        device_count=lambda: 1,
        synchronize=nothing,
        set_device=nothing,
        empty_cache=nothing,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        current_stream=lambda *args: _FinishedStream(),
        default_stream=lambda *args: _FinishedStream(),
        Stream=_FinishedStream,
        Event=_FinishedStream,
        stream=lambda *args: contextlib.nullcontext(),
        nvtx=_view(torch.cuda.nvtx, range_push=nothing, range_pop=nothing),
    )
    return _view(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _give_cpu_random_state() -> None:
    """Megatron's tracker queues its calls until CUDA is initialised, which here would be for ever."""
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Its warning that the CPU state changed inside a CUDA region is here the purpose.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _let_type_strings_say_cuda() -> None:
    """The optimizers accept a parameter only if `param.type()` reads 'torch.cuda.…Tensor'."""
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
    import megatron.core.optimizer.optimizer as optimizer

    for cls in (distrib_optimizer.DistributedOptimizer, optimizer.Float16OptimizerWithFloat16Params):
        cls.__init__ = _with_cuda_type_strings(cls.__init__)  # type: ignore[method-assign]
    clip = _with_cuda_type_strings(clip_grads.clip_grad_by_total_norm_fp32)
    optimizer.clip_grad_by_total_norm_fp32 = clip_grads.clip_grad_by_total_norm_fp32 = clip


def _let_expert_splits_be_numbers() -> None:
    """The token dispatcher turns its split sizes into arrays only when it copies them off a GPU; the
    collectives need them."""
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def as_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = as_asked


def _with_cuda_type_strings(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        original = torch.Tensor.type

        def type_with_cuda(tensor: torch.Tensor, *targs: Any, **tkwargs: Any) -> Any:
            if targs or tkwargs:
                return original(tensor, *targs, **tkwargs)
            return original(tensor).replace("torch.", "torch.cuda.", 1)

        torch.Tensor.type = type_with_cuda  # type: ignore[method-assign]
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = original  # type: ignore[method-assign]

    return wrapped

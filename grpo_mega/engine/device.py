"""What differs between a GPU and a CPU, behind names. Nothing else in the package asks which of the two it
runs on."""

from __future__ import annotations

import os
import warnings

import torch

from grpo_mega.errors import UserError

_prepared = False
_KNOWN_NOISE: tuple[tuple[str, type[Warning], str], ...] = (
    # megatron-core's own doings, repeated by every rank, and nothing a user could act on: (message, category,
    # module)
    ("full scope is deprecated", UserWarning, ""),
    ("The .grad attribute of a Tensor that is not a leaf", UserWarning, ""),
    ("When using async grad allreduce", UserWarning, ""),
    ("", FutureWarning, r"megatron\.core|torch\.distributed"),
)


def has_gpu() -> bool:
    return torch.cuda.is_available()


def process_group_backend() -> str:
    return "nccl" if has_gpu() else "gloo"


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def bind_local_rank(local_rank: int) -> None:
    """One GPU for each process; on CPU one compute thread, so that ranks do not fight over cores and sums
    keep their order."""
    if has_gpu():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs, and process {local_rank + 1} wants one",
                where="parallel.tp, parallel.pp, parallel.cp, parallel.dp",
                law="each process has a GPU of its own",
                remedy="choose a smaller layout, or start the run over more machines with torchrun",
            )
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def transformer_engine_available() -> bool:
    if not has_gpu():
        return False
    try:
        import transformer_engine.pytorch  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return False
    return True


def prepare_megatron() -> None:
    """Make `megatron.core` importable and correct here: on CPU give it a CPU, on any device mend its
    optimizer loading."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    for message, category, module in _KNOWN_NOISE:
        warnings.filterwarnings("ignore", message, category, module)
    if not has_gpu():
        from grpo_mega.engine import megatron_cpu

        megatron_cpu.enable()
    from grpo_mega.engine import megatron_fixes

    megatron_fixes.apply()

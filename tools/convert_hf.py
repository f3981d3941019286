"""Convert between a Hugging Face model directory and a distributed checkpoint that any layout can load.

    python tools/convert_hf.py to-megatron HF_DIR OUT             one process is enough, whatever layout loads
    OUT later python tools/convert_hf.py to-hf CHECKPOINT HF_DIR OUT        HF_DIR gives config and tokenizer

Training needs neither: recipes read Hugging Face directories, and `grpo-mega export` writes them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from transformers import AutoConfig, AutoTokenizer

from grpo_mega import launch
from grpo_mega.errors import UserError
from grpo_mega.model_shape import ModelShape
from grpo_mega.recipe.blocks import ModelBlock, ParallelBlock, TrainBlock

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, no_args_is_help=True)


@app.command()
def to_megatron(hf_dir: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Hugging Face directory -> distributed checkpoint (weights only)."""
    from grpo_mega.engine.parallel import shutdown
    from grpo_mega.engine.saver import save_weights
    from grpo_mega.sync.stream import HfDirectory, heads_of, load_hf

    _refuse_existing(out)

    def worker() -> None:
        engine = _engine(hf_dir, dtype)
        load_hf(engine.chunks, engine.layout, heads_of(engine.hf, _VOCAB_MULTIPLE), HfDirectory(hf_dir))
        save_weights(engine, out)
        shutdown()

    raise typer.Exit(launch.run_distributed(worker, 1, []))


@app.command()
def to_hf(checkpoint: Path, hf_dir: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Distributed checkpoint -> Hugging Face directory."""
    from grpo_mega.engine.checkpoint import load_weights
    from grpo_mega.engine.parallel import shutdown
    from grpo_mega.sync.export import write_hf_directory
    from grpo_mega.sync.stream import heads_of, stream_hf

    _refuse_existing(out)

    def worker() -> None:
        engine = _engine(hf_dir, dtype)
        load_weights(engine, checkpoint)
        tensors = stream_hf(engine.chunks, engine.layout, heads_of(engine.hf, _VOCAB_MULTIPLE))
        write_hf_directory(tensors, engine.hf, AutoTokenizer.from_pretrained(hf_dir), out, write=True)
        shutdown()

    raise typer.Exit(launch.run_distributed(worker, 1, []))


_VOCAB_MULTIPLE = ModelBlock.model_fields["vocab_multiple"].default


def _engine(hf_dir: Path, dtype: str):
    from grpo_mega.engine.parallel import initialize_layout
    from grpo_mega.engine.policy import PolicyEngine

    ModelShape.from_hf_directory(hf_dir)  # refuses what is missing or not supported, with its reason
    block = ModelBlock.model_validate({"hf": str(hf_dir), "dtype": dtype})
    layout = initialize_layout(ParallelBlock(), seed=0)
    return PolicyEngine(AutoConfig.from_pretrained(hf_dir), block, TrainBlock(), layout)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already", where="OUT", remedy="name a new directory, or remove it")


def _main() -> int:
    app()
    return 0


if __name__ == "__main__":
    sys.exit(launch.guarded(_main))

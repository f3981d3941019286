"""What is done with a run that has been trained: measure it, hand it on."""

from __future__ import annotations

from pathlib import Path

from grpo_mega.checkpoints import candidates
from grpo_mega.engine.checkpoint import load_weights, sound_checkpoint
from grpo_mega.engine.parallel import shutdown
from grpo_mega.errors import UserError
from grpo_mega.parts import Parts, build
from grpo_mega.recipe.schema import Recipe


def evaluate_run(recipe: Recipe, step: int | None = None) -> None:
    """Print the held-out metrics of a checkpoint (the newest, or that of a step). On every rank."""
    parts = _with_checkpoint(recipe, step, check_inputs=True)
    if not parts.inputs.evaluates:
        raise UserError(
            "this recipe holds no problems out",
            where="data.eval",
            law="an evaluation needs problems that were not trained on",
            remedy="give a file: data.eval=PATH",
        )
    parts.sync_weights()
    with parts.console.phase("evaluating"):
        metrics = parts.evaluate().metrics
    for name, value in metrics.items():
        parts.console.say(f"{name} {value:.6g}")
    shutdown()


def export_run(recipe: Recipe, out: Path, step: int | None = None) -> None:
    """Write a checkpoint as a Hugging Face directory. On every rank."""
    parts = _with_checkpoint(recipe, step, check_inputs=False)
    with parts.console.phase(f"writing {out}"):
        parts.export(out)
    shutdown()


def _with_checkpoint(recipe: Recipe, step: int | None, *, check_inputs: bool) -> Parts:
    candidates(
        recipe.run.dir / "checkpoints", step
    )  # a step that is not there is said before the model is built
    parts = build(recipe, fresh=False, check_inputs=check_inputs)
    folder = sound_checkpoint(recipe.run.dir / "checkpoints", parts.console.say, step)
    with parts.console.phase(f"loading {folder.name}"):
        load_weights(parts.engine, folder)
    return parts

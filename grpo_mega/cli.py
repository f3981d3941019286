"""The `grpo-mega` command: it checks all it can before a process starts, and imports torch only to use it."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from grpo_mega import doctor, launch, loss_commands, slurm_command
from grpo_mega.checkpoints import complete_checkpoints
from grpo_mega.errors import UserError, naming_the_disk
from grpo_mega.model_shape import ModelShape, local_model_directory
from grpo_mega.plan import check_layout, check_world_size, make_plan
from grpo_mega.plan_text import render_plan
from grpo_mega.recipe import Recipe, dump_resolved, load_recipe, render_resolved
from grpo_mega.rollout_files import RolloutFiles

SCRATCH_VOCAB = 99
"""Tokens of the built-in character tokenizer, known here so that a plan needs no tokenizer library."""
RECIPE_FILE = "recipe.yaml"
RUN_RESULTS = ("metrics.jsonl", "checkpoints", "hf")
"""What makes a directory hold a run: the other files are there before the first step is done."""
RUN_FILES = (
    *(RECIPE_FILE, "metrics.jsonl", "events.jsonl", "curves.png"),
    *("init", "checkpoints", "logs", "wandb_sync", "tensorboard", "hf", "servers"),
    *("replay", "diagnosis.json", "critic_audit.json"),
)
"""Everything a run writes, and therefore all that --overwrite removes."""

app = typer.Typer(
    name="grpo-mega",
    help="GRPO for research: train, evaluate and export language models from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).", show_default=False)
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe: train.lr=3e-5", show_default=False),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what torch and its launcher log.")]


def main() -> None:
    code = launch.CRASH_EXIT_CODE

    def leave() -> None:
        """The last of what is done at exit, because it is registered first: taking torch and Megatron apart
        would be another second's work."""
        launch.leave(code)

    atexit.register(leave)
    code = launch.guarded(_run_app)
    sys.exit(code)


def _run_app() -> int:
    app(prog_name="grpo-mega")
    return 0


@app.command()
def train(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest sound checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run that is there.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress: evaluations and messages only.")
    ] = False,
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            "--tracker", help="wandb, tensorboard, jsonl or none, in place of the recipe's; repeatable."
        ),
    ] = None,
    dump_rollouts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep each step's samples and scores there.")
    ] = None,
    replay_rollouts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Train on samples kept there; sample nothing.")
    ] = None,
    rollout_only: Annotated[
        bool, typer.Option("--rollout-only", help="Sample, score and keep; train nothing.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train as RECIPE says."""
    if resume and overwrite:
        raise typer.BadParameter("--resume keeps a run and --overwrite removes it: give one of them")
    files = RolloutFiles(dump_rollouts, replay_rollouts, rollout_only)
    chosen = [f"tracker=[{', '.join(tracker)}]"] if tracker else []
    loaded = load_recipe(recipe_path, [*(overrides or ()), *chosen])
    recipe = loaded.recipe
    check_recipe(recipe)
    if dry_run:
        if launch.is_lead():
            typer.echo(render_resolved(loaded), nl=False)
        return
    if launch.is_lead():
        files.check(recipe, resume=resume)
        prepare_run_dir(recipe, resume=resume, overwrite=overwrite)

    # A run that died before its first checkpoint starts again: who requeues a job need not look.
    goes_on = resume and bool(complete_checkpoints(recipe.run.dir / "checkpoints"))

    def worker() -> None:
        with naming_the_disk(recipe.run.dir):
            if rollout_only:
                from grpo_mega.rollout_only import run_rollouts

                return run_rollouts(recipe, files, quiet=quiet)
            from grpo_mega.train import run

            return run(recipe, resume=goes_on, quiet=quiet, files=files)

    _start(recipe, worker, verbose)


@app.command()
def serve(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    urls: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Written when all answer; if left out, rollout.sglang.urls_file."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0: all, under this machine's name.")
    ] = "127.0.0.1",
) -> None:
    """Start the SGLang servers of RECIPE, for a trainer elsewhere, and keep them until a signal."""
    recipe = load_recipe(recipe_path, overrides or ()).recipe
    if recipe.rollout.engine != "sglang":
        raise UserError(
            f"rollout.engine {recipe.rollout.engine} has no servers",
            where="rollout.engine",
            law="grpo-mega serve starts the servers of a recipe that samples from servers",
            remedy="rollout.engine=sglang",
        )
    from grpo_mega.serve import serve as keep_serving

    keep_serving(recipe, urls or recipe.rollout.sglang.urls_file, host, partial(print, flush=True))


@app.command("eval")
def evaluate(
    target: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_RECIPE", help="A run's directory or its recipe.", show_default=False),
    ],
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="A checkpoint's step; the newest if left out.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Measure a run's checkpoint on the held-out problems."""
    changes = list(overrides or ())
    run_dir = target if target.is_dir() else load_recipe(target, changes).recipe.run.dir
    recipe = load_run_recipe(run_dir, changes)
    check_recipe(recipe)

    def worker() -> None:
        from grpo_mega.runs import evaluate_run

        evaluate_run(recipe, step)

    _start(recipe, worker, verbose)


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A directory to create.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(min=0, help="A checkpoint's step; the newest if left out.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint as a Hugging Face model directory."""
    recipe = load_run_recipe(run, [])
    check_recipe(recipe)
    if launch.is_lead() and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already", where="OUT", remedy="name a new directory, or remove it")

    def worker() -> None:
        from grpo_mega.runs import export_run

        export_run(recipe, out, step)

    _start(recipe, worker, verbose)


@app.command()
def data(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    split: Annotated[Literal["train", "eval"], typer.Option(help="Which problems.")] = "train",
    count: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 3,
) -> None:
    """Show the first prompts as the model will see them."""
    recipe = load_recipe(recipe_path, overrides or ()).recipe
    from grpo_mega.data.sources import open_source
    from grpo_mega.data.stream import PromptStream
    from grpo_mega.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    source = open_source(recipe.data, split, recipe.seed)
    stream = PromptStream(source, tokenizer, recipe.data, recipe.seed, split)
    typer.echo(f"{len(stream)} {split} problems")
    for prompt in stream.prompts_for_step(0, count):
        typer.echo(f"\n{prompt.uid}: {len(prompt.token_ids)} tokens")
        _show("prompt", str(tokenizer.decode(list(prompt.token_ids))))
        _show("answer", prompt.answer)
        if prompt.teacher_response is not None:
            length = len(stream.teacher_tokens(prompt))
            _show("teacher", f"{prompt.teacher_response}  ({length} tokens with the end)")


@app.command()
def plan(recipe_path: RecipePath, overrides: Overrides = None) -> None:
    """Show ranks, batch, parameters and memory without starting anything."""
    recipe = load_recipe(recipe_path, overrides or ()).recipe
    made = make_plan(recipe, shape=shape_of(recipe), critic_shape=critic_shape_of(recipe))
    typer.echo(render_plan(made), nl=False)


@app.command()
def report(run: RunPath) -> None:
    """Draw curves.png again from metrics.jsonl."""
    from grpo_mega.monitor.report import draw_curves

    typer.echo(draw_curves(run))


app.command("check-loss")(loss_commands.check_loss)
app.command("bench")(loss_commands.bench)
app.command("doctor")(doctor.doctor)
app.command("slurm")(slurm_command.slurm)


def check_recipe(recipe: Recipe) -> None:
    """The laws that need more than the recipe: the model it names and the processes that are there."""
    check_layout(recipe, shape_of(recipe))
    if (critic_shape := critic_shape_of(recipe)) is not None:
        check_layout(recipe, critic_shape)
    if launch.inside_launcher():
        check_world_size(recipe, int(os.environ["WORLD_SIZE"]))


def shape_of(recipe: Recipe) -> ModelShape:
    model = recipe.model
    if model.hf is not None:
        return ModelShape.from_hf_directory(local_model_directory(model.hf))
    assert model.scratch is not None
    return ModelShape.from_scratch(model.scratch, _scratch_vocab(recipe))


def critic_shape_of(recipe: Recipe) -> ModelShape | None:
    """Of a model of the critic's own."""
    named = recipe.critic.hf if recipe.critic.kind != "none" else None
    return None if named is None else ModelShape.from_hf_directory(local_model_directory(named))


def _scratch_vocab(recipe: Recipe) -> int:
    directory = recipe.model.tokenizer
    if directory is None:
        return SCRATCH_VOCAB
    fast = Path(directory) / "tokenizer.json"
    if fast.is_file():  # spares the import of transformers, and with it torch
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(fast)).get_vocab_size()
    from grpo_mega.data.tokenizer import load_tokenizer

    return len(load_tokenizer(recipe.model))


def load_run_recipe(run_dir: Path, overrides: list[str]) -> Recipe:
    path = run_dir / RECIPE_FILE
    if not path.is_file():
        raise UserError(
            f"{run_dir} holds no run",
            where=str(path),
            law=f"a run directory holds the {RECIPE_FILE} that `grpo-mega train` wrote",
            remedy="give the run.dir of a run that was started",
        )
    # the run may have been moved since, and its own record of the place is then out of date
    return load_recipe(path, [f"run.dir={json.dumps(str(run_dir))}", *overrides]).recipe


def prepare_run_dir(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make room for the run and write its resolved recipe; nothing of an earlier run is lost unasked."""
    directory = recipe.run.dir
    if overwrite:
        _remove_run(recipe)
    elif resume and not (directory / RECIPE_FILE).is_file():
        raise UserError(
            f"{directory} holds no run to resume",
            where="run.dir",
            law="--resume goes on from the newest checkpoint of a run, or from its start while there is none",
            remedy="correct run.dir, or start afresh: --overwrite in place of --resume",
        )
    elif not resume and _holds_run(directory):
        raise UserError(
            f"{directory} holds a run already",
            where="run.dir",
            law="a run starts in a directory of its own",
            remedy="--resume goes on with it, --overwrite removes it, run.dir=... goes elsewhere",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        draft = directory / f"{RECIPE_FILE}.draft"
        draft.write_text(dump_resolved(recipe), encoding="utf-8")
        draft.replace(directory / RECIPE_FILE)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written: {error.strerror}", where="run.dir", remedy="set run.dir=..."
        ) from None


def _holds_run(directory: Path) -> bool:
    results = [directory / name for name in RUN_RESULTS]
    return any(
        path.stat().st_size if path.is_file() else path.is_dir() and any(path.iterdir()) for path in results
    )


def _remove_run(recipe: Recipe) -> None:
    directory = recipe.run.dir
    doomed = [directory / name for name in RUN_FILES]
    inputs = {
        "model.hf": recipe.model.hf,
        "model.tokenizer": recipe.model.tokenizer,
        "data.train": recipe.data.train,
        "data.eval": recipe.data.eval,
    }
    for key, value in inputs.items():
        needed = Path(value).resolve() if isinstance(value, str | Path) else None
        if needed is not None and any(needed.is_relative_to(path.resolve()) for path in doomed):
            raise UserError(
                f"--overwrite would remove {value}, which the run needs",
                where=f"{key}, run.dir",
                law="a run does not read what it is about to remove",
                remedy="choose another run.dir",
            )
    for path in doomed:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _start(recipe: Recipe, worker: Callable[[], None], verbose: bool) -> NoReturn:
    def rank() -> None:
        _import_the_engine()
        worker()

    command = ["-m", "grpo_mega", *sys.argv[1:]]
    raise typer.Exit(launch.run_distributed(rank, recipe.parallel.world_size, command, verbose=verbose))


def _import_the_engine() -> None:
    """Without Python's collector, which looks at everything again and again while much is made and nothing is
    thrown away: a sixth of the time."""
    gc.disable()
    try:
        importlib.import_module("grpo_mega.parts")
    finally:
        gc.enable()


def _show(label: str, text: str) -> None:
    """Later lines of a long text stand under its first."""
    first, *rest = text.split("\n")
    typer.echo("\n".join([f"  {label + ':':<9} {first}", *(f"{'':12}{line}" for line in rest)]))

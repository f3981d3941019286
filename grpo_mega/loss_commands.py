"""`grpo-mega check-loss` and `grpo-mega bench`: certify a loss, time the losses and the kernels."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import rich.console
import rich.table
import typer

from grpo_mega.errors import UserError
from grpo_mega.recipe import load_recipe


def check_loss(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE | MODULE:CALLABLE]",
            help="A recipe, or a callable with PolicyLoss's signature (a file may stand for the module).",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="loss.innovations.ema.beta=.5", show_default=False),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also the compiled form (its first call takes a minute).")
    ] = False,
) -> None:
    """Certify a loss: gradient, agreement with float64, and that no layout of the batch matters."""
    changes = list(overrides or ())
    if target is not None and "=" in target and ":" not in target.partition("=")[0]:
        target, changes = None, [target, *changes]
    if target is not None and ":" in target:
        title, verdicts = target, _verdicts_of_callable(target)
    else:
        title, verdicts = target or "the default loss", _verdicts_of_recipe(target, changes, compiled)
    if not _show(title, verdicts):
        raise typer.Exit(1)


def _verdicts_of_callable(target: str) -> Iterable[Any]:
    from grpo_mega.certify import certify

    return certify(_load_callable(target))


def _verdicts_of_recipe(target: str | None, overrides: Sequence[str], compiled: bool) -> Iterable[Any]:
    if target is None:
        recipe = load_recipe(_base_recipe(), ["model.hf=none", "data.task=none", *overrides]).recipe
    else:
        recipe = load_recipe(Path(target), list(overrides)).recipe
    import torch

    from grpo_mega.algo import PolicyLoss
    from grpo_mega.certify import certify
    from grpo_mega.kernels.implementation import Implementation, interpreting, triton_installed
    from grpo_mega.self_check import against_the_oracle

    length = recipe.rollout.max_new_tokens
    yield from certify(PolicyLoss(recipe.loss, default_norm_length=length))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs_triton = triton_installed() and (torch.cuda.is_available() or interpreting())
    implementations: list[Implementation] = ["eager"]
    if compiled:
        implementations.append("compiled")
    if runs_triton:
        implementations.append("triton")
    for implementation in implementations:
        for dtype in (torch.float32, torch.bfloat16):
            yield against_the_oracle(recipe.loss, implementation, dtype, device, length)


def _base_recipe() -> Path:
    """The base of a checkout; an installed package has none, and its defaults are the same."""
    path = Path(__file__).parents[1] / "recipes" / "base.yaml"
    if not path.is_file():
        raise UserError(
            "no recipe was given, and there is no recipes/base.yaml to stand in",
            where="RECIPE",
            remedy="name a recipe: grpo-mega check-loss my_recipe.yaml",
        )
    return path


def _load_callable(target: str) -> Any:
    module_name, _, name = target.rpartition(":")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(module_name)
        return getattr(module, name)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise UserError(
            f"{target} cannot be loaded: {error}",
            where="MODULE:CALLABLE",
            law="a module (or a file.py) and, after the colon, the name of a callable in it",
            remedy="try it in Python: from MODULE import CALLABLE",
        ) from None


def _show(title: str, verdicts: Iterable[Any]) -> bool:
    """A line for each law as soon as it is known; true when all hold."""
    console = rich.console.Console()
    console.print(f"{title}", highlight=False)
    broken = total = 0
    for verdict in verdicts:
        total, broken = total + 1, broken + (not verdict.holds)
        mark = "[green]holds [/green]" if verdict.holds else "[bold red]BROKEN[/bold red]"
        detail = f"  [dim]{verdict.detail}[/dim]" if verdict.detail else ""
        console.print(
            f"  {mark} {verdict.worst:8.1e} of {verdict.allowed:.0e}  {verdict.law}{detail}", highlight=False
        )
    console.print(f"{total - broken} of {total} laws hold", highlight=False)
    return not broken


def bench(
    what: Annotated[Literal["losses", "logprob"], typer.Argument(help="What to time.")],
    out: Annotated[
        Path | None,
        typer.Option(help="A directory for the numbers (JSON) and a picture.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="logprob: tokens.")] = 2048,
    hidden: Annotated[int, typer.Option(min=1, help="logprob: hidden size.")] = 896,
    vocab: Annotated[int, typer.Option(min=1, help="logprob: vocabulary.")] = 151936,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="logprob: of hidden and weight.")] = (
        "float32"
    ),
    sequences: Annotated[int, typer.Option(min=1, help="losses: sequences.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="losses: tokens of each.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the best of each variant counts.")] = 3,
) -> None:
    """Time kernels and losses side by side, each against the plain way of computing the same."""
    if what == "logprob":
        from grpo_mega.bench import logprob

        rows = logprob.run(tokens, hidden, vocab, dtype, repeats)
    else:
        from grpo_mega.bench import losses

        rows = losses.run(sequences, length, repeats)
    from grpo_mega.bench import show

    show.table(rows, what)
    if out is not None:
        for path in show.write(rows, what, out):
            typer.echo(path)

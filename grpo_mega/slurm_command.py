"""`grpo-mega slurm`: a job file for any recipe, checked against its layout and, where Slurm is, by Slurm."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from grpo_mega.errors import UserError
from grpo_mega.plan import check_world_size
from grpo_mega.recipe import Recipe, load_recipe

MARK = "# Written by `grpo-mega slurm`"
SIGNAL_SECONDS = 180
"""Before the time limit: enough to finish a step and to write a checkpoint."""
SLURM_SECONDS = 60


@dataclass(frozen=True)
class Resources:
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_rank: int
    time: str
    partition: str | None
    rollout_node: bool = False

    def lines(self) -> list[str]:
        partition = f" --partition={self.partition}" if self.partition else ""
        lines = [
            self._component(self.nodes, self.ranks_per_node, self.cpus_per_rank),
            f"--time={self.time}{partition}",
            f"--signal=B:USR1@{SIGNAL_SECONDS} --requeue --open-mode=append --output=%x-%j.out",
        ]
        if self.rollout_node:
            # One task starts all servers of its node, and has what the ranks of one node have together.
            cores = self.cpus_per_rank * self.ranks_per_node
            lines += [
                "hetjob",
                self._component(1, 1, cores),
                f"--time={self.time}{partition}",
            ]
        return lines

    def _component(self, nodes: int, tasks_per_node: int, cpus_per_task: int) -> str:
        gpus = f" --gpus-per-node={self.gpus_per_node}" if self.gpus_per_node else ""
        return f"--nodes={nodes} --ntasks-per-node={tasks_per_node}{gpus} --cpus-per-task={cpus_per_task}"


def slurm(
    recipe_path: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.", show_default=False),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="How many nodes.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs of each, one for each rank; 0 = ranks on CPUs.", show_default=False),
    ] = None,
    rollout_node: Annotated[
        bool, typer.Option("--rollout-node", help="One more node, whose SGLang servers sample.")
    ] = False,
    cpus_per_rank: Annotated[int, typer.Option(min=1, help="CPU cores of each rank.")] = 8,
    partition: Annotated[str | None, typer.Option(help="The cluster's default if left out.")] = None,
    time: Annotated[str, typer.Option(help="The time limit of one start; the job comes back.")] = "24:00:00",
    out: Annotated[
        Path | None, typer.Option(help="The file to write; NAME.sbatch of run.name if left out.")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it as well.")] = False,
) -> None:
    """Write a Slurm job file for RECIPE, let Slurm check it, and perhaps submit it."""
    changes = [*(overrides or ()), *(["rollout.engine=sglang"] if rollout_node else [])]
    recipe = load_recipe(recipe_path, changes).recipe
    ranks = _ranks_per_node(recipe, nodes, gpus_per_node)
    gpus = ranks if gpus_per_node is None else gpus_per_node
    if rollout_node:
        _check_servers_fit(recipe, gpus)
    resources = Resources(nodes, ranks, gpus, cpus_per_rank, time, partition, rollout_node)
    path = out or Path(f"{recipe.run.name}.sbatch")
    _write(path, job_file(recipe, recipe_path, changes, resources))
    servers = ", and a node with servers" if rollout_node else ""
    typer.echo(f"wrote {path}: {nodes} node(s) with {ranks} rank(s) each{servers}")
    if shutil.which("sbatch") is None:
        if submit:
            raise UserError(
                "sbatch is not here",
                where="--submit",
                law="a job is submitted on a machine that has Slurm's commands",
                remedy=f"log in to the cluster and run: sbatch {path}",
            )
        typer.echo(f"not checked by Slurm: sbatch is not here. On the cluster: sbatch {path}")
        return
    typer.echo(_sbatch("--test-only", path))
    typer.echo(_sbatch("--parsable", path) if submit else f"not submitted; --submit does, or: sbatch {path}")


def _ranks_per_node(recipe: Recipe, nodes: int, gpus_per_node: int | None) -> int:
    """One for each GPU. Without GPUs, or a word about them, the layout's ranks are dealt to the nodes."""
    if gpus_per_node:
        check_world_size(recipe, nodes * gpus_per_node)
        return gpus_per_node
    world_size = recipe.parallel.world_size
    if world_size % nodes:
        raise UserError(
            f"{world_size} ranks cannot be dealt to {nodes} nodes",
            where="--nodes, parallel.tp, parallel.pp, parallel.cp, parallel.dp",
            law="every node has the same number of ranks",
            remedy="choose a number of nodes that divides the layout's ranks, or change parallel.dp",
        )
    return world_size // nodes


def _check_servers_fit(recipe: Recipe, gpus: int) -> None:
    servers, tp = recipe.rollout.sglang.servers, recipe.rollout.sglang.tp
    if gpus and servers * tp > gpus:
        raise UserError(
            f"{servers} servers of {tp} GPUs do not fit on a node of {gpus}",
            where="--rollout-node, rollout.sglang.servers, rollout.sglang.tp",
            law="all servers of the job are on one node",
            remedy=f"rollout.sglang.servers={max(gpus // tp, 1)}, or a smaller rollout.sglang.tp",
        )


def job_file(recipe: Recipe, recipe_path: Path, overrides: Sequence[str], resources: Resources) -> str:
    """The text of an sbatch file. Paths stay as they were given: submit it from the same directory."""
    name = recipe.run.name
    arguments = [f'"${{RECIPE:-{recipe_path}}}"', *(shlex.quote(override) for override in overrides)]
    lines = [
        "#!/bin/bash",
        f"{MARK}; submit it from the directory it was written in.",
        f"#SBATCH --job-name={shlex.quote(name)}",
        *(f"#SBATCH {line}" for line in resources.lines()),
        f"export PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}",
        f"exec {shlex.quote(str(_launch_script()))} train {' '.join(arguments)}",
    ]
    return "\n".join(lines) + "\n"


def _launch_script() -> Path:
    path = Path(__file__).parents[1] / "slurm" / "launch.sh"
    if not path.is_file():
        raise UserError(
            "an installed package has no slurm/launch.sh",
            where=str(path),
            law="job files start their ranks with slurm/launch.sh of a checkout",
            remedy="clone the repository where the cluster sees it, and: pip install -e .",
        )
    return path


def _write(path: Path, text: str) -> None:
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            f"{path} exists already, and this command did not write it",
            where="--out",
            remedy="choose another name: --out FILE",
        )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", where="--out") from None


def _sbatch(option: str, path: Path) -> str:
    try:
        done = subprocess.run(
            ["sbatch", option, str(path)],
            capture_output=True,
            text=True,
            timeout=SLURM_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch {option} gave no answer in {SLURM_SECONDS} s",
            where=str(path),
            remedy="ask whether Slurm is well: scontrol ping",
        ) from None
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise UserError(
            f"Slurm refuses the job: {said}",
            where=str(path),
            law="nodes, GPUs, partition and time are what the cluster has (sinfo shows them)",
            remedy="change the options, or the file",
        )
    return f"submitted: job {said}" if option == "--parsable" else said

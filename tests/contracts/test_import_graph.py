"""Who may import whom: a stage knows what lies below it, never a neighbour, never what is above."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "grpo_mega"

# Lowest first. A unit imports itself and any unit of a lower layer.
LAYERS = (
    ("errors", "lifetime", "block"),
    ("ports",),
    ("algo.innovations",),  # options of a recipe that know their arithmetic; torch is for type checkers only
    ("algo.objectives",),
    ("types", "recipe"),
    ("monitor.histogram",),
    ("model_shape", "checkpoints"),
    ("plan_memory",),
    ("plan",),
    ("plan_text",),
    ("kernels", "monitor.metrics"),  # the vocabulary of metrics is below those who measure
    ("algo",),
    ("data", "reward", "rollout", "engine", "sync", "monitor"),
    ("batching",),
    ("critic",),
    (
        "launch",
        "evaluation",
        "inference_callback",
        "curriculum",
        "data_quality",
        "inputs",
        "certify",
        "preemption",
        "watchdog",
        "slurm_job",
        "drift",
        "rollout_files",
        "serve",
    ),
    ("self_check",),
    ("parts",),
    ("collect", "journal"),
    ("adversary", "value_critic", "draw"),
    ("steps",),
    ("watch",),
    ("train", "runs", "bench"),
    ("loss_commands", "slurm_command", "doctor_check", "rollout_only"),
    ("doctor_run",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
SIDEWAYS = {
    ("sync", "engine"),
    ("rollout", "sync"),
}
TORCH_FREE = (
    "errors",
    "recipe",
    "model_shape",
    "plan_text",
    "algo.innovations",
    "doctor_run",
    "cli",
    "slurm_job",
    "rollout_files",
)

LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}


def _sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _unit(module: str) -> str | None:
    """The longest beginning of a module's name that the table lists."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in LEVEL), None)


def _imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file needs when it runs, without the package's own name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    types_only = {id(node) for branch in ast.walk(tree) if _is_for_types(branch) for node in ast.walk(branch)}
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("grpo_mega.") for name in names if name.startswith("grpo_mega."))


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_every_module_has_a_place_in_the_table() -> None:
    strangers = [_module(path) for path in _sources() if _unit(_module(path)) is None]
    assert not strangers, f"add them to LAYERS: {strangers}"


def test_imports_point_downwards() -> None:
    wrong: list[str] = []
    for path in _sources():
        importer = _unit(_module(path))
        for imported in {_unit(name) for name in _imports(path)} - {importer, None}:
            assert importer is not None and imported is not None
            below = LEVEL[imported] < LEVEL[importer]
            if not below and (importer, imported) not in SIDEWAYS:
                wrong.append(f"{path.relative_to(PACKAGE)} ({importer}) imports {imported}")
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("unit", TORCH_FREE)
def test_torch_is_not_needed_to_read_and_plan(unit: str) -> None:
    code = f"import sys, grpo_mega.{unit}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0

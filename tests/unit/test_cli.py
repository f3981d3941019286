"""The command line: what it refuses before anything starts, what it calls, and how it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

from grpo_mega import cli
from grpo_mega.data.tokenizer import scratch_tokenizer
from grpo_mega.errors import UserError
from grpo_mega.monitor.jsonl import MetricsWriter
from grpo_mega.recipe import Recipe, load_recipe
from grpo_mega.rollout_files import RolloutFiles
from grpo_mega.types import StepReport

ROOT = Path(__file__).parents[2]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def outside_any_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone rank leaves its place in the environment; monkeypatch takes it out again."""
    for name in (*RANK_VARIABLES, "LOCAL_WORLD_SIZE", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    content = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"scratch": {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64}},
        "data": {"source": "procedural", "task": "sort_digits"},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the commands ask of the trainer, which is not run here."""
    seen: list[tuple[object, ...]] = []
    for module, name in (("train", "run"), ("runs", "evaluate_run"), ("runs", "export_run")):
        stand_in = sys.modules.get(f"grpo_mega.{module}")
        if not isinstance(stand_in, _StandIn):
            stand_in = _StandIn(f"grpo_mega.{module}")
            monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)

        def record(*arguments: object, name: str = name, **options: object) -> None:
            seen.append((name, *arguments, options))

        setattr(stand_in, name, record)
    return seen


class _StandIn(ModuleType):
    pass


def invoke(*arguments: str | Path) -> str:
    """The output of a command that succeeds; its exception if it fails."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run_program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return subprocess.run(
        [sys.executable, "-m", "grpo_mega", *map(str, arguments)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_options_stand_before_or_after_overrides(recipe: Path):
    for arguments in (
        ("--dry-run", recipe, "train.steps=3", "seed=7"),
        (recipe, "train.steps=3", "--dry-run", "seed=7"),
        (recipe, "train.steps=3", "seed=7", "--dry-run"),
    ):
        resolved = yaml.safe_load(invoke("train", *arguments))
        assert (resolved["train"]["steps"], resolved["seed"]) == (3, 7)


def test_a_dry_run_touches_nothing(recipe: Path, calls: list[tuple[object, ...]]):
    invoke("train", recipe, "--dry-run")
    assert calls == [] and list(recipe.parent.iterdir()) == [recipe]


def test_train_hands_over_the_recipe_and_writes_it(recipe: Path, calls: list[tuple[object, ...]]):
    invoke("train", recipe, "train.steps=3", "--quiet")
    expected = load_recipe(recipe, ["train.steps=3"]).recipe
    assert calls == [("run", expected, {"resume": False, "quiet": True, "files": RolloutFiles()})]
    assert load_recipe(recipe.parent / "run" / "recipe.yaml").recipe == expected


def test_a_run_is_neither_overwritten_nor_resumed_unasked(recipe: Path, calls: list[tuple[object, ...]]):
    run_dir = recipe.parent / "run"
    (run_dir / "checkpoints" / "step_000005").mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").write_text("step_000005")
    (run_dir / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds a run already"):
        invoke("train", recipe)
    (run_dir / "recipe.yaml").touch()  # of a run that died before its first checkpoint was complete
    invoke("train", recipe, "--resume")
    assert calls.pop()[-1] == {"resume": False, "quiet": False, "files": RolloutFiles()}
    for name in ("state.json", "manifest.json"):
        (run_dir / "checkpoints" / "step_000005" / name).touch()
    invoke("train", recipe, "--resume")
    assert calls.pop()[-1] == {"resume": True, "quiet": False, "files": RolloutFiles()}
    assert (run_dir / "checkpoints" / "step_000005").is_dir()
    invoke("train", recipe, "--overwrite")
    assert sorted(path.name for path in run_dir.iterdir()) == ["notes.txt", "recipe.yaml"]


def test_trackers_are_picked_on_the_command_line(recipe: Path, calls: list[tuple[object, ...]]):
    invoke("train", recipe, "--tracker", "wandb", "--tracker", "tensorboard")
    assert calls[0][1].tracker == ("wandb", "tensorboard")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="tracker"):
        invoke("train", recipe, "--overwrite", "--tracker", "wandbb")


def test_there_must_be_something_to_resume(recipe: Path, calls: list[tuple[object, ...]]):
    with pytest.raises(UserError, match="holds no run to resume"):
        invoke("train", recipe, "--resume")
    assert calls == [] and not (recipe.parent / "run").exists()


def test_a_run_that_made_no_step_may_start_again(recipe: Path, calls: list[tuple[object, ...]]):
    invoke("train", recipe)
    (recipe.parent / "run" / "metrics.jsonl").touch()
    invoke("train", recipe)
    assert len(calls) == 2


def test_overwrite_keeps_what_the_run_reads(tmp_path: Path):
    model = tmp_path / "run" / "hf"
    model.mkdir(parents=True)
    recipe = tmp_path / "next.yaml"
    content = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"hf": str(model)},
        "data": {"task": "sort_digits"},
    }
    recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="would remove"):
        cli.prepare_run_dir(load_recipe(recipe).recipe, resume=False, overwrite=True)
    assert model.is_dir()


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_layout_that_breaks_a_law_starts_nothing(
    recipe: Path, calls: list[tuple[object, ...]], command: str
):
    with pytest.raises(UserError, match=r"parallel\.ep"):
        invoke(command, recipe, "parallel.ep=2", "parallel.dp=2")
    assert calls == [] and not (recipe.parent / "run").exists()


def test_a_missing_model_starts_nothing(recipe: Path, calls: list[tuple[object, ...]]):
    with pytest.raises(UserError, match=r"no .*nowhere"):
        invoke("train", recipe, "model.scratch=null", f"model.hf={recipe.parent / 'nowhere'}")
    assert calls == []


def test_under_torchrun_the_number_of_processes_must_fit(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="3 processes were started"):
        invoke("train", recipe, "parallel.dp=2")


def test_eval_takes_a_run_or_its_recipe(recipe: Path, calls: list[tuple[object, ...]]):
    invoke("train", recipe)
    run_dir = recipe.parent / "run"
    for target in (run_dir, recipe):
        invoke("eval", target, "eval.samples=8")
        name, asked, step, _ = calls.pop()
        assert (name, step) == ("evaluate_run", None)
        assert asked == load_recipe(recipe, ["eval.samples=8"]).recipe
    with pytest.raises(UserError, match="holds no run"):
        invoke("eval", recipe.parent)


def test_export_names_a_step_and_never_writes_over_anything(recipe: Path, calls: list[tuple[object, ...]]):
    invoke("train", recipe)
    run_dir, out = recipe.parent / "run", recipe.parent / "out"
    asked = load_recipe(recipe).recipe
    invoke("export", run_dir, out, "--step", "5")
    assert calls.pop() == ("export_run", asked, out, 5, {})
    invoke("export", run_dir, out)
    assert calls.pop() == ("export_run", asked, out, None, {})
    out.mkdir()
    (out / "model.safetensors").touch()
    with pytest.raises(UserError, match="exists already"):
        invoke("export", run_dir, out)


def test_a_run_may_have_been_moved(recipe: Path, calls: list[tuple[object, ...]]):
    invoke("train", recipe)
    moved = (recipe.parent / "run").rename(recipe.parent / "moved")
    invoke("eval", moved)
    asked = calls.pop()[1]
    assert isinstance(asked, Recipe) and asked.run.dir == moved


def test_data_shows_prompts_as_the_model_sees_them(recipe: Path):
    shown = invoke("data", recipe, "--split", "eval", "-n", "2", "data.eval=16")
    assert shown.startswith("16 eval problems\n\neval-")
    assert shown.count("prompt:") == shown.count("answer:") == 2
    assert ": 6 tokens\n" in shown  # five digits and "="


def test_plan_shows_ranks(recipe: Path):
    assert invoke("plan", recipe, "parallel.tp=2").startswith("layout: 2 ranks")


def test_plan_shows_the_critic(recipe: Path, tmp_path: Path):
    content = yaml.safe_load(recipe.read_text())
    content |= {"critic": {"kind": "value"}, "advantage": {"estimator": "gae"}}
    recipe.write_text(yaml.safe_dump(content))
    assert "critic (value): qwen2" in invoke("plan", recipe)
    with pytest.raises(UserError, match="nowhere"):
        invoke("plan", recipe, f"critic.hf={tmp_path / 'nowhere'}")


def test_report_draws_the_curves(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    writer.write(StepReport(step=0, stage="grpo", metrics={"reward/mean": 0.5}), 0)
    writer.close()
    assert invoke("report", tmp_path) == f"{tmp_path / 'curves.png'}\n"
    assert (tmp_path / "curves.png").is_file()


def test_the_scratch_vocabulary_is_that_of_its_tokenizer(recipe: Path, tmp_path: Path):
    assert len(scratch_tokenizer()) == cli.SCRATCH_VOCAB
    scratch_tokenizer().save_pretrained(tmp_path / "own")
    own = load_recipe(recipe, [f"model.tokenizer={tmp_path / 'own'}"]).recipe
    assert cli.shape_of(own) == cli.shape_of(load_recipe(recipe).recipe)


@pytest.mark.parametrize("arguments", [("--help",), ("train", "RECIPE", "--dry-run"), ("plan", "RECIPE")])
def test_torch_is_not_imported_before_it_is_needed(recipe: Path, arguments: tuple[str, ...]):
    script = (
        "import sys\n"
        "from grpo_mega import cli\n"
        "try:\n    cli.main()\n"
        "finally:\n    assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *(str(recipe) if word == "RECIPE" else word for word in arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


def test_a_user_error_is_plain_in_a_pipe(recipe: Path):
    result = run_program("train", recipe, "parallel.tpp=2")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: unknown key parallel.tpp\n")
    assert "remedy: did you mean parallel.tp?" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "wrong", [("train", "R", "--dryrun"), ("nothing",), ("export", "R"), ("data", "R", "-n", "0")]
)
def test_a_wrong_command_line_is_explained(wrong: tuple[str, ...]):
    result = run_program(*wrong)
    assert result.returncode == 2
    assert "Usage: grpo-mega" in result.stderr and "Traceback" not in result.stderr


def test_resume_and_overwrite_exclude_each_other(recipe: Path):
    result = run_program("train", recipe, "--resume", "--overwrite")
    assert result.returncode == 2 and "--resume keeps a run" in result.stderr

"""Files, inheritance, environment: a run gets what its recipe says, and knows where it was said."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from grpo_mega.errors import UserError
from grpo_mega.recipe import load_recipe, render_resolved

MINIMAL = "model: {scratch: {}}\ndata: {task: sort}\n"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return name


def test_an_exponent_without_a_dot_is_a_number() -> None:
    """YAML 1.1 reads 1e-4 as text, and a learning rate would be refused, or worse."""
    recipe = load_recipe(
        write("r.yaml", MINIMAL + "train: {lr: 1e-4, adam_eps: 1E-9, weight_decay: .5}")
    ).recipe
    assert (recipe.train.lr, recipe.train.adam_eps, recipe.train.weight_decay) == (1e-4, 1e-9, 0.5)


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "No", "1:30", "2024-01-01", "1_000"])
def test_words_stay_words(word: str) -> None:
    text = f"model: {{scratch: {{}}}}\ndata: {{task: sort, system: {word}, options: {{answer: {word}}}}}"
    recipe = load_recipe(write("r.yaml", text)).recipe
    assert recipe.data.system == word
    assert recipe.data.options == {"answer": word}


def test_leading_zeros_and_hexadecimal_numbers() -> None:
    options = load_recipe(
        write("r.yaml", MINIMAL[:-2] + ", options: {a: 012, b: 0x10, c: 0o17, d: !!str 12}}")
    ).recipe
    assert options.data.options == {"a": 12, "b": 16, "c": 15, "d": "12"}


def test_children_inherit_and_replace() -> None:
    write("base.yaml", MINIMAL + "train: {lr: 1.0, warmup_steps: 7}\neval: {pass_at: [1, 8]}\n")
    write("mid/mid.yaml", "defaults: ../base.yaml\ntrain: {lr: 2.0}\n")
    child = write("mid/deep/child.yaml", "defaults: ../mid.yaml\neval: {pass_at: [4]}\n")
    loaded = load_recipe(child)
    assert (loaded.recipe.train.lr, loaded.recipe.train.warmup_steps) == (2.0, 7)
    assert loaded.recipe.eval.pass_at == (4,)
    assert loaded.origins["train.lr"] == "mid/mid.yaml:2"
    assert loaded.origins["train.warmup_steps"] == "base.yaml:3"
    assert loaded.origins["eval.pass_at"] == "mid/deep/child.yaml:2"
    assert loaded.origins["train.grad_clip"] == "default"


def test_later_defaults_win_over_earlier_ones() -> None:
    write("a.yaml", MINIMAL + "train: {lr: 1.0, warmup_steps: 1}\n")
    write("b.yaml", "train: {lr: 2.0}\n")
    recipe = load_recipe(write("c.yaml", "defaults: [a.yaml, b.yaml]\n")).recipe
    assert (recipe.train.lr, recipe.train.warmup_steps) == (2.0, 1)


def test_a_child_replaces_the_alternative_it_inherits() -> None:
    write("base.yaml", "model: {scratch: {layers: 8}, dtype: float32}\ndata: {task: sort}\n")
    recipe = load_recipe(write("child.yaml", "defaults: base.yaml\nmodel: {hf: there}\n")).recipe
    assert (recipe.model.hf, recipe.model.scratch, recipe.model.dtype) == ("there", None, "float32")


def test_null_takes_an_inherited_value_back() -> None:
    write(
        "base.yaml", MINIMAL + "data: {task: sort}\n".replace("data: {task: sort}\n", "train: {steps: 5}\n")
    )
    assert (
        load_recipe(write("child.yaml", "defaults: base.yaml\ntrain: {steps: null}\n")).recipe.train.steps
        is None
    )


def test_an_empty_block_takes_inherited_innovations_back() -> None:
    write("ema.yaml", MINIMAL + "loss: {innovations: {ema: {beta: .9}}}\n")
    recipe = load_recipe(write("plain.yaml", "defaults: ema.yaml\nloss: {innovations: {}}\n")).recipe
    assert recipe.loss.innovations.model_dump() == {}


def test_environment_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOM", "/big")
    monkeypatch.delenv("NOWHERE", raising=False)
    text = """\
        run: {dir: "${ROOM}/runs"}
        model: {hf: "${NOWHERE:-models}/x"}
        data: {task: sort, system: "cost $5, write $${ROOM}"}
        """
    recipe = load_recipe(write("r.yaml", text)).recipe
    assert (recipe.run.dir, recipe.model.hf) == (Path("/big/runs"), "models/x")
    assert recipe.data.system == "cost $5, write ${ROOM}"


def test_a_reference_that_a_child_replaces_need_not_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    write("base.yaml", 'model: {hf: "${NOWHERE}"}\ndata: {task: sort}\n')
    assert (
        load_recipe(write("child.yaml", "defaults: base.yaml\nmodel: {hf: here}")).recipe.model.hf == "here"
    )
    with pytest.raises(UserError) as caught:
        load_recipe("base.yaml")
    assert caught.value.where == "base.yaml:1"
    assert "NOWHERE" in caught.value.what and ":-" in str(caught.value.remedy)


def test_relative_paths_stay_as_written() -> None:
    recipe = load_recipe(
        write("deep/r.yaml", "model: {hf: m}\ndata: {source: jsonl, train: d/t.jsonl}\n")
    ).recipe
    assert recipe.data.train == Path("d/t.jsonl")


def test_every_printed_line_names_its_origin() -> None:
    loaded = load_recipe(
        write("r.yaml", MINIMAL + "stages: [{sft: {steps: 5}}, {grpo: {}}]\n"), ["train.steps=3"]
    )
    lines = {
        line.split("#")[0].strip(): line.split("# ")[-1] for line in render_resolved(loaded).splitlines()
    }
    assert lines["steps: 3"] == "command line"
    assert lines["task: sort"] == "r.yaml:2"
    assert lines["steps: 5"] == "r.yaml:3"
    assert lines["lr: 0.0001"] == "default"
    columns = {line.index("#") for line in render_resolved(loaded).splitlines() if "#" in line}
    assert len(columns) == 1, "origins stand in one column"


BROKEN_FILES = {
    "syntax": ("a: [1\nb: 2\n", "r.yaml:2", "not valid YAML"),
    "tab": ("a:\n\tb: 1\n", "r.yaml:2", "not valid YAML"),
    "duplicate key": ("train:\n  lr: 1.0\n  steps: 2\n  lr: 2.0\n", "r.yaml:4", "'lr' is given twice"),
    "list": ("- a\n", "r.yaml:1", "a list"),
    "empty": ("# nothing yet\n", "r.yaml", "is empty"),
    "two documents": ("a: 1\n---\nb: 2\n", "r.yaml:2", "not valid YAML"),
    "endless alias": ("a: &x [*x]\n", "r.yaml:1", "alias"),
    "tag": ("a: !!python/name:os.system x\n", "r.yaml:1", "tag"),
    "defaults that are no path": ("defaults: 3\n", "r.yaml:1 (defaults)", "path"),
    "defaults that do not exist": (
        "defaults: nowhere.yaml\n",
        "r.yaml:1 (defaults)",
        "no recipe nowhere.yaml",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_file_that_cannot_be_read_says_where(case: str) -> None:
    text, where, what = BROKEN_FILES[case]
    write("r.yaml", text)
    with pytest.raises(UserError) as caught:
        load_recipe("r.yaml")
    assert caught.value.where == where
    assert what in caught.value.what


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match=r"no recipe gone\.yaml"):
        load_recipe("gone.yaml")


def test_inheritance_in_a_circle_is_refused() -> None:
    write("a.yaml", "defaults: b.yaml\n")
    write("b.yaml", "defaults: ./a.yaml\n")
    with pytest.raises(UserError, match="inherits from itself") as caught:
        load_recipe("a.yaml")
    assert caught.value.where == "b.yaml:1 (defaults)"

"""The loss a recipe asks for: what it may combine, what it gets, and what it is told about the rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from grpo_mega.algo.innovations import available
from grpo_mega.algo.innovations.asymmetric import Asymmetric
from grpo_mega.algo.innovations.ptrw import Ptrw
from grpo_mega.algo.objectives import CispoObjective, ClipObjective, GmpoObjective
from grpo_mega.errors import UserError
from grpo_mega.recipe import Recipe, dump_resolved, load_recipe
from grpo_mega.recipe.blocks import LossBlock
from grpo_mega.recipe.tree import MapNode, Node, merge, to_plain

ROOT = Path(__file__).parents[2]
BASE = "model: {scratch: {}}\ndata: {task: sort}\n"  # two lines: what follows begins in the third
PREFIX = "loss.innovations"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str, *overrides: str) -> Recipe:
    Path("r.yaml").write_text(BASE + text, encoding="utf-8")
    return load_recipe("r.yaml", overrides).recipe


def refusal(text: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        read(text, *overrides)
    return caught.value


def as_yaml(keys: Sequence[str]) -> str:
    """Empty blocks at these keys, a line for each block."""
    tree: Node = MapNode({}, "")
    for key in keys:
        node = MapNode({}, "")
        for part in reversed(key.split(".")):
            node = MapNode({part: node}, "")
        tree = merge(tree, node)
    return yaml.safe_dump(to_plain(tree), default_flow_style=False, sort_keys=False)


PAIRS = [
    (f"{PREFIX}.amic", f"{PREFIX}.gspo"),
    (f"{PREFIX}.asymmetric", f"{PREFIX}.ptrw"),
    (f"{PREFIX}.sca", f"{PREFIX}.temporal_decay"),
    (f"{PREFIX}.ptrw", "loss.objective.clip"),
    (f"{PREFIX}.ptrw", "loss.objective.cispo"),
    (f"{PREFIX}.ptrw", "loss.objective.gmpo"),
    (f"{PREFIX}.asymmetric", "loss.objective.clip"),
    (f"{PREFIX}.asymmetric", "loss.objective.cispo"),
    (f"{PREFIX}.asymmetric", "loss.objective.gmpo"),
    (f"{PREFIX}.amic", "loss.objective.gmpo"),
    (f"{PREFIX}.gspo", "loss.objective.gmpo"),
]


def named(key: str) -> str:
    """What a message calls a key: of an objective, the block that holds it."""
    return "loss.objective" if key.startswith("loss.objective") else key


@pytest.mark.parametrize("pair", PAIRS, ids=" x ".join)
def test_a_pair_that_excludes_each_other_is_refused_in_a_file(pair: tuple[str, str]) -> None:
    error = refusal(as_yaml(pair))
    for key in pair:
        assert named(key) in str(error.law), "the message names both keys"
        line = 1 + (BASE + as_yaml(pair)).splitlines().index(as_yaml_line(key))
        parent = line - 1  # of an objective, the block that holds it
        assert f"r.yaml:{line} ({key}" in str(error.where) or f"r.yaml:{parent} ({named(key)}" in str(
            error.where
        )
    assert "remove" in str(error.law) and error.remedy


def as_yaml_line(key: str) -> str:
    return "  " * key.count(".") + key.rpartition(".")[2] + ": {}"


@pytest.mark.parametrize("pair", PAIRS, ids=" x ".join)
def test_and_on_the_command_line(pair: tuple[str, str]) -> None:
    first, second = pair
    for error in (
        refusal("", f"{first}={{}}", f"{second}={{}}"),
        refusal(as_yaml([first]), f"{second}={{}}"),
        refusal(as_yaml([second]), f"{first}={{}}"),
    ):
        assert named(first) in str(error.law) and named(second) in str(error.law)
        assert "command line" in str(error.where)
        assert error.remedy


def test_two_objectives_at_once_are_refused() -> None:
    text = "loss:\n  objective:\n    clip: {}\n    gmpo: {}\n"
    for error in (refusal(text), refusal("", "loss.objective.clip={}", "loss.objective.gmpo={}")):
        assert "exactly one of clip, cispo, gmpo" in str(error.law)
        assert "loss.objective.clip" in str(error.where) and "loss.objective.gmpo" in str(error.where)
        assert error.remedy
    assert "r.yaml:5" in str(refusal(text).where) and "r.yaml:6" in str(refusal(text).where)


def test_an_objective_without_a_kind_is_refused() -> None:
    assert "exactly one of clip, cispo, gmpo" in str(refusal("loss: {objective: {clip: null}}").law)


def test_dr_grpo_wants_its_constant() -> None:
    for error in (
        refusal("advantage: {estimator: dr_grpo}\n"),
        refusal("advantage: {estimator: dr_grpo}\nloss: {aggregate: token-mean}\n"),
    ):
        assert "advantage.estimator" in str(error.law) and "loss.aggregate" in str(error.law)
        assert "seq-mean-token-sum-norm" in str(error.law)
        assert "r.yaml:3 (advantage.estimator)" in str(error.where)
    assert "command line" in str(refusal("", "advantage.estimator=dr_grpo").where)
    assert read("", "advantage.estimator=dr_grpo", "loss.aggregate=seq-mean-token-sum-norm")


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        ("emma: {}", f"unknown key {PREFIX}.emma", f"did you mean {PREFIX}.ema?"),
        ("temporal-decay: {}", f"unknown key {PREFIX}.temporal-decay", f"{PREFIX}.temporal_decay?"),
        ("ema: {betta: 0.9}", f"unknown key {PREFIX}.ema.betta", f"did you mean {PREFIX}.ema.beta?"),
        ("ema: {sigma: 0.1}", f"unknown key {PREFIX}.ema.sigma", f"did you mean {PREFIX}.ptrw.sigma?"),
        ("ema: {beta: 1.5}", f"{PREFIX}.ema.beta = 1.5 cannot be used", "the default is 0.9"),
        ("ema: {beta: 0}", f"{PREFIX}.ema.beta = 0 cannot be used", "the default is 0.9"),
        ("asymmetric: {clip_neg: -0.1}", f"{PREFIX}.asymmetric.clip_neg = -0.1", "the default is 0.1"),
        ("ema: {beta: high}", f"{PREFIX}.ema.beta = 'high'", "the default is 0.9"),
        ("temporal_decay: {mode: lpsd}", f"{PREFIX}.temporal_decay.mode = 'lpsd'", "did you mean lspd?"),
        ("ema: 0.9", f"{PREFIX}.ema = 0.9", "correct it"),
        ("ema: true", f"{PREFIX}.ema = true", "correct it"),
    ],
)
def test_a_slip_is_told_with_its_place_and_what_was_meant(text: str, what: str, remedy: str) -> None:
    error = refusal(f"loss:\n  innovations:\n    {text}\n")
    assert error.what.startswith(what)
    assert remedy in str(error.remedy)
    assert str(error.where).startswith("r.yaml:5 (loss.innovations.")
    key, _, value = text.partition(": ")
    error = refusal("", f"{PREFIX}.{key}={value}")
    assert error.what.startswith(what) and "command line" in str(error.where)


def test_shares_of_structured_credit_add_up() -> None:
    error = refusal("loss:\n  innovations:\n    sca: {process: 0.6}\n")
    assert "process + structure + answer must be 1: they are 1.1" in str(error.law)
    assert "r.yaml:5 (loss.innovations.sca" in str(error.where)
    shares = read("loss: {innovations: {sca: {process: 0.6, answer: 0.2}}}").loss.innovations
    assert shares.model_dump()["sca"]["answer"] == 0.2


@pytest.mark.parametrize("name", available())
def test_null_and_an_empty_block_mean_the_defaults(name: str) -> None:
    picked = read(f"loss: {{innovations: {{{name}: {{}}}}}}").loss.innovations
    assert set(picked.picked()) == {name}
    assert read(f"loss: {{innovations: {{{name}: null}}}}").loss.innovations == picked
    assert read(f"loss: {{innovations: {{{name}:}}}}").loss.innovations == picked
    assert read("", f"{PREFIX}.{name}=null").loss.innovations == picked
    assert read("", f"{PREFIX}.{name}={{}}").loss.innovations == picked


def test_false_leaves_an_inherited_one_out() -> None:
    Path("base.yaml").write_text(BASE + "loss: {innovations: {ema: {beta: 0.5}, amic: {}}}\n")
    Path("child.yaml").write_text("defaults: base.yaml\nloss: {innovations: {amic: false, gspo: {}}}\n")
    assert set(load_recipe("child.yaml").recipe.loss.innovations.picked()) == {"ema", "gspo"}
    override = load_recipe("base.yaml", [f"{PREFIX}.ema=false"]).recipe
    assert set(override.loss.innovations.picked()) == {"amic"}
    assert not load_recipe("child.yaml", [f"{PREFIX}={{}}"]).recipe.loss.innovations.picked()


def test_the_remedy_of_a_conflict_works_as_it_is_written() -> None:
    both = as_yaml([f"{PREFIX}.amic", f"{PREFIX}.gspo"])
    assert f"{PREFIX}.gspo=false" in str(refusal(both).law)
    assert set(read(both, f"{PREFIX}.gspo=false").loss.innovations.picked()) == {"amic"}
    taken = as_yaml([f"{PREFIX}.ptrw", "loss.objective.clip"])
    assert "set loss.objective to null" in str(refusal(taken).law)
    assert isinstance(read(taken, "loss.objective=null").loss.surrogate, Ptrw)


SOUND = [
    *[[name] for name in available()],
    ["ema", "temporal_decay"],
    ["asymmetric", "ema", "gradient_adaptive"],
    ["amic", "gradient_adaptive", "ptrw"],
    ["asymmetric", "ema", "gradient_adaptive", "temporal_decay"],
    ["ema", "gspo", "sca"],
]


@pytest.mark.parametrize("names", SOUND, ids="+".join)
def test_a_resolved_recipe_keeps_exactly_what_was_picked(names: list[str]) -> None:
    recipe = read(as_yaml([f"{PREFIX}.{name}" for name in names]))
    assert list(recipe.loss.innovations.picked()) == list(recipe.loss.innovations.model_dump()) == names
    Path("dumped.yaml").write_text(dump_resolved(recipe), encoding="utf-8")
    again = load_recipe("dumped.yaml").recipe
    assert again == recipe
    assert list(again.loss.innovations.picked()) == names


def test_no_innovations_stay_none_through_a_dump() -> None:
    Path("dumped.yaml").write_text(dump_resolved(read("")), encoding="utf-8")
    again = load_recipe("dumped.yaml").recipe
    assert not again.loss.innovations.picked() and again.loss.innovations.model_dump() == {}


def test_markers_of_structured_credit_can_be_set() -> None:
    text = "loss: {innovations: {sca: {markers: ['[', ']', '{', '}']}}}"
    assert read(text).loss.innovations.model_dump()["sca"]["markers"] == ("[", "]", "{", "}")


def test_the_objective_is_the_recipes_or_an_innovations_or_the_clip() -> None:
    assert LossBlock().surrogate == ClipObjective(low=0.2, high=0.2, dual=3.0)
    higher = read("", "loss.objective.clip.high=0.28").loss.surrogate
    assert higher == ClipObjective(low=0.2, high=0.28, dual=3.0)
    assert read("loss: {objective: {cispo: {}}}").loss.surrogate == CispoObjective()
    assert read("loss: {objective: {gmpo: {}}}").loss.surrogate == GmpoObjective()
    assert read("loss: {innovations: {ptrw: {}}}").loss.surrogate == Ptrw()
    assert read("loss: {innovations: {asymmetric: {}}}").loss.surrogate == Asymmetric()
    assert read("loss: {innovations: {ema: {}, amic: {}}}").loss.surrogate == ClipObjective()


def test_gspo_has_a_clip_of_its_own_unless_one_is_given() -> None:
    assert read("", f"{PREFIX}.gspo={{}}").loss.surrogate == ClipObjective(low=3e-4, high=4e-4, dual=3.0)
    given = read("", f"{PREFIX}.gspo={{}}", "loss.objective.clip.low=0.05").loss.surrogate
    assert given == ClipObjective(low=0.05, high=0.2, dual=3.0)
    assert isinstance(read("", f"{PREFIX}.gspo={{}}", f"{PREFIX}.ptrw={{}}").loss.surrogate, Ptrw)


def test_reading_innovations_needs_no_torch() -> None:
    Path("r.yaml").write_text(BASE + as_yaml([f"{PREFIX}.{name}" for name in SOUND[-2]]), encoding="utf-8")
    code = (
        "import sys\n"
        "from grpo_mega.recipe import load_recipe\n"
        "recipe = load_recipe('r.yaml').recipe\n"
        "assert len(recipe.loss.innovations.picked()) == 4\n"
        "assert recipe.loss.surrogate.startup_line\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, check=False).returncode == 0


def test_another_objective_takes_the_place_of_an_inherited_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    recipe = load_recipe("recipes/objectives/clip_higher.yaml", ["loss.objective.gmpo={}"]).recipe
    assert recipe.loss.objective is not None and recipe.loss.objective.clip is None
    assert recipe.loss.surrogate == recipe.loss.objective.gmpo

"""tools/golden.py, on made-up runs: what it calls equal, and what it says of the first difference."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

TOOLS = Path(__file__).parents[2] / "tools"
STEPS = (
    {"step": 1, "stage": "sft", "time": 1.0, "sft/loss": 4.5, "perf/step_seconds": 0.1},
    {"step": 2, "stage": "grpo", "time": 2.0, "actor/loss": 0.25, "ema/std": "nan", "perf/step_seconds": 0.2},
    {"step": 2, "stage": "grpo", "time": 3.0, "pass@1": 0.5},
)


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there, and so does golden for golden_compare
    spec.loader.exec_module(module)
    return module


golden_compare: Any = _load("golden_compare")
golden: Any = _load("golden")


def a_run(folder: Path, weight: float = 1.0, moment: float = 0.5, **changes: Any) -> Path:
    """`changes` are of the second step, None takes a metric away."""
    lines = [dict(step) for step in STEPS]
    lines[1] = {name: value for name, value in (lines[1] | changes).items() if value is not None}
    checkpoint = folder / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    (folder / "hf").mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / "latest").write_text(checkpoint.name)
    save_file({"a.weight": torch.tensor([weight, 2.0])}, folder / "hf" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(
            {"critic.moment": torch.tensor([moment])},
            storage_writer=FileSystemWriter(checkpoint),
            no_dist=True,
        )
    return folder


def compared(tmp_path: Path, *allowed: str, **changes: Any) -> Any:
    """A run with one that differs from it in this."""
    found = golden_compare.Comparison()
    folders = a_run(tmp_path / "base"), a_run(tmp_path / "new", **changes)
    golden_compare.compare(folders, [golden._tolerance(text) for text in allowed], found)
    return found


def test_equal_but_for_the_clock(tmp_path: Path) -> None:
    found = compared(tmp_path, time=9.0, **{"perf/step_seconds": 7.0})
    assert found.first is None
    assert found.verdict() == "equal: 15 numbers, 2 tensors"  # 5 + 6 + 4; one of hf, one of the checkpoint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"actor/loss": 0.25000000000000006}, "actor/loss at step 2: 0.25 against 0.25000000000000006"),
        ({"actor/loss": None}, "actor/loss at step 2: 0.25 against 'absent'"),
        ({"actor/more": 1.0}, "actor/more at step 2: 'absent' against 1.0"),
        ({"perf/step_seconds": None}, "perf/step_seconds at step 2: 0.2 against 'absent'"),
        ({"ema/std": 1.0}, "ema/std at step 2: 'nan' against 1.0"),
        ({"stage": "sft"}, "stage at step 2: 'grpo' against 'sft'"),
    ],
)
def test_a_metric_that_differs_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    found = compared(tmp_path, **changes)
    assert found.verdict() == f"DIFFERENT {said}; different metrics: 1, tensors: 0 of 2"


def test_weights_are_compared_by_their_bytes(tmp_path: Path) -> None:
    found = compared(tmp_path, weight=1.0000001)
    assert found.first == "hf/a.weight: other bytes, largest distance 1.19e-07"  # one unit in the last place
    assert found.tensor_names == {"hf/a.weight"}


def test_zero_and_minus_zero_are_not_the_same() -> None:
    zero = torch.tensor(0.0)
    assert golden_compare._tensor_difference(zero, zero.clone()) is None
    assert golden_compare._tensor_difference(zero, -zero) == "other bytes, largest distance 0"
    assert (
        golden_compare._tensor_difference(zero, zero.double()) == "torch.float32 () against torch.float64 ()"
    )
    nan = torch.tensor(float("nan"))
    assert golden_compare._tensor_difference(nan, nan.clone()) is None


def test_the_newest_checkpoint_counts_too(tmp_path: Path) -> None:
    found = compared(tmp_path, moment=0.75)
    assert found.first == "checkpoint/critic.moment: other bytes, largest distance 0.25"


def test_what_is_missing_is_no_equality(tmp_path: Path) -> None:
    folders = a_run(tmp_path / "base"), a_run(tmp_path / "new")
    for gone in ("hf/model.safetensors", "checkpoints/latest", "metrics.jsonl"):
        for folder in folders:
            (folder / gone).unlink()
    found = golden_compare.Comparison()
    golden_compare.compare(folders, [], found)
    assert found.first == f"no metrics in {folders[0]}"
    (folders[0] / "metrics.jsonl").write_text("")
    shorter = golden_compare.Comparison()
    golden_compare.compare((a_run(tmp_path / "whole"), folders[1]), [], shorter)
    assert shorter.first == f"no metrics in {folders[1]}"
    assert shorter.tensor_names == {"hf/a.weight", "checkpoint/critic.moment"}


def test_what_may_differ_is_counted_and_the_rest_is_not_let_through(tmp_path: Path) -> None:
    close = {"actor/loss": 0.25 * (1 + 1e-7)}
    found = compared(tmp_path / "close", "actor/*=1e-6", **close)
    assert found.first is None and list(found.tolerated) == ["actor/loss"]
    assert found.tolerated["actor/loss"] == pytest.approx(1e-7)
    for number, (allowed, changes) in enumerate(
        [
            ("actor/*=1e-8", close),
            ("ema/*=1e-6", close),
            ("*=1", {"actor/loss": None}),
            ("*=1", {"ema/std": 1.0}),
            ("*=1", {"step": 3}),
            ("*=1", {"weight": 1.5}),
        ]
    ):
        assert compared(tmp_path / str(number), allowed, **changes).first is not None


def test_what_cannot_be_used_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(TOOLS.parent)
    for arguments, said in (
        ([root, str(tmp_path)], "is no checkout"),
        ([root, root, "--only", "nothing"], "nothing"),
        ([root, root, "--may-differ", "ema"], "PATTERN=RELATIVE"),
        ([root, root, "--keep", root], "not empty"),
    ):
        with pytest.raises(SystemExit) as refused:
            golden.main(arguments)
        assert refused.value.code == 2
        assert said in capsys.readouterr().err

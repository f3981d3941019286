"""A checkpoint continues the run that wrote it: bitwise on its own layout, to rounding on any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import tiny

CHECKPOINT = {"every": 3, "keep": 9}


def _rewind(run_dir: Path, target: Path, step: int) -> Path:
    """A copy of the run as if it had died right after the checkpoint of `step`, with later metrics still in
    its file."""
    shutil.copytree(run_dir, target)
    (target / "checkpoints" / "latest").write_text(f"step_{step:06d}")
    return target


@pytest.fixture(scope="module")
def uninterrupted(ranks, tmp_path_factory):
    """Two supervised and five policy steps at TP2 x PP2; checkpoints after steps 2 (stage end), 5 and 7."""
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    recipe = tiny.recipe_dict(run_dir, parallel={"tp": 2, "pp": 2}, checkpoint=CHECKPOINT)
    ranks(4).run(tiny.train_on_pool, recipe)
    return run_dir


@pytest.mark.parametrize("step", [2, 5])
def test_same_layout_continues_bitwise(step, uninterrupted, ranks, tmp_path):
    run_dir = _rewind(uninterrupted, tmp_path / "resumed", step)
    recipe = tiny.recipe_dict(run_dir, parallel={"tp": 2, "pp": 2}, checkpoint=CHECKPOINT)
    ranks(4).run(tiny.train_on_pool, recipe, resume=True)
    assert tiny.metrics_of(run_dir) == tiny.metrics_of(uninterrupted)


@pytest.mark.parametrize("parallel", [{}, {"dp": 2}, {"pp": 2, "vpp": 2}], ids=["tp1", "dp2", "pp2-vpp2"])
def test_other_layout_continues_the_same_run(parallel, uninterrupted, ranks, tmp_path):
    run_dir = _rewind(uninterrupted, tmp_path / "resumed", 5)
    recipe = tiny.recipe_dict(run_dir, parallel=parallel, checkpoint=CHECKPOINT)
    size = parallel.get("dp", 1) * parallel.get("pp", 1)
    ranks(size).run(tiny.train_on_pool, recipe, resume=True)
    resumed, whole = tiny.metrics_of(run_dir), tiny.metrics_of(uninterrupted)
    assert [line["step"] for line in resumed] == [line["step"] for line in whole]
    for line, reference in zip(resumed, whole, strict=True):
        assert line == pytest.approx(reference, rel=2e-4, abs=2e-5), f"step {line['step']}"


def test_old_checkpoints_go_and_the_newest_is_named(ranks, tmp_path):
    recipe = tiny.recipe_dict(tmp_path, checkpoint={"every": 2, "keep": 2}, loss={"kl": {"coef": 0.0}})
    ranks(1).run(tiny.train_on_pool, recipe)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step_000006", "step_000007"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000007"


def _optimizer_steps_after_reload(directory: Path) -> set[float]:
    """Adam's step count of every parameter, after 3 updates, a save, a load and 2 updates more."""
    from transformers import AutoConfig

    from grpo_mega.batching import distribute
    from grpo_mega.engine.checkpoint import RunState, load_checkpoint, save_checkpoint
    from grpo_mega.engine.parallel import initialize_layout
    from grpo_mega.engine.policy import LossTerms, PolicyEngine
    from grpo_mega.recipe.blocks import ModelBlock, ParallelBlock, TrainBlock
    from grpo_mega.sync.stream import HfDirectory, heads_of, load_hf

    layout = initialize_layout(ParallelBlock(dp=2), seed=0)
    hf = AutoConfig.from_pretrained(directory / "model")
    engine = PolicyEngine(hf, ModelBlock(hf="x", dtype="float32"), TrainBlock(), layout)
    load_hf(engine.chunks, layout, heads_of(hf, 128), HfDirectory(directory / "model"))
    engine.weights_changed()
    sequences = tiny.random_sequences(8)[layout.rank :: 2]

    def update(count: int) -> None:
        for _ in range(count):
            batches, counts = distribute(sequences, layout, 64)
            scale = 1.0 / counts.tokens
            engine.train_step(
                batches, lambda out, b, scale=scale: LossTerms(-scale * out.logprobs_T.sum(), {}), lr=1e-3
            )

    update(3)
    path = save_checkpoint(engine, directory / "checkpoints", RunState(3, 0, 3), keep=1)
    load_checkpoint(engine, path)
    update(2)
    optimizers = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    return {float(state["step"]) for o in optimizers for state in o.optimizer.state.values()}


def test_adam_counts_each_update_once_after_a_load(ranks, tmp_path):
    """megatron-core alone gives all parameters one shared step tensor on load: 3 + 2 x parameters instead of
    5."""
    tiny.save_model("qwen2", tmp_path / "model")
    for steps in ranks(2).run(_optimizer_steps_after_reload, tmp_path):
        assert steps == {5.0}


def test_a_finished_run_given_more_steps_is_the_longer_run(ranks, tmp_path):
    short, long = (
        tiny.recipe_dict(
            tmp_path / name,
            stages=[{"sft": {"steps": 2, "batch_size": 16}}, {"grpo": {"steps": steps}}],
            eval={"every": 0},
        )
        for name, steps in (("short", 3), ("long", 5))
    )
    ranks(1).run(tiny.train_on_pool, long)
    ranks(1).run(tiny.train_on_pool, short)
    longer = {**short, "stages": long["stages"]}
    ranks(1).run(tiny.train_on_pool, longer, resume=True)
    extended, whole = (tiny.metrics_of(tmp_path / name) for name in ("short", "long"))
    trained = [[line for line in lines if "actor/lr" in line] for lines in (extended, whole)]
    assert trained[0] == trained[1]

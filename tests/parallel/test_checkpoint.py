"""A checkpoint continues the run that wrote it: bitwise on its own layout, to rounding on any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.checkpoints import faults
from grpo_mega.errors import UserError
from tests import tiny
from tests.matrices import by_hand

LAYERS = 4  # two chunks of a stage and two stages
CHECKPOINT = {"every": 3, "keep": 9, "async": True}


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
    recipe = tiny.recipe_dict(run_dir, layers=LAYERS, parallel={"tp": 2, "pp": 2}, checkpoint=CHECKPOINT)
    ranks(4).run(tiny.train_on_pool, recipe)
    return run_dir


@pytest.mark.parametrize("step", [by_hand(2), 5])
def test_same_layout_continues_bitwise(step, uninterrupted, ranks, tmp_path):
    run_dir = _rewind(uninterrupted, tmp_path / "resumed", step)
    recipe = tiny.recipe_dict(run_dir, layers=LAYERS, parallel={"tp": 2, "pp": 2}, checkpoint=CHECKPOINT)
    ranks(4).run(tiny.train_on_pool, recipe, resume=True)
    assert tiny.metrics_of(run_dir) == tiny.metrics_of(uninterrupted)


@pytest.mark.parametrize(
    "parallel", [by_hand({}), {"dp": 2}, {"pp": 2, "vpp": 2}], ids=["tp1", "dp2", "pp2-vpp2"]
)
def test_other_layout_continues_the_same_run(parallel, uninterrupted, ranks, tmp_path):
    run_dir = _rewind(uninterrupted, tmp_path / "resumed", 5)
    recipe = tiny.recipe_dict(run_dir, layers=LAYERS, parallel=parallel, checkpoint=CHECKPOINT)
    size = parallel.get("dp", 1) * parallel.get("pp", 1)
    ranks(size).run(tiny.train_on_pool, recipe, resume=True)
    resumed, whole = tiny.metrics_of(run_dir), tiny.metrics_of(uninterrupted)
    assert [line["step"] for line in resumed] == [line["step"] for line in whole]
    for line, reference in zip(resumed, whole, strict=True):
        assert line == pytest.approx(reference, rel=2e-4, abs=2e-5), f"step {line['step']}"


@pytest.mark.parametrize("background", [True, by_hand(False)], ids=["async", "sync"])
def test_old_checkpoints_go_and_the_newest_is_named(background, ranks, tmp_path):
    checkpoint = {"every": 2, "keep": 2, "keep_best": False, "async": background}
    recipe = tiny.recipe_dict(tmp_path, checkpoint=checkpoint, loss={"kl": {"coef": 0.0}})
    ranks(1).run(tiny.train_on_pool, recipe)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step_000006", "step_000007"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000007"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        by_hand(_cut, "bytes instead of"),
        (_flip, "other bytes than were written"),
        by_hand(Path.unlink, "is missing"),
    ],
    ids=["truncated", "bit-flipped", "missing"],
)
def test_a_damaged_shard_is_named_and_the_checkpoint_before_it_used(
    damage, said, uninterrupted, ranks, tmp_path, capfd
):
    run_dir = _rewind(uninterrupted, tmp_path / "resumed", 7)
    shard = sorted((run_dir / "checkpoints" / "step_000007").glob("*.distcp"))[-1]
    damage(shard)
    recipe = tiny.recipe_dict(run_dir, layers=LAYERS, parallel={"tp": 2, "pp": 2}, checkpoint=CHECKPOINT)
    ranks(4).run(tiny.train_on_pool, recipe, resume=True)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert "after step 5" in [event["message"] for event in events if event["kind"] == "resume"]
    assert any(shard.name in e["message"] and said in e["message"] for e in events if e["kind"] == "damage")
    assert tiny.metrics_of(run_dir) == tiny.metrics_of(uninterrupted)


def _train_with_small_files(recipe: dict[str, object], limit: int) -> str:
    """A disk that takes no file above `limit` bytes, from the second checkpoint on."""
    import resource

    from grpo_mega.engine import saver

    whole, count = saver._no_room, 0

    def from_the_second(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return whole(*arguments)

    saver._no_room = from_the_second
    try:
        tiny.train_on_pool(recipe)
        return ""
    except UserError as error:
        return str(error)
    finally:
        saver._no_room = whole
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("background", [by_hand(True), False], ids=["async", "sync"])
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(background, ranks, tmp_path):
    checkpoint = {"every": 3, "keep": 9, "async": background}
    recipe = tiny.recipe_dict(
        tmp_path, layers=LAYERS, parallel={"dp": 2}, checkpoint=checkpoint, loss={"kl": {"coef": 0.0}}
    )
    said = ranks(2).run(_train_with_small_files, recipe, limit=1 << 20)
    assert all("step_000007" in text and "could not" in text for text in said), said
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["best", "latest", "step_000002"]
    assert faults(tmp_path / "checkpoints" / "step_000002") == []
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds.count("checkpoint failed") == 2


def _optimizer_steps_after_reload(directory: Path) -> set[float]:
    """Adam's step count of every parameter, after 3 updates, a save, a load and 2 updates more."""
    from transformers import AutoConfig

    from grpo_mega.batching import distribute
    from grpo_mega.checkpoints import RunState
    from grpo_mega.engine.checkpoint import load_checkpoint
    from grpo_mega.engine.parallel import initialize_layout
    from grpo_mega.engine.policy import LossTerms, PolicyEngine
    from grpo_mega.engine.saver import Saver
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
    saver = Saver(engine, directory / "checkpoints", keep=1, keep_best=False, background=True)
    saver.save(RunState(3, 0, 3))
    update(1)  # while the checkpoint is being written
    assert [outcome.fault for outcome in saver.finish()] == [None]
    load_checkpoint(engine, directory / "checkpoints" / "step_000003")
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


def _helpers_with_torch_after_a_save(run_dir: Path) -> list[str]:
    import psutil

    recipe = tiny.recipe_dict(run_dir, checkpoint=CHECKPOINT, eval={"every": 0})
    tiny.train_on_pool(recipe)
    helpers = psutil.Process().children(recursive=True)
    assert helpers
    return [" ".join(h.cmdline()) for h in helpers if any("libtorch" in m.path for m in h.memory_maps())]


def test_the_writers_helper_holds_no_torch(ranks, tmp_path):
    """It stays for the whole run, one for each rank: 270 MB otherwise, and seconds at the first save."""
    assert ranks(1).run(_helpers_with_torch_after_a_save, tmp_path / "run") == [[]]

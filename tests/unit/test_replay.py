"""Samples on disk come back as they were, shared out over any number of ranks, or are refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from grpo_mega.errors import UserError
from grpo_mega.recipe.schema import Recipe
from grpo_mega.rollout.replay import KeptRollouts, Origin, RolloutDump, RolloutReplay
from grpo_mega.rollout_files import RolloutFiles
from grpo_mega.types import Group, Prompt, Sample, Score
from tests import tiny

ORIGIN = Origin(seed=3, stage_index=1, step=12, prompts_per_step=5, group_size=2)
PROMPTS = [Prompt(f"train-{i}", i, f"prömpt {i}", tuple(range(i + 1)), str(i)) for i in range(5)]


def _sample(uid: str, index: int) -> Sample:
    logprobs = np.random.default_rng(index).normal(-3, 1, 3).astype(np.float32)
    return Sample(
        f"{uid}/{index}",
        index,
        (4, 70_000, 1),
        tuple(logprobs.tolist()),
        "π\n\0 4",
        "stop",
        (True, False, True),
    )


def _score(place: int) -> Score:
    counted = {"passed_tests": place, "total_tests": 9} if place % 2 else {}
    return Score(0.1 * place, {"exact": 1 / 3, "format/a": -0.0}, place / 9, **counted)


def _keep(directory: Path, ranks: int, *, scored: bool = True) -> KeptRollouts:
    """As `ranks` ranks would; all of it, in the places' order. Without a group to meet in, one after
    another, the first rank last."""
    groups = [Group(prompt, tuple(_sample(prompt.uid, k) for k in range(2))) for prompt in PROMPTS]
    scores = [(_score(place), _score(place + 5)) for place in range(5)]
    for rank in reversed(range(ranks)):
        places = list(range(rank, 5, ranks))
        given = [scores[place] for place in places] if scored else None
        kept = KeptRollouts(places, [groups[place] for place in places], given)
        dump = RolloutDump(directory, rank, ranks)
        _write(dump, kept)
    return KeptRollouts(list(range(5)), groups, scores if scored else None)


def _write(dump: RolloutDump, kept: KeptRollouts) -> None:
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "barrier", lambda: None)
        dump.write(ORIGIN, kept)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 3, 5, 7])
def test_every_group_goes_to_one_rank_as_it_was(tmp_path: Path, ranks: int, readers: int):
    whole = _keep(tmp_path, ranks)
    replay, found = RolloutReplay(tmp_path), {}
    for reader in range(readers):
        part = replay.read(ORIGIN, PROMPTS, reader, readers)
        assert part.scores is not None
        for place, group, scores in zip(part.places, part.groups, part.scores, strict=True):
            assert place not in found
            found[place] = (group, scores)
        if readers == ranks:
            assert part.places == list(range(reader, 5, ranks))  # its own again
    assert whole.scores is not None
    expected = {p: (whole.groups[p], whole.scores[p]) for p in whole.places}
    assert found == expected
    assert math.copysign(1, found[0][1][0].components["format/a"]) == -1


def test_samples_without_a_reward_have_none(tmp_path: Path):
    _keep(tmp_path, 1, scored=False)
    assert RolloutReplay(tmp_path).read(ORIGIN, PROMPTS, 0, 1).scores is None


def test_an_unknown_pass_rate_stays_unknown(tmp_path: Path):
    group = Group(PROMPTS[0], (_sample("train-0", 0), _sample("train-0", 1)))
    unknown = Score(1.0, {}, math.nan)
    _write(RolloutDump(tmp_path, 0, 1), KeptRollouts([0], [group], [(unknown, unknown)]))
    (scores,) = RolloutReplay(tmp_path).read(ORIGIN, PROMPTS, 0, 1).scores or []
    assert math.isnan(scores[0].pass_rate) and scores[0].passed_tests is None


def test_a_step_written_again_is_replaced_whatever_died_there(tmp_path: Path):
    _keep(tmp_path, 3)
    draft = tmp_path / f"{ORIGIN.folder}.writing"
    draft.mkdir()
    (draft / "rank_00002.parquet").write_bytes(b"half a file")
    whole = _keep(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / ORIGIN.folder).iterdir()) == [
        "rank_00000.parquet",
        "rank_00001.parquet",
    ]
    assert [p.name for p in tmp_path.iterdir()] == [ORIGIN.folder]
    assert RolloutReplay(tmp_path).read(ORIGIN, PROMPTS, 1, 2).groups == whole.groups[1::2]


def test_anything_reads_the_files(tmp_path: Path):
    _keep(tmp_path, 2)
    rows = pq.read_table(tmp_path / ORIGIN.folder).to_pylist()
    assert len(rows) == 10 and {row["prompt"] for row in rows} == {prompt.text for prompt in PROMPTS}


MISTAKES = {
    "another seed": (replace(ORIGIN, seed=4), PROMPTS, r"made with seed 3, the recipe has 4"),
    "another group size": (replace(ORIGIN, group_size=4), PROMPTS, r"rollout\.group_size 2"),
    "other prompts": (ORIGIN, [*PROMPTS[:4], replace(PROMPTS[4], uid="train-9")], "train-4 .* is train-9"),
    "other tokens": (ORIGIN, [replace(PROMPTS[0], token_ids=(8,)), *PROMPTS[1:]], "prompt 0 of the step"),
    "a missing step": (replace(ORIGIN, step=13), PROMPTS, "the last one kept is stage_1_step_000012"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_run_is_refused_by_name(tmp_path: Path, mistake: str):
    origin, prompts, words = MISTAKES[mistake]
    _keep(tmp_path, 1)
    with pytest.raises(UserError, match=words) as caught:
        RolloutReplay(tmp_path).read(origin, prompts, 0, 1)
    assert origin.folder in str(caught.value.where) and caught.value.remedy


def test_a_damaged_or_missing_file_is_named(tmp_path: Path):
    _keep(tmp_path, 2)
    file = tmp_path / ORIGIN.folder / "rank_00001.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rank_00001\.parquet cannot be read"):
        RolloutReplay(tmp_path).read(ORIGIN, PROMPTS, 1, 2)
    file.unlink()
    with pytest.raises(UserError, match="1 files lie beside each other, of 2"):
        RolloutReplay(tmp_path).read(ORIGIN, PROMPTS, 0, 2)


def test_a_folder_that_not_all_ranks_see_is_said(tmp_path: Path):
    with pytest.raises(UserError, match=r"rank_00001\.parquet is not where rank 0 looks"):
        _write(RolloutDump(tmp_path, 0, 2), KeptRollouts([], [], []))


def test_options_that_contradict_are_refused(tmp_path: Path):
    recipe = Recipe.model_validate(tiny.recipe_dict(tmp_path / "run"))
    supervised = Recipe.model_validate(tiny.recipe_dict(tmp_path, stages=[{"sft": {"steps": 1}}]))
    choosy = Recipe.model_validate(tiny.recipe_dict(tmp_path, rollout={"dynamic_sampling": {}}))
    kept = tmp_path / "kept"
    _keep(kept, 1)
    for files, of, words in [
        (RolloutFiles(only=True), recipe, "throw its samples away"),
        (RolloutFiles(dump=kept, replay=kept), recipe, "samples nothing"),
        (RolloutFiles(replay=tmp_path), recipe, "holds no rollouts"),
        (RolloutFiles(dump=kept), recipe, "holds rollouts already"),
        (RolloutFiles(dump=tmp_path / "new"), supervised, "no stage of this recipe samples"),
        (RolloutFiles(dump=tmp_path / "new"), choosy, "trains on groups of other steps too"),
    ]:
        with pytest.raises(UserError, match=words):
            files.check(of, resume=False)
    RolloutFiles(dump=kept).check(recipe, resume=True)

"""The folder of checkpoints: complete or not there, damage found by name, the right ones kept."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mega import checkpoints
from grpo_mega.checkpoints import (
    BEST,
    LATEST,
    RunState,
    best_so_far,
    candidates,
    complete_checkpoints,
    faults,
    folder_of,
    partial_of,
    point_to,
    prune,
    read_state,
)
from grpo_mega.engine.saver import Saver
from grpo_mega.errors import UserError
from tests.checkpoints import write


def test_a_published_checkpoint_is_whole_and_remembers_its_state(tmp_path):
    folder = write(tmp_path, 3, pass_rate=0.5)
    assert faults(folder) == []
    assert read_state(folder) == RunState(3, 0, 3, 0.5, {"guard": {"tier": 1}})
    assert sorted(path.name for path in folder.iterdir()) == [
        *("__0_0.distcp", "common.pt", "manifest.json", "state.json")
    ]


def test_damage_is_found_by_name(tmp_path):
    folder = write(tmp_path, 3)
    shard = folder / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert faults(folder) == ["step_000003/__0_0.distcp has 599 bytes instead of 600"]
    shard.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    assert faults(folder) == ["step_000003/__0_0.distcp has other bytes than were written"]
    shard.unlink()
    assert faults(folder) == ["step_000003/__0_0.distcp is missing"]
    (folder / "manifest.json").write_text("{")
    assert faults(folder) == ["step_000003/manifest.json cannot be read"]


def test_ranks_that_share_the_reading_find_all_of_it(tmp_path):
    folder = write(tmp_path, 3)
    for name in ("__0_0.distcp", "common.pt", "state.json"):
        (folder / name).write_bytes(b"x")
    shares = [fault for rank in range(2) for fault in faults(folder, share=(rank, 2))]
    assert sorted(shares) == sorted(faults(folder)) and len(shares) == 3


def test_the_newest_named_checkpoint_comes_first_and_older_ones_after_it(tmp_path):
    folders = [write(tmp_path, step) for step in (5, 10, 1000000)]
    write(tmp_path, 1000001, point=False)  # its run died before it was named
    partial_of(folder_of(tmp_path, 20)).mkdir()
    assert candidates(tmp_path) == folders[::-1]
    assert candidates(tmp_path, 10) == [folders[1]]
    (tmp_path / LATEST).unlink()  # died before the first was named
    assert candidates(tmp_path)[0].name == "step_1000001"


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(tmp_path):
    write(tmp_path, 5)
    with pytest.raises(UserError, match="of step 7") as refusal:
        candidates(tmp_path, 7)
    assert refusal.value.remedy == "choose one of step_000005"
    with pytest.raises(UserError, match="no checkpoint in"):
        candidates(tmp_path / "empty")


def test_a_checkpoint_written_again_replaces_the_first(tmp_path):
    write(tmp_path, 5, pass_rate=0.1)
    folder = write(tmp_path, 5, pass_rate=0.2)
    assert read_state(folder).pass_rate == 0.2 and faults(folder) == []
    assert complete_checkpoints(tmp_path) == [folder]


def test_the_newest_and_the_best_are_kept(tmp_path):
    engine: Any = None
    saver = Saver(engine, tmp_path, keep=9, keep_best=True, background=False)
    for step, rate in ((1, 0.2), (2, 0.9), (3, 0.3), (4, 0.4)):
        folder = write(tmp_path, step, pass_rate=rate)
        saver._name(read_state(folder), folder)
    assert best_so_far(tmp_path) == 0.9
    prune(tmp_path, 2, (LATEST, BEST))
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "step_000002",
        "step_000003",
        "step_000004",
    ]
    prune(tmp_path, 1, (LATEST,))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000004"]


def test_a_death_while_writing_leaves_the_old_pointer(tmp_path, monkeypatch):
    write(tmp_path, 5)

    def die(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        point_to(tmp_path, LATEST, folder_of(tmp_path, 6))
    assert (tmp_path / LATEST).read_text() == "step_000005"

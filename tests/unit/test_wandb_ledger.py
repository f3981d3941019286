"""The files of the synchronisation by themselves, without wandb."""

from __future__ import annotations

import subprocess

from grpo_mega.monitor.wandb_delivery import coarsened, git_state
from grpo_mega.monitor.wandb_ledger import Ledger, RunLog


def test_the_state_of_a_checkout(tmp_path):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    file = tmp_path / "code.py"
    file.write_text("1")
    assert git_state(file) == {}
    git("init")
    assert git_state(file) == {}  # an installed package inside somebody's checkout
    git("add", "code.py")
    git("commit", "-m", "one")
    assert git_state(file) == {"git": {"commit": git("rev-parse", "HEAD"), "dirty": False}}
    file.write_text("2")
    assert git_state(file)["git"]["dirty"] is True  # pyright: ignore[reportIndexIssue]


def test_the_ledger_admits_a_key_once(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.admit("train", 1, "metrics", {"x": 1.0})
    assert not ledger.admit("train", 1, "metrics", {"x": 1.0})
    ledger.settle([("train", 1)])
    assert not ledger.admit("train", 1, "metrics", {"x": 1.0})
    assert not Ledger(tmp_path).admit("train", 1, "metrics", {"x": 1.0})
    assert ledger.admit("eval", 1, "metrics", {"x": 1.0})
    assert [record.key for record in Ledger(tmp_path).owed()] == [("eval", 1)]


def test_who_may_have_handed_over_what(tmp_path):
    """First what was replayed, then what the process admitted itself; never what a later one admitted, nor
    what wandb refused."""
    for step in (1, 2):
        Ledger(tmp_path).admit("train", step, "metrics", {})
    ledger = Ledger(tmp_path)  # a process that replays 2 but not 1
    log = RunLog("a", "", "a.wandb", True, first_wire_step=ledger.first_wire_step, replayed=[("train", 2)])
    ledger.state.logs.append(log)
    ledger.save()
    records = [ledger.admit("train", step, "metrics", {}) for step in (3, 4, 5)]
    assert records[1]
    ledger.mark_refused(records[1])
    ledger.settle([("train", 3)])
    later = Ledger(tmp_path)
    later.admit("train", 6, "metrics", {})
    assert later.owed_by(later.state.logs[0]) == [("train", 2), ("train", 5)]
    assert [record.trainer_step for record in later.owed()] == [1, 2, 4, 5, 6]


def test_bins_are_joined_without_losing_a_count():
    counts, edges = coarsened([1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], 2)
    assert (counts.tolist(), edges.tolist()) == ([6, 9], [0, 3, 5])  # three bins, then the two that are left
    counts, edges = coarsened([1, 2], [0, 1, 2], 2)
    assert (counts.tolist(), edges.tolist()) == ([1, 2], [0, 1, 2])

"""The frozen set of pairs: drawn once, kept in a file; when it is looked at; how the log calls a gap."""

from __future__ import annotations

from grpo_mega.critic.audit import AuditSet, first_pairs, is_due
from grpo_mega.critic.details import gap_verdict
from grpo_mega.critic.pairs import AnswerPair
from grpo_mega.recipe.critic_block import CriticAudit

PAIRS = [
    AnswerPair(f"p{prompt}/{i}", (prompt, 7), (4, 5, 1), (4, i, 1), "prompt", "täacher", "student")
    for prompt in (3, 4, 5)
    for i in (8, 9)
]


def test_a_set_survives_its_file(tmp_path) -> None:
    audit = AuditSet(tuple(PAIRS))
    audit.save(tmp_path / "new" / "critic_audit.json")
    assert AuditSet.load(tmp_path / "new" / "critic_audit.json") == audit
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["critic_audit.json"]


def test_one_pair_of_each_prompt_comes_first() -> None:
    gathered = list(enumerate(PAIRS))[::-1]  # ranks answer in any order
    assert [pair.uid for pair in first_pairs(gathered, 4).pairs] == ["p3/8", "p4/8", "p5/8", "p3/9"]
    assert len(first_pairs(gathered, 99).pairs) == 6


def test_due_after_the_first_step_and_then_every_so_many() -> None:
    block = CriticAudit(pairs=8, every=10)
    assert [step for step in range(1, 31) if is_due(block, step)] == [1, 10, 20, 30]
    assert not is_due(CriticAudit(pairs=0), 10)


def test_what_a_gap_is_called() -> None:
    assert [gap_verdict(gap).split(": ")[1] for gap in (0.0, 0.5, 0.51, 1.0, 1.01)] == [
        "ok",
        "ok",
        "watch",
        "watch",
        "ALARM",
    ]
    assert gap_verdict(None) == "no gap to measure"

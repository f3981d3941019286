"""Bands and remedies of the critic: begin, stay, are undone, survive a checkpoint."""

from __future__ import annotations

import json

import pytest

from grpo_mega.critic.health import (
    NOTHING,
    CriticHealthMonitor,
    HealthState,
    Remedies,
)
from grpo_mega.recipe.critic_block import CriticHealth

WELL = {
    "critic/d_acc": 0.75,
    "critic/score_diff": 2.0,
    "critic/grad_norm": 2.0,
    "critic/identical_gap": 0.0,
    "critic/teacher_wins": 0.75,
}
ACTING = CriticHealth(autopilot=True, window=3)


def feed(monitor: CriticHealthMonitor, steps: int, *, first: int = 1, **values: float):
    """The verdicts of so many steps; `values` by the metric's last name."""
    metrics = WELL | {f"critic/{name}": value for name, value in values.items()}
    return [monitor.observe(first + i, metrics) for i in range(steps)]


def names(verdict) -> list[str]:
    return [finding.name for finding in verdict.findings]


def test_a_well_critic_is_left_alone() -> None:
    monitor = CriticHealthMonitor(ACTING)
    assert all(not v.findings and not v.applied for v in feed(monitor, 10))
    assert monitor.remedies == NOTHING
    assert feed(monitor, 1)[0].metrics == {"critic_health/alarms": 0.0, "critic_health/interventions": 0.0}


@pytest.mark.parametrize(
    ("symptom", "ill", "remedies"),
    [
        ("too sure", {"d_acc": 0.93}, Remedies(temperature=7.0)),
        ("unsure", {"d_acc": 0.55}, Remedies(temperature=3.0, batch_norm=False)),
        ("steep", {"grad_norm": 12.0}, Remedies(lr_at_most=5e-6, grad_clip=1.0)),
        ("flat", {"score_diff": 0.2, "grad_norm": 0.3}, Remedies(lr_factor=2.0)),
    ],
)
def test_each_symptom_has_its_remedy_and_is_over_in_its_band(symptom, ill, remedies) -> None:
    monitor = CriticHealthMonitor(ACTING)
    early = feed(monitor, 2, **ill)
    assert not any(verdict.findings for verdict in early)  # the window is not full yet
    (begun,) = feed(monitor, 1, first=3, **ill)
    assert symptom in names(begun) and [line.split(":")[0] for line in begun.applied] == [symptom]
    assert monitor.remedies == remedies
    assert monitor.state.interventions == 1
    (again,) = feed(monitor, 1, first=4, **ill)
    assert not again.findings and not again.applied  # said and done once
    verdicts = feed(monitor, 3, first=5)
    assert [line for v in verdicts for line in v.undone] == [f"{symptom}: {remedies} is undone"]
    assert monitor.remedies == NOTHING and monitor.state.interventions == 1


def test_a_remedy_stays_until_the_band_is_reached_and_not_only_the_trigger_left() -> None:
    monitor = CriticHealthMonitor(ACTING)
    feed(monitor, 3, d_acc=0.95)
    feed(monitor, 6, first=4, d_acc=0.87)  # below .90 and still above .85
    assert monitor.remedies.temperature == 7.0
    feed(monitor, 3, first=10, d_acc=0.84)
    assert monitor.remedies == NOTHING


def test_without_autopilot_it_only_speaks() -> None:
    monitor = CriticHealthMonitor(CriticHealth(window=3))
    verdict = feed(monitor, 3, d_acc=0.95)[-1]
    assert "too sure" in names(verdict) and not verdict.applied
    assert monitor.remedies == NOTHING
    finding = next(f for f in verdict.findings if f.name == "too sure")
    assert "analyze_data_quality" in finding.change and "(done)" not in finding.change
    assert finding.since == 3 and "0.95" in finding.what


def test_flat_with_a_healthy_gradient_is_advice_alone() -> None:
    monitor = CriticHealthMonitor(ACTING)
    verdict = feed(monitor, 3, score_diff=0.2)[-1]
    assert "flat" in names(verdict) and not verdict.applied and monitor.remedies == NOTHING


def test_a_difference_that_moves_or_stands_in_its_band_is_not_flat() -> None:
    monitor = CriticHealthMonitor(ACTING)
    for step, value in enumerate((0.2, 0.5, 0.8, 0.9)):
        assert "flat" not in names(feed(monitor, 1, first=step, score_diff=value)[0])
    assert not feed(CriticHealthMonitor(ACTING), 6)[-1].findings  # steady at 2


@pytest.mark.parametrize(
    ("ill", "name"),
    [
        ({"identical_gap": 0.7}, "critic/identical_gap"),
        ({"teacher_wins": 0.82}, "critic/teacher_wins"),
        ({"score_diff": 6.0}, "critic/score_diff"),
        ({"grad_norm": 0.7}, "critic/grad_norm"),
        ({"d_acc": 0.62}, "critic/d_acc"),
        ({"score_length_corr": -0.8}, "critic/score_length_corr"),
    ],
)
def test_outside_a_band_is_said_once(ill, name) -> None:
    monitor = CriticHealthMonitor(ACTING)
    verdicts = feed(monitor, 6, **ill)
    assert [names(verdict) for verdict in verdicts] == [[], [], [name], [], [], []]
    assert monitor.remedies == NOTHING


def test_a_metric_that_is_not_there_waits() -> None:
    monitor = CriticHealthMonitor(ACTING)
    for step in range(9):
        metrics = dict(WELL)
        if step % 3:  # no identical answers in most steps
            del metrics["critic/identical_gap"]
        else:
            metrics["critic/identical_gap"] = 2.0
        monitor.observe(step, metrics)
    assert monitor.state.active["critic/identical_gap"] == 6  # its third value


def test_remedies_join() -> None:
    monitor = CriticHealthMonitor(ACTING)
    feed(monitor, 3, d_acc=0.95, grad_norm=12.0)
    assert monitor.remedies == Remedies(temperature=7.0, lr_at_most=5e-6, grad_clip=1.0)


def test_rates() -> None:
    assert NOTHING.lr(1e-6) == 1e-6
    assert Remedies(lr_factor=2.0).lr(1e-6) == 2e-6
    assert Remedies(lr_at_most=5e-6).lr(1e-4) == 5e-6
    assert Remedies(lr_at_most=5e-6, lr_factor=2.0).lr(1e-6) == 2e-6


@pytest.mark.parametrize("cut", range(1, 9))
def test_it_goes_on_from_a_checkpoint_as_if_there_had_been_none(cut) -> None:
    series = [0.75, 0.95, 0.95, 0.95, 0.87, 0.87, 0.8, 0.8, 0.8, 0.5, 0.5, 0.5]

    def run(monitor: CriticHealthMonitor, first: int, last: int):
        return [feed(monitor, 1, first=step, d_acc=series[step])[0] for step in range(first, last)]

    whole = CriticHealthMonitor(ACTING)
    expected = run(whole, 0, len(series))
    before = CriticHealthMonitor(ACTING)
    seen = run(before, 0, cut)
    state = HealthState.from_json(json.loads(json.dumps(before.state.to_json())))
    assert state == before.state
    after = CriticHealthMonitor(ACTING, state)
    assert [*seen, *run(after, cut, len(series))] == expected
    assert after.state == whole.state and whole.state.interventions == 2

"""What a person sees: rate, time left and key metrics, as a bar on a terminal and as lines in a pipe."""

from __future__ import annotations

import io

import pytest
import rich.console

from grpo_mega.monitor.console import Console, format_seconds, headlines, print_error
from grpo_mega.types import StepReport


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pipe_console(*, quiet: bool = False) -> tuple[Console, io.StringIO, Clock]:
    text, clock = io.StringIO(), Clock()
    return Console(quiet=quiet, output=rich.console.Console(file=text), clock=clock), text, clock


def step(number: int, **metrics: float) -> StepReport:
    return StepReport(step=number, stage="grpo", metrics=metrics)


def test_a_line_has_progress_rate_time_left_and_key_metrics():
    console, text, clock = pipe_console()
    with console.stage("grpo", total=10):
        for number in range(2):
            clock.now += 4.0
            metrics = {"actor/loss": 0.125, "reward/mean": 0.5, "perf/tokens_per_second": 5230.0}
            console.step(step(number, **metrics))
    # 4 s a step, 9 and then 8 steps to go
    assert text.getvalue().splitlines() == [
        "grpo 1/10 | 4.0 s/step | 36.0 s left | loss 0.1250 | reward 0.500 | tok/s 5.2k",
        "grpo 2/10 | 4.0 s/step | 32.0 s left | loss 0.1250 | reward 0.500 | tok/s 5.2k",
    ]


def test_fast_steps_share_a_line_but_the_last_one_is_shown():
    console, text, clock = pipe_console()
    with console.stage("sft", total=20):
        for number in range(20):
            clock.now += 0.25
            console.step(step(number))
    shown = [line.split(" ")[1] for line in text.getvalue().splitlines()]
    assert shown == ["1/20", "9/20", "17/20", "20/20"]  # every 2 s = 8 steps


def test_time_left_follows_the_recent_steps():
    console, text, clock = pipe_console()
    with console.stage("grpo", total=100):
        clock.now += 1000.0  # the first step compiles
        console.step(step(0))
        for number in range(1, 31):
            clock.now += 2.0
            console.step(step(number))
    assert "grpo 31/100 | 2.0 s/step | 2:18 left" in text.getvalue()  # 69 steps x 2 s


def test_a_resumed_stage_goes_on_counting():
    console, text, clock = pipe_console()
    with console.stage("grpo", total=10, start=7):
        clock.now += 1.0
        console.step(step(7))
    assert text.getvalue().startswith("grpo 8/10 | 1.0 s/step | 2.0 s left")


def test_an_evaluation_is_always_shown_and_stays_in_view():
    console, text, clock = pipe_console()
    with console.stage("grpo", total=10):
        console.evaluation(step(0, **{"eval_avg_test_pass_rate": 0.25, "pass@4": 0.5}))
        clock.now += 1.0
        console.step(step(0))
    evaluation, progress = text.getvalue().splitlines()
    assert evaluation == "grpo step 0: evaluation | held-out 0.250 | pass@4 0.500"
    assert progress.endswith("| held-out 0.250")


def test_a_long_line_is_not_broken():
    console, text, _ = pipe_console()
    console.say("a word " * 100)
    assert len(text.getvalue().splitlines()) == 1


def test_a_phase_says_how_long_it_took():
    console, text, clock = pipe_console()
    with console.phase("loading model"):
        clock.now += 3.2
    assert text.getvalue().splitlines() == ["loading model ...", "loading model: done in 3.2 s"]


def test_quiet_leaves_out_progress_only():
    console, text, clock = pipe_console(quiet=True)
    with console.phase("loading model"), console.stage("grpo", total=2):
        clock.now += 5.0
        console.step(step(0))
        console.evaluation(step(0, eval_avg_test_pass_rate=0.25))
    console.say("done")
    assert text.getvalue().splitlines() == ["grpo step 0: evaluation | held-out 0.250", "done"]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]):
    console = Console.silent()
    with console.phase("loading model"), console.stage("grpo", total=1):
        console.step(step(0))
        console.evaluation(step(0, eval_avg_test_pass_rate=0.25))
        console.say("done")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_its_cursor_back():
    text, clock = io.StringIO(), Clock()
    terminal = rich.console.Console(file=text, force_terminal=True, width=100, color_system=None)
    console = Console(output=terminal, clock=clock)
    with console.phase("loading model"):
        pass
    with console.stage("grpo", total=4):
        clock.now += 1.0
        console.step(step(0, **{"actor/loss": 0.125}))
        with console.phase("evaluating"):
            console.evaluation(step(0, eval_avg_test_pass_rate=0.25))
    shown = text.getvalue()
    assert "1/4 1.0 s/step | 3.0 s left" in shown
    assert "loss 0.1250" in shown
    assert "evaluation | held-out 0.250" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # shown again after it was hidden


def test_headlines_shows_what_is_there():
    assert headlines({}) == ""
    assert headlines({"sft/loss": 1.0, "perf/tokens_per_second": 80.0}) == "loss 1.0000 | tok/s 80"
    assert headlines({"actor/loss": float("nan")}) == "loss nan"


def test_format_seconds():
    assert [format_seconds(seconds) for seconds in (3.21, 245.0, 3723.0)] == ["3.2 s", "4:05", "1:02:03"]


def test_an_error_is_plain_in_a_pipe_and_keeps_brackets(capsys: pytest.CaptureFixture[str]):
    print_error("bad [red]key[/red]\n  remedy: none")
    assert capsys.readouterr().err == "error: bad [red]key[/red]\n  remedy: none\n"

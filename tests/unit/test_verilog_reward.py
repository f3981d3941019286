"""The Verilog reward: the preset's arithmetic by hand, and real simulations, honest and not."""

from __future__ import annotations

import pytest

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import RewardItem, SandboxLimits, VerilogReward
from grpo_mega.reward import verilog
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.reward.sandbox import SandboxResult
from grpo_mega.reward.verilog import (
    NOT_COMPILED,
    Verdict,
    VerilogScorer,
    efficiency,
    length,
    readability,
    result_of,
    verdict_of,
)
from grpo_mega.types import Group, Prompt, Sample

ADDER = """// adds
module adder(input [3:0] a, input [3:0] b, output [4:0] s);
  assign s = a + b;
endmodule
"""
TESTBENCH = """
module tb;
  reg [3:0] a, b; wire [4:0] s;
  adder dut(.a(a), .b(b), .s(s));
  task check(input [3:0] x, input [3:0] y);
    begin
      a = x; b = y; #1;
      if (s === x + y) $display("%s PASS %0d+%0d", `GRPO_TOKEN, x, y);
      else $display("%s FAIL %0d+%0d", `GRPO_TOKEN, x, y);
    end
  endtask
  initial begin
    check(0, 0); check(1, 2); check(7, 8); check(15, 15);
    $finish;
  end
endmodule
"""
PLAIN_TESTBENCH = TESTBENCH.replace("%s PASS", "PASS").replace("%s FAIL", "FAIL").replace("`GRPO_TOKEN, ", "")


@pytest.fixture(scope="module")
def scorer():
    return VerilogScorer(VerilogReward(limits=SandboxLimits(wall_seconds=15.0)), "verilog")


def score(scorer, design, testbench=TESTBENCH, **meta):
    prompt = Prompt(
        uid="train-7", index=7, text="?", token_ids=(5,), answer="", meta={"testbench": testbench} | meta
    )
    text = f"```verilog\n{design}\n```"
    return scorer.score(prompt, Sample("train-7/0", 0, (5,), (-0.1,), text, "stop"))


def test_the_presets_arithmetic():
    """All of 4 tests: functional 15 * 1 * min(1.3^3, 2) = 30, robustness 5; the design meets all checks:
    efficiency 2, readability 1, length 1. .6 * 30 + .2 * 2 + .1 * 1 + .1 * 5 + .1 * 1 + 2 = 21.1, clipped."""
    result = result_of(Verdict(True, False, 4, 4), ADDER, VerilogReward())
    assert dict(result.parts) == {
        "functional": 30,
        "efficiency": 2,
        "readability": 1,
        "robustness": 5,
        "length": 1,
        "compile": 2,
        "no_code": 0,
    }
    assert (result.value, result.pass_rate, result.passed_tests, result.total_tests) == (20, 1, 4, 4)
    assert result_of(Verdict(True, False, 4, 4), ADDER, VerilogReward(clip=100)).value == pytest.approx(21.1)


@pytest.mark.parametrize(
    ("verdict", "functional", "robustness", "compiled"),
    [
        (Verdict(False, False, 0, 0), 0, 0, -8),
        (Verdict(True, True, 0, 0), -4, 0, 2),
        (Verdict(True, False, 0, 0), -2, 0, 2),
        (Verdict(True, False, 0, 4), 0, 0, 2),
        (Verdict(True, False, 1, 4), 15 / 4, 0, 2),  # the bonus begins with the second
        (Verdict(True, False, 2, 4), 15 / 2 * 1.3, 0, 2),
        (Verdict(True, False, 3, 4), 15 * 3 / 4 * 1.69, 0, 2),
        (Verdict(True, False, 4, 5), 15 * 4 / 5 * 2, 0, 2),  # 1.3^3 = 2.197, at most 2
        (Verdict(True, False, 1, 1), 15, 5, 2),
        (Verdict(True, False, 5, 5), 30, 6.5, 2),
    ],
)
def test_every_outcome(verdict, functional, robustness, compiled):
    result = result_of(verdict, ADDER, VerilogReward())
    assert result.parts["functional"] == pytest.approx(functional)
    assert (result.parts["robustness"], result.parts["compile"]) == (robustness, compiled)
    total = 0.6 * functional + 0.2 * 2 + 0.1 * 1 + 0.1 * robustness + 0.1 * 1 + compiled
    assert result.value == pytest.approx(min(total, 20))


def test_quality_of_the_text():
    # efficiency: 5 of 6 with an initial block; 4 of 6 with a case without default too
    assert efficiency(ADDER + "initial x = 0;") == pytest.approx(5 / 6)
    assert efficiency(ADDER + "initial case (x) 1: y = 2; endcase") == pytest.approx(4 / 6)
    assert efficiency(ADDER + "// initial #5 a / b") == 1  # comments are no code
    assert efficiency("module m #(parameter W = 4)(input [W-1:0] a); sub #(.N(3)) s(a); endmodule") == 1
    assert efficiency("always #5 q = a / b;") == pytest.approx(4 / 6)
    # readability: neither comment nor indentation, two statements in a line
    assert readability("a = b; c = d;") == pytest.approx(1 / 4)
    assert readability("// loop\n  for (i = 0; i < 4; i = i + 1)\n" + "x" * 121) == pytest.approx(3 / 4)


def test_length_of_the_text():
    # 10 characters of at least 20; 30 of at most 20: 1 - 2 * 10 / 20; 60 are past twice the end
    assert length("a" * 10, (20, 40)) == 0.5
    assert length("a b\n" * 10, (20, 40)) == 1
    assert length("a" * 30, (5, 20)) == 0
    assert length("a" * 60, (5, 20)) == -1


@pytest.mark.parametrize(
    ("output", "token", "expected_tests", "counted"),
    [
        ("PASS a\nFAIL b\nPASS c\n", None, 0, (2, 3)),
        ("PASS: a\nnoise\n  PASS b\n", None, 0, (2, 2)),
        ("PASS a\nPASS a\nFAIL a\n", None, 0, (0, 1)),  # one test under one name
        ("PASS\nPASS\nFAIL\n", None, 0, (2, 3)),
        ("PASSED a\n", None, 0, (0, 0)),
        ("3/4 tests passed\n", None, 0, (3, 4)),
        ("9/4 tests passed\n", None, 0, (4, 4)),
        ("1/4 tests passed\n3/4 tests passed.\n", None, 0, (3, 4)),
        ("PASS a\n4/4 tests passed\n", None, 0, (1, 1)),
        ("PASS a\n", None, 5, (1, 5)),  # the other four never came
        ("", None, 5, (0, 0)),
        ("PASS a\nTT PASS b\nTT FAIL c\n", "TT", 0, (1, 2)),
        ("4/4 tests passed\nTT 1/4 tests passed\n", "TT", 0, (1, 4)),
        ("PASS a\n", "TT", 0, (0, 0)),
    ],
)
def test_what_a_testbench_prints(output, token, expected_tests, counted):
    verdict = verdict_of(ran(output), ADDER, token, expected_tests)
    assert (verdict.compiled, verdict.crashed, verdict.passed, verdict.tests) == (True, False, *counted)


def ran(output, exit_code=0, truncated=False):
    return SandboxResult(exit_code, output.encode(), b"", False, False, truncated, 0.1)


def test_crashes_are_no_results():
    assert verdict_of(ran("PASS a", NOT_COMPILED), ADDER, None) == Verdict(False, False, 0, 0)
    assert verdict_of(ran("PASS a", 1), ADDER, None).crashed
    assert verdict_of(ran("PASS a", truncated=True), ADDER, None).crashed


@pytest.mark.verilog
def test_a_right_design(scorer):
    result = score(scorer, ADDER, test_count=4)
    assert (result.value, result.pass_rate) == (20, 1)


@pytest.mark.verilog
def test_a_wrong_design(scorer):
    """a | b is right for 0+0, 1+2 and 7+8: 15 * 3/4 * 1.69 = 19.0125."""
    result = score(scorer, ADDER.replace("a + b", "a | b"))
    assert (result.passed_tests, result.total_tests) == (3, 4)
    assert result.parts["functional"] == pytest.approx(19.0125)


@pytest.mark.verilog
@pytest.mark.parametrize(
    "design", ["module adder(", "module other; endmodule", ADDER.replace("assign", "asign"), ADDER + ADDER]
)
def test_designs_that_do_not_compile(scorer, design):
    result = score(scorer, design)
    assert (result.parts["compile"], result.parts["functional"], result.pass_rate) == (-8, 0, 0)


@pytest.mark.verilog
@pytest.mark.parametrize("text", ["", "I cannot.", "```verilog\n\n```", "```verilog\n// module\n```"])
def test_responses_without_a_design(scorer, text):
    prompt = Prompt("train-7", 7, "?", (5,), "", meta={"testbench": TESTBENCH})
    result = scorer.score(prompt, Sample("train-7/0", 0, (5,), (-0.1,), text, "stop"))
    assert (result.value, result.pass_rate, result.parts["no_code"]) == (-6, 0, -6)


@pytest.mark.verilog
def test_a_simulation_without_end_crashes():
    scorer = VerilogScorer(VerilogReward(limits=SandboxLimits(wall_seconds=1.0)), "verilog")
    result = score(
        scorer, ADDER.replace("endmodule", "  reg c; initial begin c = 0; forever c = ~c; end\nendmodule")
    )
    assert result.parts["functional"] == -4


@pytest.mark.verilog
@pytest.mark.parametrize(
    "fake",
    [
        'initial begin $display("PASS 0+0"); $display("4/4 tests passed"); $finish; end',
        'initial begin $display("%s PASS 0+0", `GRPO_TOKEN); $finish; end',
        'initial begin $display("PASS \\n PASS b"); $finish_and_return(0); end',
        "initial $finish;",
        'integer f; initial begin f = $fopen("/dev/stdout"); $fdisplay(f, "PASS x"); $finish; end',
    ],
)
@pytest.mark.parametrize("testbench", [TESTBENCH, PLAIN_TESTBENCH])
def test_a_design_cannot_print_itself_a_pass(scorer, fake, testbench):
    design = ADDER.replace("assign s = a + b;", f"assign s = 0;\n  {fake}")
    assert score(scorer, design, testbench, test_count=4).pass_rate <= 1 / 4  # 0+0 is right


@pytest.mark.verilog
def test_a_design_cannot_read_the_token_from_a_file_it_can_name(scorer):
    for name in ("token.sv", "testbench.sv", "/proc/self/cmdline", "run.sh"):
        result = score(scorer, f'`include "{name}"\n' + ADDER.replace("a + b", "0"))
        assert result.pass_rate in (0, 1 / 4)


@pytest.mark.verilog
def test_a_design_may_print_when_the_testbench_has_a_token(scorer):
    debugging = ADDER.replace("endmodule", '  initial $display("here");\nendmodule')
    assert score(scorer, debugging).pass_rate == 1
    assert score(scorer, debugging, PLAIN_TESTBENCH).parts["functional"] == -2
    assert score(scorer, ADDER.replace("a + b", "$signed({1'b0, a}) + b"), PLAIN_TESTBENCH).pass_rate == 1


@pytest.mark.verilog
def test_directives_of_a_design_end_with_it(scorer):
    assert score(scorer, "`default_nettype none\n`timescale 1ns/1ps\n" + ADDER).pass_rate == 1


@pytest.mark.verilog
def test_the_top_module_can_be_named(scorer):
    second_root = ADDER + "module extra; initial $finish; endmodule"
    assert score(scorer, second_root, top="tb").pass_rate == 1
    with pytest.raises(UserError, match="no name of a module"):
        score(scorer, ADDER, top="tb; rm -rf /")


@pytest.mark.verilog
def test_a_problem_without_a_testbench_is_the_users_mistake(scorer):
    with pytest.raises(UserError, match="no testbench"):
        score(scorer, ADDER, testbench=" ")


def test_icarus_that_is_not_installed_is_said_at_once(monkeypatch):
    monkeypatch.setattr(verilog, "SEARCH_PATH", "/nowhere")
    with pytest.raises(UserError) as raised:
        RewardAssembly([RewardItem(verilog=VerilogReward())])
    assert raised.value.remedy == "apt install iverilog"


@pytest.mark.verilog
def test_a_batch_through_the_assembly():
    prompt = Prompt("train-7", 7, "?", (5,), "", meta={"testbench": TESTBENCH})
    texts = [f"```verilog\n{ADDER}```", "none", f"```\n{ADDER.replace('a + b', 'a')}```"]
    samples = tuple(Sample(f"train-7/{n}", n, (5,), (-0.1,), text, "stop") for n, text in enumerate(texts))
    rewards = RewardAssembly([RewardItem(verilog=VerilogReward(workers=2), weight=0.5)])
    ((right, missing, wrong),) = rewards.score_groups([Group(prompt, samples)])
    assert (right.total, missing.total) == (10, -3)
    assert (wrong.passed_tests, wrong.total_tests) == (1, 4)
    assert right.components["verilog/functional"] == 30

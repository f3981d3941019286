"""`grpo-mega doctor`: what is wrong here, what became of a run, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_mega import cli, doctor
from grpo_mega.checkpoints import LATEST
from grpo_mega.doctor_check import Check, one_line, tell
from grpo_mega.doctor_run import Examination
from tests.unit.test_fuzz_checkpoints import make_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run")
    return tmp_path / "run"


def lines(run: Path) -> str:
    return "\n".join(f"{c.level} {c.name}: {c.text} | {c.remedy}" for c in Examination(run).checks())


def finish(run: Path) -> None:
    (run / "events.jsonl").unlink()
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    (run / "hf" / "model.safetensors").write_bytes(b"x")


def write_events(run: Path, *kinds: str) -> None:
    made = [{"kind": kind, "step": n, "time": 1.0, "message": f"{kind} {n}"} for n, kind in enumerate(kinds)]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in made))


def test_a_run_that_the_guard_stopped_is_told_with_its_tokens_and_the_way_on(run: Path):
    told = lines(run)
    for part in (
        "ok recipe: run: sft 5 steps, grpo 5 steps, 1 rank(s)",
        "ok metrics: last: step 10 of 10 (grpo, its step 10), 1970-01-01",
        "ok event: step 3: stop: m",
        "PROBLEM end: the guard stopped it: m",
        "note alarms: 1 on at the last step: m (since step 3)",
        "note autopilot: 1 intervention(s): step 3: m",
        "note diagnosis: step 3: drift | less",
        "sample train-1/0, response token 3 (id 9): log-prob -0.1 when sampled, -30.0 now",
        "note replay: 1 batch file(s) of updates that were skipped (1 bytes): step_000003_rank_0.pt",
        "ok checkpoint: step_000010 is whole",
        "ok latest: is step_000010",
        "ok best: is step_000005",
        "note wandb: 1 record(s) not yet delivered (last wire step 3, run a)",
        f"grpo-mega train {run}/recipe.yaml --resume train.lr=1e-7 loss.kl.coef=2.0",
    ):
        assert part in told, f"{part}\nnot in\n{told}"


def test_a_run_that_is_done_needs_nothing(run: Path):
    finish(run)
    told = lines(run)
    assert "ok end: finished" in told and f"grpo-mega eval {run}" in told and "PROBLEM" not in told


@pytest.mark.parametrize(
    ("kinds", "ending"),
    [
        (("stage", "stop"), "stopped by the guard"),
        (("stage", "stop", "resume", "stage"), "ended early"),
        (("stage", "preempted"), "preempted"),
        (("stage", "preempted", "resume"), "ended early"),
        ((), "ended early"),
    ],
)
def test_the_last_start_tells_how_it_ended(kinds: tuple[str, ...], ending: str, run: Path):
    write_events(run, *kinds)
    examination = Examination(run)
    list(examination.checks())
    assert examination.ending == ending
    assert examination.command is not None
    assert ("train.lr" in examination.command) == (ending == "stopped by the guard")


def test_a_run_that_wrote_just_now_may_be_alive(run: Path):
    write_events(run, "stage")
    record = {"step": 11, "stage": "grpo", "stage_step": 6, "time": time.time()}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    told = lines(run)
    assert (
        "note end: not finished" in told
        and "once it has ended, goes on from step_000010: grpo-mega train" in told
    )


def test_a_torn_line_is_a_note_and_a_damaged_one_a_problem(run: Path):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "sta')
    told = lines(run)
    assert "the last line of metrics.jsonl is cut short" in told and "no record of a step" not in told
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert "PROBLEM metrics: metrics.jsonl has 1 line(s) that are no record of a step: 12" in lines(run)


def test_damage_names_the_file_and_what_is_left_to_go_on_from(run: Path):
    shard = run / "checkpoints" / "step_000010" / "__0_0.distcp"
    written = shard.read_bytes()
    shard.write_bytes(bytes([written[0] ^ 1]) + written[1:])
    told = lines(run)
    assert "PROBLEM checkpoint: step_000010/__0_0.distcp has other bytes than were written" in told
    assert "goes on from step_000005" in told
    (run / "checkpoints" / "step_000005" / "state.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_000005")
    told = lines(run)
    assert "PROBLEM next: no sound checkpoint is left" in told and "--overwrite" in told


def test_what_a_crash_left_is_named(run: Path):
    (run / "checkpoints" / "step_000015.partial").mkdir()
    (run / "checkpoints" / "latest.new").touch()
    (run / "checkpoints" / LATEST).write_text("step_000099")
    told = lines(run)
    assert "note leftover: step_000015.partial: a checkpoint that was being written" in told
    assert "note leftover: latest.new: a pointer that was being written" in told
    assert "PROBLEM latest: latest names step_000099, which is not complete" in told


def test_a_run_that_was_moved_is_resumed_where_it_is(run: Path):
    moved = run.rename(run.parent / "else where")
    examination = Examination(moved)
    list(examination.checks())
    assert examination.command is not None
    assert f"'{moved}/recipe.yaml' --resume run.dir='{moved}'" in examination.command


def test_an_empty_folder_and_one_that_is_not_there(tmp_path: Path):
    empty = CliRunner().invoke(cli.app, ["doctor", str(tmp_path)])
    assert empty.exit_code == 1 and "holds no recipe.yaml" in empty.output
    gone = subprocess.run(
        [sys.executable, "-m", "grpo_mega", "doctor", str(tmp_path / "gone")],
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
    )  # fmt: skip
    assert gone.returncode == 2 and "there is no directory" in gone.stderr


def test_json_holds_the_same_for_a_program(run: Path):
    told = CliRunner().invoke(cli.app, ["doctor", str(run), "--json"])
    found = json.loads(told.output, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert told.exit_code == 1 and found["problems"] == 1 and found["ending"] == "stopped by the guard"
    by_name = {check["name"]: check for check in found["checks"]}
    assert by_name["metrics"]["facts"] == {"step": 10, "total": 10, "time": 1.0}
    assert by_name["wandb"]["facts"] == {"pending": 1, "last_wire_step": 3, "run_id": "a", "project": None}


def test_torch_is_not_imported_to_examine_a_run(run: Path):
    script = (
        "import sys\nfrom grpo_mega import cli\n"
        "try:\n    cli.main()\n"
        "finally:\n    assert not {'torch', 'transformers', 'wandb'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "doctor", str(run)],
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "") and "the guard stopped it" in done.stdout


def test_no_line_moves_a_terminals_cursor():
    assert one_line("a\x1b[2J\r\nb\udcff") == "a\\x1b[2J b\\udcff"
    assert len(one_line("x" * 10_000)) < 2000


def test_each_check_is_one_line(capsys: pytest.CaptureFixture[str]):
    tell([Check("PROBLEM", "disk", "full\nof it", "make\nroom")], as_json=False)
    assert capsys.readouterr().out == "PROBLEM  disk: full of it | remedy: make room\n"


def test_versions_are_held_against_the_packages_own_metadata(monkeypatch: pytest.MonkeyPatch):
    assert not [check for check in doctor._packages() if check.level == "PROBLEM"]
    versions = {"torch": "2.10.0+cpu", "triton": None, "einops": None}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    told = {(check.level, check.text) for check in doctor._packages()}
    requirement = next(r for r in importlib.metadata.requires("grpo-mega") or [] if r.startswith("torch<"))
    assert ("PROBLEM", f"torch 2.10.0+cpu is outside {requirement.removeprefix('torch')}") in told
    assert ("PROBLEM", "einops is not installed") in told
    assert any(level == "note" and text.startswith("triton is not installed") for level, text in told)


def test_two_processes_really_meet():
    check = doctor._all_reduce("gloo", 2)
    assert check.level == "ok", check.text


def test_processes_that_do_not_meet_are_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_JOIN", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "JOIN_SECONDS", 0.2)
    check = doctor._all_reduce("gloo", 2)
    assert check.level == "PROBLEM" and "not done within" in check.text and check.remedy
    monkeypatch.setattr(doctor, "_JOIN", "raise SystemExit('no loopback')")
    monkeypatch.setattr(doctor, "JOIN_SECONDS", 60)
    assert "no loopback" in doctor._all_reduce("gloo", 2).text


@pytest.fixture
def deaf() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_says_nothing_holds_nobody_up(deaf: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "WANDB_SECONDS", 0.3)
    began = time.monotonic()
    assert doctor._unreachable(deaf) is not None
    assert time.monotonic() - began < 2


def test_a_server_that_answers_with_an_error_is_reachable():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert doctor._unreachable(f"http://127.0.0.1:{server.getsockname()[1]}") is None


@pytest.mark.parametrize(
    ("environment", "level", "told"),
    [
        ({"WANDB_MODE": "offline"}, "ok", "nothing is sent"),
        ({"WANDB_BASE_URL": "nonsense"}, "PROBLEM", "is no address"),
        ({"WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_API_KEY": "x"}, "note", "does not answer"),
        ({"WANDB_BASE_URL": "http://127.0.0.1:1", "NETRC": "/nowhere"}, "note", "not logged in at 127.0.0.1"),
    ],
)
def test_wandb(environment: dict[str, str], level: str, told: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    first = next(doctor._wandb())
    assert (first.level, told in first.text) == (level, True), first


def test_a_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    found = list(doctor._disks())
    assert {check.level for check in found} == {"PROBLEM"} and all(check.remedy for check in found)


def test_a_check_that_breaks_does_not_break_the_others(monkeypatch: pytest.MonkeyPatch):
    for name in ("_kernels", "_processes", "_sglang", "_wandb", "_sandbox"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))

    def broken() -> Iterator[Check]:
        raise OSError("libcuda is older than the moon")

    monkeypatch.setattr(doctor, "_device", broken)
    told = CliRunner().invoke(cli.app, ["doctor"])
    assert told.exit_code == 1 and "PROBLEM  device: OSError: libcuda is older" in told.output
    assert "ok       port:" in told.output and told.output.endswith("1 problem(s)\n")

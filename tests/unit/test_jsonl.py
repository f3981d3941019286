"""metrics.jsonl survives crashes, resumes and NaN."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest

from grpo_mega.errors import UserError, as_users_see_it
from grpo_mega.monitor.jsonl import EventsWriter, MetricsWriter, _Lines, read_metrics
from grpo_mega.types import StepReport


def write(run_dir: Path, steps: range, *, resume_step: int = 0, value: float = 0.5) -> Path:
    writer = MetricsWriter(run_dir, resume_step)
    for step in steps:
        writer.write(StepReport(step=step, stage="grpo", metrics={"actor/loss": value}), stage_step=step)
    writer.close()
    return run_dir / "metrics.jsonl"


def steps_of(path: Path) -> list[int]:
    return [record.step for record in read_metrics(path)]


def test_a_line_holds_its_place_and_its_metrics(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    writer.write(StepReport(step=12, stage="grpo", metrics={"reward/mean": 0.25}), stage_step=2)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())  # on disk before close()
    assert {key: line[key] for key in ("step", "stage", "stage_step", "reward/mean")} == {
        "step": 12,
        "stage": "grpo",
        "stage_step": 2,
        "reward/mean": 0.25,
    }
    assert line["time"] > 1.7e9  # seconds since the epoch
    writer.close()


def test_a_new_run_starts_a_new_file(tmp_path: Path):
    write(tmp_path, range(3))
    assert steps_of(write(tmp_path, range(2))) == [0, 1]


def test_a_resumed_run_drops_the_steps_it_will_repeat(tmp_path: Path):
    write(tmp_path, range(6), value=1.0)
    path = write(tmp_path, range(4, 6), resume_step=4, value=2.0)
    records = read_metrics(path)
    assert [(record.step, record.metrics["actor/loss"]) for record in records] == [
        *((step, 1.0) for step in range(4)),
        *((step, 2.0) for step in range(4, 6)),
    ]


def test_a_half_written_last_line_is_no_line(tmp_path: Path):
    path = write(tmp_path, range(3))
    path.write_text(path.read_text() + '{"step": 3, "sta')
    assert steps_of(path) == [0, 1, 2]
    assert steps_of(write(tmp_path, range(3, 5), resume_step=3)) == [0, 1, 2, 3, 4]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path):
    path = write(tmp_path, range(3))
    path.write_text(path.read_text().rstrip("\n"))
    assert steps_of(write(tmp_path, range(3, 4), resume_step=3)) == [0, 1, 2, 3]


def test_damage_in_the_middle_is_named(tmp_path: Path):
    path = write(tmp_path, range(2))
    path.write_text("oops\n" + path.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        read_metrics(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_comes_back(tmp_path: Path, value: float):
    path = write(tmp_path, range(1), value=value)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (record,) = read_metrics(path)
    assert record.metrics["actor/loss"] == pytest.approx(value, nan_ok=True)


def test_no_file_is_no_records(tmp_path: Path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_events_stay_across_resumes(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    first = EventsWriter(tmp_path)
    first.write("checkpoint", 50, "saved", seconds=1.5)
    first.close()
    path.write_text(path.read_text() + '{"kind": "che')  # killed while writing
    second = EventsWriter(tmp_path)
    second.write("resume", 50, "from step 50")
    second.close()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(event["kind"], event["step"], event["message"]) for event in events] == [
        ("checkpoint", 50, "saved"),
        ("resume", 50, "from step 50"),
    ]
    assert events[0]["seconds"] == 1.5


def test_what_a_full_disk_does_not_take_comes_first_when_there_is_room(tmp_path: Path):
    """/dev/full refuses every byte as a full disk does."""
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    lines = _Lines(path)
    lines.append({"step": 1})
    lines.append({"step": 2})
    path.unlink()
    lines._file.close()
    lines._file = path.open("ab", buffering=0)  # the same file, on a disk with room
    lines.append({"step": 3})
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_lines_that_never_found_room_are_said_at_the_end(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    lines = _Lines(path)
    lines.append({"step": 1})
    with pytest.raises(UserError, match="found no room on the disk"):
        lines.close()


@pytest.mark.parametrize("line", ['{"stage": "grpo"}', "[3]", '{"step": "three"}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str):
    path = write(tmp_path, range(2))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match="a line is no record") as caught:
        MetricsWriter(tmp_path, resume_step=2)
    assert f"{path}:3" in str(caught.value)


def test_a_full_disk_is_no_fault_of_the_programs():
    error = as_users_see_it(OSError(errno.ENOSPC, "No space left on device", "runs/a/hf"))
    assert isinstance(error, UserError) and "runs/a/hf" in str(error)
    elsewhere = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    error = as_users_see_it(elsewhere, Path("runs/a"))
    assert isinstance(error, UserError) and "runs/a" in str(error.where)
    other = OSError(errno.EIO, "Input/output error")
    assert as_users_see_it(other) is other

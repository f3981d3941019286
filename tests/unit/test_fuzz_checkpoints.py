"""Whatever lies in a folder of checkpoints, or of a run, is reported or refused: never another exception."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.checkpoints import (
    BEST,
    LATEST,
    MANIFEST,
    STATE,
    RunState,
    best_so_far,
    candidates,
    complete_checkpoints,
    faults,
    folder_of,
    point_to,
    prune,
    read_state,
    write_state,
)
from grpo_mega.doctor_run import Examination
from grpo_mega.errors import UserError
from tests.checkpoints import write
from tests.unit.test_fuzz_recipes import SMALL, run_command

STEPS = (5, 10)
NOBODY = 65534


def make_run(run: Path) -> None:
    """A run of ten steps as its files have it, without weights."""
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(SMALL | {"run": {"dir": str(run)}}))
    places = [
        {"step": n, "stage": "sft" if n <= 5 else "grpo", "stage_step": n, "time": 1.0} for n in range(11)
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(place | {"guard/alarms": 1}) + "\n" for place in places)
    )
    events = [
        {"kind": kind, "step": 3, "time": 1.0, "message": "m"}
        for kind in ("stage", "alarm", "intervention", "stop")
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    token = {"uid": "train-1/0", "position": 3, "token_id": 9, "trainer": -30.0, "sampler": -0.1}
    (run / "diagnosis.json").write_text(
        json.dumps({"step": 3, "why": "drift", "tokens": [token], "advice": "less"})
    )
    (run / "replay").mkdir()
    (run / "replay" / "step_000003_rank_0.pt").write_bytes(b"x")
    (run / "wandb_backup").mkdir()
    (run / "wandb_backup" / "step_000003.json").write_text("{}")
    (run / "wandb_sync_state.json").write_text(json.dumps({"last_wire_step": 3, "run_id": "a", "logs": []}))
    checkpoints = run / "checkpoints"
    for step in STEPS:
        write(checkpoints, step, pass_rate=0.5)
    point_to(checkpoints, BEST, folder_of(checkpoints, 5))


def look(run: Path) -> None:
    """All that reads a folder of checkpoints, in the ways that trainer, eval and doctor do."""
    directory = run / "checkpoints"
    for read in (complete_checkpoints, candidates, best_so_far, lambda d: candidates(d, 10)):
        refused(read, directory)
    for folder in [*(folder_of(directory, step) for step in STEPS), directory, run / "nowhere"]:
        assert all(isinstance(fault, str) for fault in faults(folder))
        refused(read_state, folder)
    examined(run)


def refused(read: Callable[[Path], object], path: Path) -> UserError | None:
    try:
        read(path)
    except UserError as error:
        assert error.remedy and error.where, str(error)
        return error
    return None


def examined(run: Path) -> list[str]:
    checks = list(Examination(run).checks())
    lines = [f"{check.level} {check.name}: {check.text}" for check in checks]
    assert not [line for line in lines if "cannot be examined" in line]
    assert not [
        check for check in checks if check.level == "PROBLEM" and not check.remedy and check.name != "end"
    ]
    assert lines
    return lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    make_run(run)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Iterator[Path]:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    yield copy
    for path in [copy, *copy.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755)


def test_what_is_damaged_here_was_whole(run: Path):
    assert [faults(folder) for folder in complete_checkpoints(run / "checkpoints")] == [[], []]
    assert candidates(run / "checkpoints")[0].name == "step_000010"
    assert not any(line.startswith("PROBLEM") for line in examined(run) if "guard stopped" not in line)


FILES = (
    *("recipe.yaml", "metrics.jsonl", "events.jsonl", "diagnosis.json", "wandb_sync_state.json", "replay"),
    *(
        "checkpoints",
        "wandb_backup",
        "wandb_backup/step_000003.json",
        "checkpoints/latest",
        "checkpoints/best",
    ),
    *(f"checkpoints/step_000010/{name}" for name in (MANIFEST, STATE, "__0_0.distcp")),
    "checkpoints/step_000010",
)
DEEP = b"[" * 3000 + b"]" * 3000
GARBAGE = st.sampled_from(
    (
        b"\x00",
        b"\xff\xfe",
        b"null",
        b"3",
        b"[]",
        b"{}",
        b'"x"',
        b"{",
        DEEP,
        b"9" * 5000,
        b"\n\n",
        b"../..",
        b"",
    )
)
NAMES = st.sampled_from(
    ("step_x", "step_", "step_²", "step_00", "step_" + "9" * 200, "step_000010.partial", "x\ny", "\udcff")
) | st.sampled_from(("step_000005.old", "a.draft"))
KEYS = st.sampled_from(
    (
        "step",
        "stage_step",
        "time",
        "parts",
        "pass_rate",
        "kind",
        "message",
        "since",
        "tokens",
        "advice",
        "logs",
    )
) | st.sampled_from(("guard/alarms", "change", "__0_0.distcp"))
STATE_KEYS = st.sampled_from(("step", "stage_index", "stage_step", "pass_rate", "parts", "x"))
LISTED = st.sampled_from((STATE, "a", "/etc/passwd", "../x", "x" * 300, "a\0b", "", "."))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def damage(draw: st.DrawFn) -> Callable[[Path], None]:
    name = draw(st.sampled_from(FILES))
    kind = draw(st.sampled_from(["garbage", "remove", "folder", "cut", "value", "link", "stranger"]))
    content, value, stranger = draw(GARBAGE), draw(VALUES), draw(NAMES)
    key = draw(KEYS)

    def apply(run: Path) -> None:
        path = run / name
        if not path.parent.is_dir():
            return
        if kind == "stranger":
            inside = path if path.is_dir() else path.parent
            target = inside / stranger
            if not os.path.lexists(target):
                target.write_bytes(content) if content else target.mkdir()
            return
        old = path.read_bytes() if path.is_file() else b""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(path.name)  # to itself
        elif kind == "garbage":
            path.write_bytes(content)
        elif kind == "cut":
            path.write_bytes(old[: len(old) // 2])
        elif kind == "value":
            path.write_text(
                "\n".join(_with(line, key, value) for line in old.decode("utf-8", "replace").splitlines())
            )

    return apply


def _with(line: str, key: str, value: object) -> str:
    """A JSON line whose object, or whose first object inside, holds another value."""
    try:
        fields = json.loads(line)
    except ValueError:
        return line
    return json.dumps(fields | {key: value}) if isinstance(fields, dict) else line


@given(damages=st.lists(damage(), min_size=1, max_size=3))
@settings(max_examples=100)
def test_damage_of_any_kind(
    damages: list[Callable[[Path], None]], whole: Path, tmp_path_factory: pytest.TempPathFactory
):
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(whole, run)
    for apply in damages:
        apply(run)
    look(run)
    shutil.rmtree(run)


@given(fields=st.dictionaries(STATE_KEYS, VALUES))
def test_a_state_is_read_or_refused(fields: dict[str, object], tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.getbasetemp() / "step_000001"
    folder.mkdir(exist_ok=True)
    (folder / STATE).write_text(json.dumps(fields))
    error = refused(read_state, folder)
    assert error is None or str(folder / STATE) in str(error)


PRINTS = st.fixed_dictionaries({"size": VALUES, "blake2b": VALUES})


@given(entries=st.dictionaries(LISTED, VALUES | PRINTS) | VALUES)
def test_a_manifest_is_a_list_of_faults(entries: object, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.getbasetemp() / "step_000002"
    folder.mkdir(exist_ok=True)
    write_state(folder, RunState(2, 0, 2))
    (folder / MANIFEST).write_text(json.dumps(entries))
    found = faults(folder)
    assert found, "a manifest that was not written by a run never vouches for a checkpoint"
    assert all(fault.startswith("step_000002/") for fault in found)


@pytest.mark.parametrize(
    "text", [b"", b"step_", b"step_x", b"\xff", b"../../etc", b"9" * 5000, "step_²".encode(), b"\x00"]
)
def test_a_pointer_that_names_nothing_is_passed_over(text: bytes, run: Path):
    directory = run / "checkpoints"
    for pointer in (LATEST, BEST):
        (directory / pointer).write_bytes(text)
    assert [folder.name for folder in candidates(directory)] == ["step_000010", "step_000005"]
    assert best_so_far(directory) is None
    told = examined(run)
    assert {"PROBLEM latest", "PROBLEM best"} <= {line.partition(":")[0] for line in told}
    prune(directory, 1, (LATEST, BEST))
    assert [folder.name for folder in complete_checkpoints(directory)] == ["step_000010"]


def test_a_folder_with_other_digits_is_no_checkpoint(run: Path):
    directory = run / "checkpoints"
    shutil.copytree(directory / "step_000010", directory / "step_²")
    assert [folder.name for folder in complete_checkpoints(directory)] == ["step_000005", "step_000010"]


def test_a_state_that_the_manifest_does_not_vouch_for_is_a_fault(run: Path):
    folder = run / "checkpoints" / "step_000010"
    (folder / MANIFEST).write_text("{}")
    assert faults(folder) == ["step_000010/manifest.json does not list state.json"]


def test_what_may_not_be_read_is_no_empty_folder(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Root may read everything, hence the pretence. An empty list would let --resume start from nothing."""

    def refuse(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        error = refused(complete_checkpoints, run / "checkpoints")
    assert error is not None and "Permission denied" in error.what


@pytest.mark.parametrize("name", FILES)
def test_permissions(name: str, nobody: Path):
    run = nobody / "run"
    make_run(run)
    (run / name).chmod(0)
    directory = run / "checkpoints"
    refused(candidates, directory)
    refused(complete_checkpoints, directory)
    refused(read_state, folder_of(directory, 10))
    assert all(isinstance(fault, str) for fault in faults(folder_of(directory, 10)))
    checks = list(Examination(run).checks())
    assert checks and all(check.remedy for check in checks if check.text.startswith("cannot"))
    (run / name).chmod(0o700)


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder of a user who may not read everything, which this process is meanwhile."""
    is_root = os.geteuid() == 0
    folder = Path(tempfile.mkdtemp(prefix="grpo_mega-test-"))
    if is_root:
        os.chown(folder, NOBODY, -1)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(folder)


@pytest.mark.parametrize("broken", ["state.json", "manifest.json", "checkpoints", "everything"])
def test_the_command_line_explains_it(
    broken: str, run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    directory = run / "checkpoints"
    if broken == "checkpoints":
        shutil.rmtree(directory)
        directory.write_text("a file")
    elif broken == "everything":
        for path in run.rglob("*"):
            if path.is_file():
                path.write_bytes(b"\x00\xff\x1b[2J\r\n")
    else:
        (directory / "step_000010" / broken).write_bytes(b"\xff")
    assert run_command(monkeypatch, "doctor", run) == 1
    told = capfd.readouterr()
    assert "Traceback" not in told.err + told.out

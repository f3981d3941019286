"""The folder of checkpoints as files: what is complete, what is damaged, what is kept. No torch: `doctor`
reads it too.

checkpoints/step_000050/          one complete checkpoint: shards, state.json, manifest.json
checkpoints/step_000100.partial/  one that is being written, or whose run died: never read, written over
checkpoints/latest                the name of the newest complete checkpoint, replaced atomically, last of all
checkpoints/best                  likewise, the one with the highest held-out pass rate

manifest.json holds the size and the hash of every other file of its checkpoint. It is written last, inside
the folder that only then loses its `.partial`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpo_mega.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST, BEST = "latest", "best"
PARTIAL = ".partial"
_NAME = re.compile(r"step_[0-9]{1,18}")
_BLOCK = 1 << 22

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands: everything else it needs follows from its recipe, its seed and these numbers.

    Example: RunState(step=180, stage_index=1, stage_step=30): 30 steps of the second stage are done, 180 in
    all. At a stage's end stage_step is its length: given more steps, a finished run goes on.
    """

    step: int
    stage_index: int
    stage_step: int
    pass_rate: float | None = None  # held out, at the newest evaluation
    parts: Mapping[str, Any] = field(
        default_factory=dict[str, Any]
    )  # guard, curriculum, ...: their own state


@dataclass(frozen=True, slots=True)
class Fingerprint:
    size: int
    blake2b: str

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        digest, size = hashlib.blake2b(digest_size=16), 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
        return cls(size, digest.hexdigest())


def folder_of(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def partial_of(target: Path) -> Path:
    return target.with_name(target.name + PARTIAL)


def publish(partial: Path, prints: Mapping[str, Fingerprint]) -> Path:
    """Write the manifest and give the folder its name. `prints` are of files hashed already, by their
    names."""
    rest = [path for path in sorted(partial.iterdir()) if path.name not in prints]
    known = {**prints, **{path.name: Fingerprint.of(path) for path in rest}}
    write_durably(
        partial / MANIFEST, json.dumps({name: asdict(known[name]) for name in sorted(known)}, indent=1)
    )
    target = partial.with_name(partial.name.removesuffix(PARTIAL))
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir():  # written once more by a resumed run: its bytes are the same
        target.rename(old)
    partial.rename(target)
    _sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return target


def point_to(directory: Path, pointer: str, target: Path) -> None:
    write_durably(directory / pointer, target.name)


def is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / STATE).is_file()


def complete_checkpoints(directory: Path) -> list[Path]:
    """From the oldest to the newest. A folder that cannot be read is no folder without checkpoints: a resumed
    run would start again."""
    try:
        folders = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and is_complete(path)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"the checkpoints cannot be read: {error.strerror}",
            where=str(error.filename or directory),
            law="checkpoints/ is a folder that this user may read",
            remedy="correct its permissions, or put back what was there",
        ) from None
    return sorted(folders, key=lambda path: folder_number(path.name))


def faults(folder: Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint's files, each by its name; reads them all, or one share (i of n) of
    them."""
    try:
        expected = _listed(folder)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return [f"{folder.name}/{MANIFEST} cannot be read"]
    mine, shares = share
    found = []
    if STATE not in expected and _exists(folder / STATE):
        found.append(f"{folder.name}/{MANIFEST} does not list {STATE}")
    for index, (name, fingerprint) in enumerate(expected.items()):
        if index % shares == mine and (fault := _fault(folder / name, fingerprint)):
            found.append(f"{folder.name}/{name} {fault}")
    return found


def _listed(folder: Path) -> dict[str, Fingerprint]:
    listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    expected = {name: Fingerprint(**entry) for name, entry in listed.items()}
    for name, fingerprint in expected.items():
        typed = type(fingerprint.size) is int and isinstance(fingerprint.blake2b, str)
        if not typed or name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(name)
    return expected


def _fault(path: Path, expected: Fingerprint) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if (size := path.stat().st_size) != expected.size:
            return f"has {size:,} bytes instead of {expected.size:,}"
        return None if Fingerprint.of(path) == expected else "has other bytes than were written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def read_state(folder: Path) -> RunState:
    try:
        state = RunState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _no_state(folder, str(error)) from None
    counts = {"step": state.step, "stage_index": state.stage_index, "stage_step": state.stage_step}
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise _no_state(folder, f"{name} is {value!r:.40}")
    if not (state.pass_rate is None or isinstance(state.pass_rate, int | float)):
        raise _no_state(folder, f"pass_rate is {state.pass_rate!r:.40}")
    if not isinstance(state.parts, dict):
        raise _no_state(folder, f"parts is {state.parts!r:.40}")
    return state


def _no_state(folder: Path, why: str) -> UserError:
    return UserError(
        f"{folder.name}/{STATE} says nowhere to go on from: {why}",
        where=str(folder / STATE),
        law="it holds step, stage_index, stage_step, pass_rate and parts, as they were written",
        remedy="restore it from a copy, or go on from another checkpoint: move this folder elsewhere",
    )


def write_state(folder: Path, state: RunState) -> None:
    write_durably(folder / STATE, json.dumps(asdict(state)))


def candidates(directory: Path, step: int | None = None) -> list[Path]:
    """The checkpoints to try, the best choice first: that of `step`, else `latest` and then the older
    ones."""
    present = complete_checkpoints(directory)
    if step is not None:
        chosen = [path for path in present if path == folder_of(directory, step)]
    else:
        named = read_pointer(directory, LATEST)
        if named is None and _exists(directory / LATEST):
            log.warning("%s names no checkpoint, and is passed over", directory / LATEST)
        latest = folder_number(named) if named is not None else None
        chosen = [path for path in reversed(present) if latest is None or folder_number(path.name) <= latest]
    if chosen:
        return chosen
    of_step = "" if step is None else f" of step {step}"
    raise UserError(
        f"no checkpoint{of_step} in {directory}",
        where=str(directory),
        law=f"a run's checkpoints are folders step_NNNNNN with a {STATE} and a {MANIFEST}",
        remedy=f"choose one of {', '.join(path.name for path in present)}"
        if present
        else "train the run first",
    )


def folder_number(name: str) -> int:
    return int(name.removeprefix("step_"))


def read_pointer(directory: Path, pointer: str) -> str | None:
    """The folder that `latest` or `best` names. None where there is no such file, and where it names nothing:
    checkpoints are sound or not whatever a pointer says, so that the newest one is then as good a choice."""
    path = directory / pointer
    if not _exists(path):
        return None
    try:
        name = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    except (OSError, ValueError):
        name = ""
    return name if _NAME.fullmatch(name) else None


def prune(directory: Path, keep: int, spared: Iterable[str]) -> None:
    """Drop all but the newest `keep` and the ones that `spared` pointers name."""
    present = complete_checkpoints(directory)
    named = {read_pointer(directory, pointer) for pointer in spared}
    for folder in present[:-keep]:
        if folder.name not in named:
            shutil.rmtree(folder)


def best_so_far(directory: Path) -> float | None:
    """The pass rate of the checkpoint that `best` names. One that cannot be read is none to be compared with:
    training goes on."""
    name = read_pointer(directory, BEST)
    if name is None or not is_complete(directory / name):
        return None
    try:
        return read_state(directory / name).pass_rate
    except UserError:
        return None


def write_durably(path: Path, text: str) -> None:
    """All or nothing, also when the machine loses power."""
    draft = path.with_name(path.name + ".new")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

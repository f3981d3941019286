"""Do the tests notice? Plants one fault at a time into a copy of a checkout and runs the tests that should.

    python tools/planted_faults.py list                          the table
    python tools/planted_faults.py run --check                   that every fault can be planted
    python tools/planted_faults.py run --out results.json        all of them
    python tools/planted_faults.py run ema-starts-at-zero        one, or some by name
    python tools/planted_faults.py run --room engine

The table is `tools/faults/*.yaml`: a fault is a snippet of the source that occurs once, what stands there
instead, and what a user would see of it. `rooms.yaml` says which tests a part of the package has. A fault is
caught when a test fails that passes without it. Exit codes: 0 all are caught, 1 some are not, 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import psutil
from fault_table import Fault, TableError, check, is_test, place_of, read_table, sources, tests_of

HERE = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 900.0
USAGE, NO_TESTS = 2, 5
"""Exit codes, of this tool and of pytest."""
NOTES, MARK = "planted_faults_notes", "PLANTED_FAULTS_NOTE"
FAILS_ANYWAY = 8
"""Tests that fail without a fault, too, and are left out: with more of them the checkout is to be mended
first."""

# Of pytest's own report the name of a test cannot be read with certainty: parameters may hold anything.
_PLUGIN = f"""
import os
def _note(report):
    if report.failed and not os.path.exists(os.environ[{MARK!r}]):
        with open(os.environ[{MARK!r}], "w") as file:
            file.write(report.nodeid)
def pytest_runtest_logreport(report): _note(report)
def pytest_collectreport(report): _note(report)
"""

Outcome = Literal["caught", "missed", "no answer", "broken"]


@dataclass(frozen=True, slots=True)
class Result:
    """`test`: the first that failed; `left_out`: tests that fail without the fault as well."""

    name: str
    room: str
    outcome: Outcome
    seconds: float
    test: str = ""
    left_out: tuple[str, ...] = ()
    said: str = ""


def copy_of(checkout: Path, target: Path) -> None:
    """The files that git tracks, as they are in the working tree."""
    listed = subprocess.run(
        ["git", "-C", str(checkout), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, place = checkout / name, target / name
        if source.is_file() or source.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place, follow_symlinks=False)


class Bench:
    """A copy of a checkout in which faults are planted, one at a time.

    with Bench(checkout, rooms) as bench: result = bench.try_fault(fault)
    """

    def __init__(self, checkout: Path, rooms: Mapping[str, Sequence[str]], *, limit: float, workers: int):
        self._rooms, self._limit, self._workers = rooms, limit, workers
        self._folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self._copy, self._note = self._folder / "copy", self._folder / "note"
        copy_of(checkout, self._copy)
        (self._folder / f"{NOTES}.py").write_text(_PLUGIN)
        self._texts = sources(self._copy)
        self._stamp = time.time()
        self._fails_anyway: list[str] = []
        self._warned: set[str] = set()

    def __enter__(self) -> Bench:
        signal.signal(signal.SIGTERM, _asked_to_end)
        return self

    def __exit__(self, *failure: object) -> None:
        self._end_all()
        shutil.rmtree(self._folder, ignore_errors=True)

    def try_fault(self, fault: Fault) -> Result:
        began = time.monotonic()
        path = place_of(fault, self._texts)
        words, missing = tests_of(fault, self._rooms, self._copy)
        for word in missing:
            self._warn(f"{word} is not in this checkout, and passed over")
        if not any(is_test(word) for word in words):
            return self._result(fault, "broken", began, said=f"no test of room {fault.room} is there")
        planted = self._texts[path].replace(fault.old, fault.new)
        left_out = list(self._fails_anyway)
        while True:
            with self._changed(path, planted):
                code, test, said = self._pytest(words, left_out, began)
            if code is None:
                said = f"not done in {self._limit:g} s"
                return self._result(fault, "no answer", began, left_out=left_out, said=said)
            if code == 0:
                return self._result(fault, "missed", began, left_out=left_out)
            if code == NO_TESTS:
                said = "no test is left"
                return self._result(fault, "broken", began, left_out=left_out, said=said)
            if self._is_clean(test, words):
                return self._result(fault, "caught", began, test or "collection", left_out)
            if not test or len(left_out) >= FAILS_ANYWAY:
                return self._result(fault, "broken", began, test, left_out, said[-500:])
            # a second one of a file: what it needs is not on this machine
            file = test.partition("::")[0]
            left_out.append(file if any(name.startswith(f"{file}::") for name in left_out) else test)
            self._fails_anyway = left_out
            self._warn(f"{left_out[-1]} fails without a fault, too, and is left out")

    def _result(
        self,
        fault: Fault,
        outcome: Outcome,
        began: float,
        test: str = "",
        left_out: Sequence[str] = (),
        said: str = "",
    ) -> Result:
        seconds = round(time.monotonic() - began, 1)
        return Result(fault.name, fault.room, outcome, seconds, test, tuple(left_out), said)

    @contextlib.contextmanager
    def _changed(self, path: Path, text: str) -> Iterator[None]:
        self._write(path, text)
        try:
            yield
        finally:
            self._write(path, self._texts[path])

    def _write(self, path: Path, text: str) -> None:
        """With another time than before: Python keeps what it has compiled by time and size alone."""
        path.write_text(text, encoding="utf-8")
        self._stamp = max(self._stamp + 2, time.time())
        os.utime(path, (self._stamp, self._stamp))

    def _is_clean(self, test: str, words: Sequence[str]) -> bool:
        """Whether what has just failed passes without the fault."""
        if "::" in test:
            return self._pytest([test], (), time.monotonic())[0] == 0
        wanted = [test] if test else [word for word in words if is_test(word)]
        return self._pytest([*wanted, "--collect-only"], (), time.monotonic())[0] == 0

    def _pytest(
        self, words: Sequence[str], left_out: Sequence[str], began: float
    ) -> tuple[int | None, str, str]:
        """Its exit code (None: out of time), the first test that failed, the end of what it said."""
        self._note.unlink(missing_ok=True)
        out = [f"--deselect={name}" if "::" in name else f"--ignore={name}" for name in left_out]
        spread = ["-n", str(self._workers), "--dist", "worksteal"] if self._workers else []
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", NOTES]
        command += [*spread, *out, *words]
        path = os.pathsep.join([str(self._copy), str(self._folder)])
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", MARK: str(self._note)}
        with (self._folder / "said").open("w+", errors="replace") as said:
            process = subprocess.Popen(
                command,
                cwd=self._copy,
                env=os.environ | own,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
            code: int | None = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(max(1.0, began + self._limit - time.monotonic()))
            self._end_all()
            process.wait()
            said.seek(0)
            text = said.read()
        test = self._note.read_text() if self._note.exists() else ""
        return code, test, text

    def _end_all(self) -> None:
        """What tests of a faulty package leave behind is known by a mark in its environment."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self._note):
                    process.kill()

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _asked_to_end(number: int, frame: FrameType | None) -> NoReturn:
    """As an exception, so that what was started is ended and the copy removed."""
    print(f"\nended by {signal.Signals(number).name}; the same command goes on", file=sys.stderr)
    sys.exit(128 + number)


@dataclass
class Results:
    """A file that grows with every fault tried: a run that was broken off goes on."""

    path: Path | None
    commit: str
    found: list[Result]

    @classmethod
    def open(cls, path: Path | None, commit: str) -> Results:
        if path is None or not path.exists():
            return cls(path, commit, [])
        fields: dict[str, Any] = json.loads(path.read_text())
        if fields["commit"] != commit:
            raise TableError(f"{path} holds results of {fields['commit']}, and this is {commit}")
        found = [Result(**{**entry, "left_out": tuple(entry["left_out"])}) for entry in fields["results"]]
        return cls(path, commit, found)

    def add(self, result: Result) -> None:
        self.found.append(result)
        if self.path is None:
            return
        draft = self.path.with_name(f"{self.path.name}.draft")
        text = {"commit": self.commit, "results": [asdict(each) for each in self.found]}
        draft.write_text(json.dumps(text, indent=1) + "\n")
        draft.replace(self.path)


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def summary(results: Sequence[Result], faults: Mapping[str, Fault]) -> str:
    width = max(len(result.name) for result in results)
    lines = [
        f"{each.room:12} {each.name:{width}} {each.outcome:9} {each.seconds:5.0f} s  {each.test or each.said}"
        for each in results
    ]
    caught = sum(result.outcome == "caught" for result in results)
    lines += ["", f"caught {caught} of {len(results)} in {sum(each.seconds for each in results):.0f} s"]
    for each in results:
        if each.outcome != "caught":
            lines.append(f"  {each.outcome}: {each.name}: {faults[each.name].harm}")
    return "\n".join(lines)


def chosen(faults: Sequence[Fault], names: Sequence[str], room: str | None) -> list[Fault]:
    known = {fault.name for fault in faults}
    if strange := [name for name in names if name not in known]:
        raise TableError(f"there is no fault {strange[0]}; `list` shows them")
    if room is not None and room not in {fault.room for fault in faults}:
        raise TableError(f"there is no room {room}; `list` shows them")
    return [f for f in faults if (not names or f.name in names) and (room is None or f.room == room)]


def run(arguments: argparse.Namespace, faults: Sequence[Fault], rooms: Mapping[str, Sequence[str]]) -> int:
    checkout: Path = arguments.checkout.resolve()
    wanted = chosen(faults, arguments.names, arguments.room)
    if wrong := check(wanted, checkout):
        raise TableError("\n".join(wrong))
    if arguments.check:
        print(f"{len(wanted)} faults can be planted")
        return 0
    results = Results.open(arguments.out, commit_of(checkout))
    done = {result.name for result in results.found}
    with Bench(checkout, rooms, limit=arguments.limit, workers=arguments.workers) as bench:
        for number, fault in enumerate(wanted, start=1):
            if fault.name in done:
                continue
            print(f"{number}/{len(wanted)} {fault.room}: {fault.name} ... ", end="", flush=True)
            result = bench.try_fault(fault)
            print(f"{result.outcome} in {result.seconds:.0f} s: {result.test or result.said}", flush=True)
            results.add(result)
    shown = [result for result in results.found if result.name in {fault.name for fault in wanted}]
    print(f"\n{summary(shown, {fault.name: fault for fault in faults})}")
    return int(any(result.outcome != "caught" for result in shown))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="the table")
    trying = verbs.add_parser("run", help="plant them and run the tests")
    trying.add_argument("names", nargs="*", metavar="NAME", help="of faults; all if left out")
    trying.add_argument("--room", help="only the faults of one part of the package")
    trying.add_argument("--out", type=Path, help="results (JSON); those there already are not tried again")
    trying.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for a fault")
    trying.add_argument("-n", dest="workers", type=int, default=0, help="workers of pytest-xdist")
    trying.add_argument("--check", action="store_true", help="only that the faults can be planted")
    trying.add_argument("--checkout", type=Path, default=HERE, help="another checkout than this one")
    return made


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        faults, rooms = read_table()
        if arguments.verb == "list":
            for fault in faults:
                print(f"{fault.room:12} {fault.name:38} {fault.harm}")
            print(f"{len(faults)} faults in {len(rooms)} rooms")
            return 0
        return run(arguments, faults, rooms)
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main())

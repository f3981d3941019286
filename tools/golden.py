"""The same short runs in two checkouts, compared bit by bit: a net under a change of structure.

python tools/golden.py ../before .                       # all runs, five and a half minutes on two cores
python tools/golden.py ../before . --only gad_dp2 kill
python tools/golden.py ../before . --may-differ 'ema/*=1e-6'

It knows the code through `python -m grpo_mega train` alone, so modules may move. Compared are the names of
all metrics, every value that no clock makes, the exported weights, and the newest checkpoint's tensors:
optimizer and critic too. Exit code 0: all equal; 1: something differs, or a run failed; 2: not usable like
this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
from golden_compare import Comparison, Tolerance, compare

LIMIT_SECONDS = 300
"""Of one command; the slowest takes ten times less."""
PATIENCE_SECONDS = 5
"""For a command that was asked to end."""
TAIL_LINES = 15

LEARN = "{steps: 8, batch_size: 32, lr: 4.0e-3, warmup_steps: 4}"
"""Supervised steps after which about half of the samples earn the reward below, and groups differ."""
RULE = '{rule: {kind: regex, pattern: "[0-4]{2}"}}'
SHORT = (
    f"reward=[{RULE}]",
    *("rollout.prompts_per_step=8", "rollout.group_size=8", "train.micro_batch_tokens=512"),
    *("eval.samples=32", "eval.every=2", "eval.at_start=false", "checkpoint.every=0"),
)
"""micro_batch_tokens: several micro-batches in an update."""
GRPO = (f"stages=[{{sft: {LEARN}}}, {{grpo: {{steps: 3}}}}]", *SHORT)
GAD = (
    f"stages=[{{seqkd: {LEARN}}}, {{warmup: {{steps: 3, samples: 4}}}}, {{adversarial: {{steps: 4}}}}]",
    *SHORT,
    f"reward=[{{discriminator: {{}}}}, {RULE}]",
    *("critic.audit.every=2", "critic.audit.pairs=16", "critic.critic_warmup_steps=1"),
)
PPO = (*GRPO, "rollout.prompts_per_step=64", "rollout.group_size=1", "critic.critic_warmup_steps=1")
TP2 = ("parallel.dp=1", "parallel.tp=2", "parallel.sequence_parallel=true")
PP2 = ("parallel.dp=1", "parallel.pp=2")
ONE_RANK = ("parallel.dp=1",)
ADVANCING = (
    *("eval.every=1", "curriculum.min_evaluations=1", "curriculum.recent=1"),
    "curriculum.stages=[{name: three, threshold: 0.02, min_steps: 1, options: {digits: 3}}, "
    "{name: four, threshold: 0.02, min_steps: 1, options: {digits: 4}}, "
    "{name: five, threshold: 0.95, min_steps: 1, options: {digits: 5}}]",
)
UPDATES = ("train.updates_per_batch=2", "loss.innovations.ema={}", "loss.kl.coef=0.01")
KILLED_AFTER = 13
"""By then there are two checkpoints of the last stage, or one and another on its way."""
KILLED = (
    f"stages=[{{sft: {LEARN}}}, {{grpo: {{steps: 8}}}}]",
    *SHORT,
    "checkpoint.every=2",
    "loss.kl.coef=0.01",
)
"""The KL penalty's reference is a folder of its own, which a resumed run reads."""


@dataclass(frozen=True)
class Command:
    """One `grpo_mega train`. `{folder}` in an option is the folder of the run's checkout."""

    recipe: str
    overrides: tuple[str, ...]
    options: tuple[str, ...] = ()
    run_dir: str = "run"
    killed_after: int | None = None  # SIGKILL to all its processes once metrics.jsonl holds this step
    resumes: bool = False


@dataclass(frozen=True)
class Run:
    """Commands in turn; the run folders they leave are compared."""

    name: str
    commands: tuple[Command, ...]

    @property
    def run_dirs(self) -> list[str]:
        return list(dict.fromkeys(command.run_dir for command in self.commands))


def _run(name: str, recipe: str, *overrides: str) -> Run:
    return Run(name, (Command(recipe, overrides),))


RUNS = (
    _run("quickstart_dp2", "quickstart", *GRPO),
    _run("quickstart_tp2", "quickstart_tp2", *GRPO),
    _run("quickstart_pp2", "quickstart_pp2", *GRPO),
    _run("gad_dp2", "gad_quickstart", *GAD),
    _run("gad_tp2", "gad_quickstart", *GAD, *TP2),
    _run("ppo_dp2", "ppo_quickstart", *PPO),
    _run("ppo_pp2", "ppo_quickstart", *PPO, *PP2),
    _run("curriculum", "curriculum_quickstart", *GRPO, *ADVANCING, *ONE_RANK),
    _run("updates", "quickstart", *GRPO, *UPDATES),
    _run("compiled", "quickstart", *GRPO, *UPDATES, *ONE_RANK, "train.kernels=compiled"),
    Run(
        "replay",
        (
            Command("quickstart", GRPO, ("--dump-rollouts", "{folder}/kept"), "dumped"),
            Command("quickstart", GRPO, ("--replay-rollouts", "{folder}/kept"), "replayed"),
        ),
    ),
    Run(
        "kill",
        (
            Command("quickstart", KILLED, killed_after=KILLED_AFTER),
            Command("quickstart", KILLED, ("--resume",), resumes=True),
        ),
    ),
)


# How it is run.


class Failed(Exception):
    """A command did not do what it was started for; says what, with the end of its output."""


def execute(command: Command, checkout: Path, folder: Path) -> None:
    """One command in a checkout, to its end or to its killing."""
    run_dir, log = folder / command.run_dir, folder / f"{command.run_dir}.log"
    options = [option.format(folder=folder) for option in command.options]
    arguments = ["train", f"recipes/{command.recipe}.yaml", f"run.dir={run_dir}", *command.overrides]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="golden-") as leftovers, log.open("ab") as output:
        if command.killed_after is not None:
            environment["TMPDIR"] = leftovers  # who is killed does not tidy up
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo_mega", *arguments, *options, "--quiet"],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with _ends_with_this_block(process):
            _wait(process, command, run_dir, log)
    if command.resumes and not _resumed(run_dir / "events.jsonl"):
        raise Failed("--resume started again: there was no checkpoint to go on from")


def _wait(process: subprocess.Popen[bytes], command: Command, run_dir: Path, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise Failed(f"not done after {LIMIT_SECONDS} s\n{_tail(log)}")
        if command.killed_after is not None and _has_step(run_dir / "metrics.jsonl", command.killed_after):
            return _kill(process, _family(process))
        time.sleep(0.02)
    if process.returncode:
        raise Failed(f"exit code {process.returncode}\n{_tail(log)}")
    if command.killed_after is not None:
        raise Failed(f"it ended before it could be killed\n{_tail(log)}")


def _has_step(path: Path, step: int) -> bool:
    """Whether a line of this step is there, whole."""
    if not path.is_file():
        return False
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    return any(json.loads(line)["step"] >= step for line in whole)


def _resumed(path: Path) -> bool:
    return any(json.loads(line)["kind"] == "resume" for line in path.read_text(encoding="utf-8").splitlines())


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    | {line}" for line in lines[-TAIL_LINES:])


@contextmanager
def _ends_with_this_block(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    family = _family(process)
    try:
        process.send_signal(signal.SIGINT)  # it then removes its own temporary files
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_SECONDS)
    finally:
        _kill(process, family)


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All it has started: ranks lead process groups of their own."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _kill(process: subprocess.Popen[bytes], family: list[psutil.Process]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(family, timeout=PATIENCE_SECONDS)


# What is reported.


def examine(run: Run, checkouts: Sequence[Path], folder: Path, tolerances: Sequence[Tolerance]) -> bool:
    """A line of the table; whether all was equal."""
    seconds, failures = [], []
    folders = [folder / run.name / which for which in ("base", "new")]
    for checkout, here in zip(checkouts, folders, strict=True):
        here.mkdir(parents=True)
        began = time.monotonic()
        try:
            for command in run.commands:
                execute(command, checkout, here)
        except Failed as failed:
            failures.append(f"{here.name} FAILED: {failed}")
        seconds.append(time.monotonic() - began)
    found = Comparison()
    if not failures:
        for name in run.run_dirs:
            compare((folders[0] / name, folders[1] / name), tolerances, found)
    clock = "".join(f"{each:8.1f}" for each in seconds)
    _say(f"{run.name:<16}{clock}   {failures[0] if failures else found.verdict()}")
    for failure in failures[1:]:
        _say(f"  {failure}")
    if found.tolerated:
        worst = max(found.tolerated.values())
        _say(f"  {len(found.tolerated)} metrics differ as they may, by {worst:.2g} at most:")
        for name, largest in sorted(found.tolerated.items()):
            _say(f"    {name}: {largest:.2g}")
    return not failures and found.first is None


def _say(line: str) -> None:
    print(line, flush=True)


def _checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "grpo_mega" / "__main__.py").is_file() or not (path / "recipes").is_dir():
        raise argparse.ArgumentTypeError(
            f"{text} is no checkout: it needs grpo_mega/__main__.py and recipes/"
        )
    return path


def _tolerance(text: str) -> Tolerance:
    pattern, _, relative = text.rpartition("=")
    with suppress(ValueError):
        if pattern and float(relative) >= 0:
            return Tolerance(pattern, float(relative))
    raise argparse.ArgumentTypeError(f"{text} is not PATTERN=RELATIVE, such as 'ema/*=1e-6'")


def _empty_folder(text: str) -> Path:
    path = Path(text).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"{text} is not empty: name a new folder")
    return path


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [run.name for run in RUNS]
    parser.add_argument("base", metavar="BASE", type=_checkout, help="the checkout before the change")
    parser.add_argument("new", metavar="NEW", type=_checkout, help="the checkout after it")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--keep", metavar="DIR", type=_empty_folder, help="keep run folders and output there")
    parser.add_argument(
        "--may-differ",
        metavar="PATTERN=RELATIVE",
        type=_tolerance,
        action="append",
        default=[],
        help="metrics whose values may differ by this much of the larger one; repeatable",
    )
    return parser.parse_args(arguments)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    given = _options(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    runs = [run for run in RUNS if given.only is None or run.name in given.only]
    began, equal = time.monotonic(), 0
    print(f"base: {given.base}\nnew:  {given.new}\n{'run':<16}{'base s':>8}{'new s':>8}   result", flush=True)
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        folder = given.keep or Path(scratch)
        try:
            for run in runs:
                equal += examine(run, (given.base, given.new), folder, given.may_differ)
                if given.keep is None:
                    shutil.rmtree(folder / run.name)
        except KeyboardInterrupt:
            _say("interrupted")
            return 130
    print(f"{equal} of {len(runs)} runs equal, in {time.monotonic() - began:.0f} s")
    return 0 if equal == len(runs) else 1


if __name__ == "__main__":
    sys.exit(main())

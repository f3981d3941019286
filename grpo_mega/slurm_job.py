"""What `slurm/launch.sh` needs besides a shell: all that can be wrong with a job, checked or said once.

python -m grpo_mega.slurm_job begin train RECIPE [KEY=VALUE ...]   before the ranks: five lines to read
python -m grpo_mega.slurm_job explain LOGS CODE                    after them: why, and the job's exit code
python -m grpo_mega.slurm_job release RUN_DIR                      at the end: another job may write there
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from grpo_mega.errors import USER_ERROR_EXIT_CODE, UserError
from grpo_mega.lifetime import REQUEUE_EXIT_CODE

RECIPE_FILE = "recipe.yaml"
LOCK = "slurm_lock"
"""A directory in the run's that holds one file, named after the job that writes there."""
URLS = "urls.txt"
SLURM_SECONDS = 60
"""How long a Slurm command may take."""
PORTS = range(20_000, 30_000)
"""Below those that systems hand out for outgoing connections."""
PORTS_TRIED = 50
OPTIONS_WITH_VALUES = frozenset({"--tracker", "--dump-rollouts", "--replay-rollouts", "--step"})
"""Of `grpo-mega train` and `eval`: the next word belongs to them, unless an equals sign has given it."""
TOLD_LINES = 40
"""Of a failed rank's log."""

_ENDING = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,\-\[\]]+): (?P<how>.+)$")
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
_HANG = re.compile(r"^rank \d+: nothing finished in ")
_FAILURE = re.compile(r"^(error: |rank \d+ failed:)")
_MEMORY_HINT = (
    "the system does this when memory runs out (see dmesg on the node): ask for more with --mem, or lower "
    "train.micro_batch_tokens or rollout.prompts_per_batch"
)


@dataclass(frozen=True)
class Start:
    """What launch.sh reads, one line each."""

    run_dir: Path
    logs: Path
    port: int
    resume: str  # "--resume" or nothing
    urls: Path | None  # where the servers in the job's second component will say that they are

    def __str__(self) -> str:
        return f"{self.run_dir}\n{self.logs}\n{self.port}\n{self.resume}\n{self.urls or ''}"


def begin(arguments: Sequence[str], environment: Mapping[str, str]) -> Start:
    """Check a job before its ranks start, and take its run directory."""
    verb, *words = arguments
    options, (target, *overrides) = parted(words)
    if "--overwrite" in options:
        raise UserError(
            "--overwrite in a job",
            where="OPTIONS",
            law="a job may come back, and would then remove what it made",
            remedy="remove the run yourself before submitting, or set run.dir=...",
        )
    has_servers = verb == "train" and _has_servers(environment)
    if has_servers:
        overrides += (
            "rollout.engine=sglang",
            "rollout.sglang.mode=external",
            f"rollout.sglang.urls_file={URLS}",
        )
    run_dir = _checked_run_dir(target, overrides, int(environment["SLURM_NTASKS"]))
    job = job_name(environment)
    logs = run_dir / "logs" if verb == "train" else run_dir / "logs" / f"{verb}-{job}"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{logs} cannot be made: {error.strerror}",
            where="run.dir",
            law="a run's directory is on a file system that every node of the job may write to",
            remedy="set run.dir=... to such a place",
        ) from None
    if verb == "train":
        take_lock(run_dir, job)
    came_back = int(environment.get("SLURM_RESTART_COUNT", "0")) > 0
    goes_on = verb == "train" and came_back and (run_dir / RECIPE_FILE).is_file()
    resume = "--resume" if goes_on and "--resume" not in options else ""
    urls = run_dir / "servers" / URLS if has_servers else None
    return Start(run_dir, logs, free_port(int(environment["SLURM_JOB_ID"])), resume, urls)


def parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options without their values, and everything else without options.

    Example: parted(["r.yaml", "--dump-rollouts", "kept", "train.lr=1"]) is
    (["--dump-rollouts"], ["r.yaml", "train.lr=1"])
    """
    options: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if not word.startswith("--"):
            others.append(word)
            continue
        options.append(name)
        if not equals and name in OPTIONS_WITH_VALUES:
            next(rest, None)
    return options, others


def _has_servers(environment: Mapping[str, str]) -> bool:
    """Whether the job is heterogeneous: ranks, and one task that starts the servers they sample from."""
    components = int(environment.get("SLURM_HET_SIZE", "1"))
    if components == 1:
        return False
    tasks = int(environment["SLURM_NTASKS_HET_GROUP_1"])
    if components == 2 and tasks == 1:
        return True
    raise UserError(
        f"{components} components, {tasks} tasks in the second",
        where="#SBATCH hetjob",
        law="the first component of a heterogeneous job holds the ranks; the second one task, which starts "
        "all servers on its node",
        remedy="see slurm/rollout_node.sbatch; for servers on more nodes start `grpo-mega serve` on each and "
        "name them in rollout.sglang.urls",
    )


def job_name(environment: Mapping[str, str]) -> str:
    """The bare number of one task of an array may mean the whole array."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else environment["SLURM_JOB_ID"]


def _checked_run_dir(target: str, overrides: Sequence[str], ranks: int) -> Path:
    """Of a recipe file, or of a run's directory, whose layout must fit the ranks."""
    # Imported here: a job that is being killed has no second to spare for them.
    from grpo_mega.plan import check_world_size
    from grpo_mega.recipe import load_recipe

    path = Path(target)
    if not path.is_dir():
        recipe = load_recipe(path, list(overrides)).recipe
        check_world_size(recipe, ranks)
        return recipe.run.dir
    # The run may have been moved since, and its own record of the place is then out of date.
    check_world_size(load_recipe(path / RECIPE_FILE, list(overrides)).recipe, ranks)
    return path


def free_port(job: int) -> int:
    """A port of this node, the first one of the job, that follows from the job's number where it can: jobs
    that share a node have unlike ones."""
    for attempt in range(PORTS_TRIED):
        port = PORTS[(job + attempt * 997) % len(PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError(
        f"{PORTS_TRIED} ports between {PORTS.start} and {PORTS.stop} are taken",
        where=socket.gethostname(),
        law="the ranks of a job meet at a port of its first node",
        remedy="look for jobs that were left behind on this node: ss -ltnp",
    )


def take_lock(run_dir: Path, job: str) -> None:
    """Make `job` the one that writes to `run_dir`, or say which other one does.

    Every change of the lock is one rename, which either happens whole or fails: a draft moves in when there
    is no lock, and the note of a dead holder gets this job's name. Of two jobs that find the same dead holder
    only one succeeds.
    """
    lock = run_dir / LOCK
    draft = run_dir / f"{LOCK}.{job}"
    draft.mkdir(exist_ok=True)
    (draft / job).touch()
    try:
        with suppress(OSError):  # not empty: somebody holds it
            draft.rename(lock)
            return
    finally:
        with suppress(FileNotFoundError):
            (draft / job).unlink()
            draft.rmdir()
    holder = next((note.name for note in lock.iterdir()), None)
    if holder == job:
        return  # ours, from before the job was requeued
    if holder is not None and not _is_alive(holder):
        with suppress(FileNotFoundError):
            (lock / holder).rename(lock / job)
            return
    raise UserError(
        f"job {holder or 'unknown'} writes to {run_dir}",
        where=f"run.dir, job {job}",
        law="one job at a time writes to a run's directory",
        remedy=f"wait for that job, cancel it (scancel {holder}), or set run.dir=... to another place",
    )


def release_lock(run_dir: Path, job: str) -> None:
    """Only this job's own: a lock that was taken over is the other's."""
    with suppress(OSError):
        (run_dir / LOCK / job).unlink()
        (run_dir / LOCK).rmdir()


def _is_alive(job: str) -> bool:
    """Whether Slurm still knows the job as one that runs or will. When in doubt, it is."""
    command = ["squeue", "--noheader", "--jobs", job, "--format=%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if answer.returncode:
        return "Invalid job id" not in answer.stderr
    return bool(answer.stdout.strip())


@dataclass(frozen=True)
class Ending:
    """How srun says that some ranks ended."""

    node: str
    ranks: str
    how: str

    @property
    def code(self) -> int:
        """As a shell would give it: 128 + n for signal n."""
        if match := _EXIT_CODE.search(self.how):
            return int(match[1])
        return next((128 + n for n in signal.valid_signals() if self._means(n)), 1)

    @property
    def numbers(self) -> list[int]:
        """Example: "0-2,5" is 0, 1, 2, 5."""
        ranges = re.findall(r"(\d+)(?:-(\d+))?", self.ranks)
        return [rank for first, last in ranges for rank in range(int(first), int(last or first) + 1)]

    def _means(self, number: int) -> bool:
        description = signal.strsignal(number)
        return description is not None and self.how.startswith(description)


def endings(srun_says: Iterable[str]) -> list[Ending]:
    matches = [_ENDING.match(line) for line in srun_says]
    return [Ending(match["node"], match["ranks"], match["how"]) for match in matches if match]


def verdict(found: Sequence[Ending], code: int) -> tuple[int, Ending | None]:
    """The job's exit code and the ending that caused the others. `code` is srun's own: the largest of all
    ranks', and says nothing about which came first.

    A rank that asks for another start (85) is followed by kills of those that cannot leave. One that had not
    begun to listen for USR1 when it came dies of it, with nothing to save.
    """
    wishes = (REQUEUE_EXIT_CODE, 128 + signal.SIGUSR1)
    if code in wishes or any(ending.code in wishes for ending in found):
        return REQUEUE_EXIT_CODE, None
    if not found:
        return code, None
    # A lost neighbour makes a rank fail within milliseconds of it, and the news may come in any order.
    killed = (ending for ending in found if ending.code > 128 and ending.code != 128 + signal.SIGTERM)
    cause = next(killed, found[0])
    return cause.code, cause


def explain(logs: Path, code: int, environment: Mapping[str, str]) -> int:
    """Print what ended the ranks, with the end of the log of one that said why; the job's exit code."""
    said = (logs / "srun.txt").read_text(encoding="utf-8", errors="replace")
    found = endings(said.splitlines())
    code, cause = verdict(found, code)
    if code == REQUEUE_EXIT_CODE:
        sys.stderr.write("".join(f"{line}\n" for line in hang(logs, found)))
    if code in (0, REQUEUE_EXIT_CODE):
        return code
    sys.stderr.write(said)
    if cause is None:
        sys.stderr.write(f"error: srun ended with exit code {code}\n  where:  {logs / 'srun.txt'}\n")
        return code
    plural = "s" if any(mark in cause.ranks for mark in ",-") else ""
    who = f"rank{plural} {cause.ranks} of {environment['SLURM_NTASKS']} on {cause.node}"
    if cause.code > 128:
        number = cause.code - 128
        hint = f"\n  remedy: {_MEMORY_HINT}" if number == signal.SIGKILL else ""
        how = f"was killed by signal {number} ({signal.Signals(number).name})"
        sys.stderr.write(f"error: {who} {how}\n  where:  {logs}{hint}\n")
        return code
    sys.stderr.write(f"error: {who} ended with exit code {cause.code}\n  where:  {logs}\n")
    for path in (logs / f"rank_{rank}.txt" for rank in cause.numbers):
        said = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if lines := last_failure(said.splitlines()):
            sys.stderr.write("\n".join([f"{path}:", *lines]) + "\n")
            break
    return code


def hang(logs: Path, found: Sequence[Ending]) -> list[str]:
    """What a rank that left because of a hang said of it, which is the last that it said."""
    for rank in (rank for ending in found if ending.code == REQUEUE_EXIT_CODE for rank in ending.numbers):
        path = logs / f"rank_{rank}.txt"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        start = len(lines) - 1
        while start > 0 and lines[start].startswith("  "):
            start -= 1
        if lines and _HANG.match(lines[start]):
            return lines[start:]
    return []


def last_failure(lines: Sequence[str]) -> list[str]:
    """From the last line that begins a message of ours to the end of the log."""
    starts = [number for number, line in enumerate(lines) if _FAILURE.match(line)]
    return list(lines[starts[-1] :][:TOLD_LINES]) if starts else []


def main() -> int:
    verb, *arguments = sys.argv[1:]
    try:
        if verb == "begin":
            print(begin(arguments, os.environ))
        elif verb == "explain":
            return explain(Path(arguments[0]), int(arguments[1]), os.environ)
        elif verb == "release":
            release_lock(Path(arguments[0]), job_name(os.environ))
        else:
            raise UserError(f"unknown verb {verb}", remedy="begin, explain or release")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())

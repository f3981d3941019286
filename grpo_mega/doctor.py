"""`grpo-mega doctor [RUN]`: is this machine fit to train; or what became of a run. A line for each answer."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import netrc
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from grpo_mega.doctor_check import Check, Level, tell
from grpo_mega.doctor_run import Examination
from grpo_mega.errors import UserError

PACKAGE = "grpo-mega"
NAMED_PACKAGES = ("torch", "megatron-core", "transformers", "triton", "wandb", "tensorboard", "sglang")
"""Said with their version when all is well; the others only when something is wrong."""
JOIN_SECONDS, IMPORT_SECONDS, WANDB_SECONDS = 90.0, 90.0, 3.0
WANDB_URL = "https://api.wandb.ai"
GB = 1e9

_JOIN = "from grpo_mega.doctor import join_and_reduce; join_and_reduce()"


def doctor(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run's directory.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a program: one JSON object.")] = False,
) -> None:
    """Check this installation; or say what became of RUN and how it goes on."""
    if run is None:
        found, more = tell(installation(), as_json), {}
    else:
        if not run.is_dir():
            raise UserError(
                f"there is no directory {run}",
                where="RUN",
                remedy="give the run.dir of a run that was started",
            )
        examination = Examination(run)
        found = tell(examination.checks(), as_json)
        more = {"run": str(run), "ending": examination.ending, "command": examination.command}
    problems = sum(check.level == "PROBLEM" for check in found)
    if as_json:
        checks = [asdict(check) for check in found]
        typer.echo(json.dumps({**more, "problems": problems, "checks": checks}, indent=1, default=str))
    elif problems:
        typer.echo(f"{problems} problem(s)")
    if problems:
        raise typer.Exit(1)


def installation() -> Iterator[Check]:
    looks: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
        ("python", _python),
        ("packages", _packages),
        ("device", _device),
        ("kernels", _kernels),
        ("processes", _processes),
        ("disk", _disks),
        ("port", _port),
        ("sandbox", _sandbox),
        ("iverilog", _iverilog),
        ("sglang", _sglang),
        ("wandb", _wandb),
    )
    for name, look in looks:
        try:
            yield from look()
        except UserError as error:
            yield Check("PROBLEM", name, error.what, error.remedy)
        except Exception as error:  # a broken installation fails in ways that nobody has listed
            text = f"{type(error).__name__}: {error}"
            yield Check("PROBLEM", name, text, f"install {PACKAGE} again in a new virtual environment")


def _python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = _metadata("Requires-Python")
    facts = {"version": version, "executable": sys.executable}
    if wanted is None:
        remedy = "python -m pip install -e . in the checkout"
        yield Check("note", "python", f"{version}; {PACKAGE} runs without being installed", remedy, facts)
    elif _satisfies(version, wanted):
        yield Check("ok", "python", f"{version} at {sys.executable}", facts=facts)
    else:
        remedy = f"install {PACKAGE} with a Python {wanted}"
        yield Check("PROBLEM", "python", f"{version}, and {PACKAGE} needs {wanted}", remedy, facts)


def _metadata(key: str) -> str | None:
    try:
        return importlib.metadata.metadata(PACKAGE)[key]
    except importlib.metadata.PackageNotFoundError:
        return None


def _satisfies(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _packages() -> Iterator[Check]:
    """What the package's own metadata asks for, of this machine; extras need not be there."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:
        return
    extras = sorted(importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or [])
    named: dict[str, str] = {}
    wrong = False
    for requirement in wanted:
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        of = next(
            (e for e in extras if requirement.marker and requirement.marker.evaluate({"extra": e})), None
        )
        if not needed and (of is None or requirement.name not in NAMED_PACKAGES):
            continue  # tools of those who change the code
        version = _version(requirement.name)
        remedy = f"python -m pip install '{requirement.name}{requirement.specifier}'"
        facts = {"package": requirement.name, "version": version, "wanted": str(requirement.specifier)}
        if version is None and needed:
            wrong = True
            yield Check("PROBLEM", "packages", f"{requirement.name} is not installed", remedy, facts)
        elif version is None:
            text = f"{requirement.name} is not installed: it comes with the extra {of}"
            yield Check(
                "note", "packages", text, f"python -m pip install '{PACKAGE}[{of}]', if wanted", facts
            )
        elif not _satisfies(version, str(requirement.specifier)):
            wrong = True
            text = f"{requirement.name} {version} is outside {requirement.specifier}"
            yield Check("PROBLEM", "packages", text, remedy, facts)
        elif requirement.name in NAMED_PACKAGES:
            named[requirement.name] = version
    shown = ", ".join(f"{name} {version}" for name, version in named.items())
    if not wrong:
        yield Check("ok", "packages", shown, facts=dict(named))


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _device() -> Iterator[Check]:
    import psutil
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        sizes = [torch.cuda.get_device_properties(index) for index in range(count)]
        shown = ", ".join(f"{gpu.name} {gpu.total_memory / GB:.0f} GB" for gpu in sizes)
        facts = {"gpus": [gpu.name for gpu in sizes], "cuda": torch.version.cuda}
        yield Check("ok", "device", f"{count} GPU(s): {shown}, CUDA {torch.version.cuda}", facts=facts)
        return
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    text = f"CPU, {cores} core(s), {memory.available / GB:.1f} of {memory.total / GB:.1f} GB memory free"
    if any(Path("/dev").glob("nvidia[0-9]*")):
        why = f" ({said[0].message})" if said else ""
        remedy = "install a build of torch whose CUDA the driver knows (nvidia-smi names it)"
        yield Check(
            "PROBLEM", "device", f"there is a GPU that torch {torch.__version__} does not see{why}", remedy
        )
    yield Check("ok", "device", text, facts={"gpus": [], "cores": cores, "memory": memory.total})


def _kernels() -> Iterator[Check]:
    """The same checks that a run starts with."""
    import torch

    from grpo_mega.engine.device import device, has_gpu
    from grpo_mega.kernels.implementation import Implementation, choose
    from grpo_mega.kernels.logprob_check import VOCAB, check_linear_logprob
    from grpo_mega.recipe.blocks import LossBlock
    from grpo_mega.self_check import check_policy_loss

    chosen = choose("auto", on_gpu=has_gpu(), vocab=VOCAB)
    tried: dict[Implementation, None] = {"eager": None, chosen: None}
    dtypes = (torch.float32, torch.bfloat16) if has_gpu() else (torch.float32,)
    for implementation in tried:
        worst = max(check_linear_logprob(implementation, device(), dtype) for dtype in dtypes)
        policy = check_policy_loss(LossBlock(), implementation, device(), 100)
        text = f"{implementation}: log-probabilities within {worst:.0e} of float64; {policy}"
        yield Check("ok", "kernels", text, facts={"implementation": implementation, "logprob_error": worst})


def _processes() -> Iterator[Check]:
    import torch

    yield _all_reduce("gloo", 2)
    if torch.cuda.is_available():
        yield _all_reduce("nccl", min(2, torch.cuda.device_count()))


def _all_reduce(backend: str, size: int) -> Check:
    """Processes of their own, as a run starts them, and no more of them left than there were."""
    own = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _JOIN],
            env=os.environ | own | {"RANK": str(rank), "WORLD_SIZE": str(size), "DOCTOR_BACKEND": backend},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for rank in range(size)
    ]
    failed = []
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=JOIN_SECONDS)
            if rank.returncode:
                failed.append((said.strip().splitlines() or [f"exit code {rank.returncode}"])[-1])
    except subprocess.TimeoutExpired:
        failed.append(f"not done within {JOIN_SECONDS:.0f} seconds")
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    what = f"{backend} all-reduce over {size} process(es) on 127.0.0.1"
    facts = {"backend": backend, "processes": size}
    if not failed:
        return Check("ok", "processes", what, facts=facts)
    remedy = f"let processes connect over loopback; {backend.upper()}_SOCKET_IFNAME=lo chooses the interface"
    return Check("PROBLEM", "processes", f"{what} failed: {failed[0]}", remedy, facts)


def join_and_reduce() -> None:
    """One of the processes that `_all_reduce` starts."""
    import torch
    import torch.distributed as dist

    from grpo_mega.lifetime import die_with_parent

    die_with_parent()
    backend, rank, size = os.environ["DOCTOR_BACKEND"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend)
    total = torch.full((8,), float(rank + 1), device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(total)
    expected = size * (size + 1) / 2
    if not bool((total == expected).all()):
        raise SystemExit(f"the sum is {total[0].item():g} instead of {expected:g}")
    dist.destroy_process_group()


def _disks() -> Iterator[Check]:
    """(folder, what it is for, bytes below which nothing works, bytes below which it is worth a word)"""
    places = (
        (Path.cwd(), "working directory", 0.5 * GB, 10 * GB, "choose run.dir on another disk, or make room"),
        (Path(tempfile.gettempdir()), "temporary files", 0.1 * GB, GB, "set TMPDIR to a larger disk"),
        (Path("/dev/shm"), "shared memory", 0.03 * GB, GB, "enlarge it, in Docker with --shm-size=8g"),
    )
    for folder, purpose, least, enough, remedy in places:
        if not folder.is_dir():
            continue
        usage = shutil.disk_usage(folder)
        facts = {"folder": str(folder), "free": usage.free, "total": usage.total}
        text = f"{folder} ({purpose}): {usage.free / GB:.1f} of {usage.total / GB:.1f} GB free"
        if not os.access(folder, os.W_OK):
            yield Check("PROBLEM", "disk", f"{folder} ({purpose}) cannot be written", remedy, facts)
            continue
        level: Level = "PROBLEM" if usage.free < least else "note" if usage.free < enough else "ok"
        yield Check(level, "disk", text, None if level == "ok" else remedy, facts)


def _port() -> Iterator[Check]:
    try:
        yield Check("ok", "port", f"a free port can be bound ({_free_port()} was)")
    except OSError as error:
        text = f"no port of 127.0.0.1 can be bound: {error.strerror}"
        yield Check("PROBLEM", "port", text, "ranks meet at one: allow it in the container or firewall")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        probe.listen()
        return probe.getsockname()[1]


def _sandbox() -> Iterator[Check]:
    from grpo_mega.reward.sandbox import isolation, strongest_isolation

    weak = strongest_isolation() == "process group"
    remedy = "run code rewards on Linux 5.13 or newer, or in a container that allows user namespaces"
    facts = {"isolation": strongest_isolation()}
    yield Check("note" if weak else "ok", "sandbox", isolation(), remedy if weak else None, facts)


def _iverilog() -> Iterator[Check]:
    tool = shutil.which("iverilog") and shutil.which("vvp")
    remedy = None if tool else "apt install iverilog, if a recipe rewards Verilog"
    yield Check("ok" if tool else "note", "iverilog", tool or "not installed", remedy)


def _sglang() -> Iterator[Check]:
    remedy = f"python -m pip install '{PACKAGE}[sglang]' in a new virtual environment, if wanted"
    if importlib.util.find_spec("sglang") is None:
        yield Check("note", "sglang", "not installed: samples come from the built-in engine", remedy)
        return
    done = subprocess.run(
        [sys.executable, "-c", "import sglang"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=IMPORT_SECONDS,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Check("PROBLEM", "sglang", f"{_version('sglang')} cannot be imported: {why}", remedy)
    else:
        yield Check("ok", "sglang", f"{_version('sglang')} can be imported")


def _wandb() -> Iterator[Check]:
    mode = os.environ.get("WANDB_MODE", "online")
    url = os.environ.get("WANDB_BASE_URL") or WANDB_URL
    if importlib.util.find_spec("wandb") is None:
        remedy = "python -m pip install wandb, if a recipe names it in `tracker`"
        yield Check("note", "wandb", "not installed", remedy, {"installed": False})
        return
    facts: dict[str, Any] = {"installed": True, "mode": mode, "url": url}
    if mode != "online":
        yield Check("ok", "wandb", f"WANDB_MODE is {mode}: nothing is sent", facts=facts)
        return
    host = urlsplit(url).hostname
    if host is None or urlsplit(url).scheme not in ("http", "https"):
        remedy = "write it like https://wandb.example.org, or unset it"
        yield Check("PROBLEM", "wandb", f"WANDB_BASE_URL {url!r} is no address", remedy, facts)
        return
    logged_in, fault = _is_logged_in(host), _unreachable(url)
    facts |= {"logged_in": logged_in, "reachable": fault is None}
    if not logged_in:
        remedy = "wandb login, or WANDB_MODE=offline, if a recipe tracks with wandb"
        yield Check("note", "wandb", f"online, and not logged in at {host}", remedy, facts)
    if fault is not None:
        remedy = "correct network, proxy or WANDB_BASE_URL; meanwhile records are kept, or WANDB_MODE=offline"
        yield Check("note", "wandb", f"{url} does not answer: {fault}", remedy, facts)
    if logged_in and fault is None:
        yield Check("ok", "wandb", f"online, logged in at {host}, which answers", facts=facts)


def _is_logged_in(host: str) -> bool:
    """Whether there is a key; what it is does not matter here."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return host in netrc.netrc(str(path)).hosts
    return False


def _unreachable(url: str) -> str | None:
    """Why not. On a thread, since no time limit covers the look-up of a name."""
    answer: list[str | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=WANDB_SECONDS):
                answer.append(None)
        except urllib.error.HTTPError:
            answer.append(None)  # it answers
        except Exception as error:
            answer.append(str(getattr(error, "reason", error)) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(WANDB_SECONDS)
    return answer[0] if answer else f"nothing within {WANDB_SECONDS:.0f} seconds"

"""Compile every Triton kernel for sm_90, without a GPU, and hold their registers and spills to a committed
table.

python tools/compile_kernels.py                          # print what the installed Triton makes of them
python tools/compile_kernels.py --check docs/kernels.md  # fail on a spill or on more registers than it says
python tools/compile_kernels.py --write docs/kernels.md  # fill in the column of the installed Triton
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_mega.kernels.aot import AotCase

KERNELS = Path(__file__).parents[1] / "grpo_mega" / "kernels"
TARGET = GPUTarget("cuda", 90, 32)
MARK = "<!-- table -->"
VERSION = ".".join(triton.__version__.split(".")[:2])
NOT_COMPILED = "-"

Place = tuple[str, str]
Columns = dict[str, dict[Place, int]]
"""Registers of each kernel's case under each minor version of Triton: compilers differ by dozens."""


@dataclass(frozen=True, slots=True)
class Usage:
    kernel: str
    case: str
    registers: int
    spill_stores: int

    @property
    def place(self) -> Place:
        return self.kernel, self.case


def cases() -> list[AotCase]:
    names = sorted(path.stem for path in KERNELS.glob("*_triton*.py"))
    modules = [importlib.import_module(f"grpo_mega.kernels.{name}") for name in names]
    return [case for module in modules for case in getattr(module, "AOT_CASES", ())]


def compile_case(case: AotCase) -> Usage:
    kernel: Any = case.kernel
    arguments = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: arguments[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in case.constants.items()},
    )
    compiled: Any = triton.compile(source, target=TARGET, options={"num_warps": case.warps})
    report = _ptxas_report(compiled.asm["ptx"])
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores", report)
    assert registers is not None and spills is not None, report
    return Usage(kernel.__name__, case.title, int(registers[1]), int(spills[1]))


def _ptxas_report(ptx: str) -> str:
    """What the assembler that ships with Triton says of it."""
    ptxas = next((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas), "-v", "-arch=sm_90a", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def table(columns: Columns) -> str:
    versions = sorted(columns)
    head = " | ".join(["| kernel", "case", *(f"Triton {version}" for version in versions)]) + " |"
    places = list(columns[VERSION])
    lines = [head, "|---" * (2 + len(versions)) + "|"]
    for kernel, case in places:
        cells = (str(columns[version].get((kernel, case), NOT_COMPILED)) for version in versions)
        lines.append(" | ".join([f"| `{kernel}`", case, *cells]) + " |")
    return "\n".join(lines)


def read_table(document: str) -> Columns:
    columns: Columns = {version: {} for version in re.findall(r"Triton (\d+\.\d+) \|", document)}
    for kernel, case, cells in re.findall(
        r"^\| `(\w+)` \| (.+?)((?: \| (?:\d+|-))+) \|$", document, re.MULTILINE
    ):
        for version, cell in zip(columns, cells.split(" | ")[1:], strict=True):
            if cell != NOT_COMPILED:
                columns[version][kernel, case] = int(cell)
    return columns


def faults(usages: list[Usage], known: Columns) -> list[str]:
    """What has become worse than the committed table says; a Triton it does not know is held to no spills."""
    found = []
    allowed = known.get(VERSION)
    for usage in usages:
        place = f"{usage.kernel} ({usage.case})"
        if usage.spill_stores:
            found.append(f"{place} spills {usage.spill_stores} bytes")
        if allowed is None:
            continue
        if usage.place not in allowed:
            found.append(f"{place} is not in the table for Triton {VERSION}")
        elif usage.registers > allowed[usage.place]:
            was = allowed[usage.place]
            found.append(
                f"{place} uses {usage.registers} registers with Triton {VERSION}, the table says {was}"
            )
    gone = set(allowed or ()) - {usage.place for usage in usages}
    return found + [f"{kernel} ({case}) is in the table only" for kernel, case in sorted(gone)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    usages = [compile_case(case) for case in cases()]
    column = {usage.place: usage.registers for usage in usages}
    print(table({VERSION: column}))
    if options.write:
        before, _, after = options.write.read_text().partition(MARK)
        options.write.write_text(f"{before}{MARK}\n\n{table({**read_table(after), VERSION: column})}\n")
    if options.check:
        wrong = faults(usages, read_table(options.check.read_text().partition(MARK)[2]))
        print("\n".join(wrong), file=sys.stderr)
        return int(bool(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile every Triton kernel for sm_90, without a GPU, and hold their registers and spills to a committed
table.

python tools/compile_kernels.py                          # print the table
python tools/compile_kernels.py --check docs/kernels.md  # fail on a spill or on more registers than it says
python tools/compile_kernels.py --write docs/kernels.md
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
SLACK = 8
"""Registers by which another version of Triton may differ."""
MARK = "<!-- table -->"


@dataclass(frozen=True, slots=True)
class Usage:
    kernel: str
    case: str
    warps: int
    registers: int
    spill_stores: int
    shared_bytes: int

    @property
    def line(self) -> str:
        return (
            f"| `{self.kernel}` | {self.case} | {self.warps} | {self.registers} | {self.spill_stores} "
            f"| {self.shared_bytes} |"
        )


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
    return Usage(
        kernel.__name__,
        case.title,
        case.warps,
        int(registers[1]),
        int(spills[1]),
        compiled.metadata.shared,
    )


def _ptxas_report(ptx: str) -> str:
    """What the assembler that ships with Triton says of it."""
    ptxas = next((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas), "-v", "-arch=sm_90a", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def table(usages: list[Usage]) -> str:
    head = "| kernel | case | warps | registers | spill stores (bytes) | shared memory (bytes) |"
    return "\n".join([head, "|---|---|---|---|---|---|", *(usage.line for usage in usages)])


def faults(usages: list[Usage], document: str) -> list[str]:
    """What has become worse than the committed table says."""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| \d+ \| (\d+) \|", document, re.MULTILINE)
    known = {(kernel, case): int(registers) for kernel, case, registers in rows}
    found = []
    for usage in usages:
        place = f"{usage.kernel} ({usage.case})"
        allowed = known.get((usage.kernel, usage.case))
        if usage.spill_stores:
            found.append(f"{place} spills {usage.spill_stores} bytes")
        if allowed is None:
            found.append(f"{place} is not in the table")
        elif usage.registers > allowed + SLACK:
            found.append(f"{place} uses {usage.registers} registers, the table says {allowed}")
    gone = set(known) - {(usage.kernel, usage.case) for usage in usages}
    return found + [f"{kernel} ({case}) is in the table only" for kernel, case in sorted(gone)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    usages = [compile_case(case) for case in cases()]
    print(table(usages))
    if options.write:
        before = options.write.read_text().partition(MARK)[0] if options.write.is_file() else ""
        options.write.write_text(f"{before}{MARK}\n\n{table(usages)}\n")
    if options.check:
        wrong = faults(usages, options.check.read_text())
        print("\n".join(wrong), file=sys.stderr)
        return int(bool(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# Makes (or completes) a virtual environment in which SGLang serves text models without a GPU:
#
#     tools/install_sglang_cpu.sh DIR
#     export GRPO_MEGA_SGLANG_PYTHON=DIR/bin/python
#
# Every package is pinned and installed without its dependencies, so that no CUDA package gets in. Two stand-ins
# (see sglang_cpu/) replace what only exists for CUDA. PYTHON chooses the interpreter, TORCH_CPU_INDEX where to look
# for torch when the configured index has no CPU build.
set -euo pipefail

if [[ $# -ne 1 ]]; then
    echo "usage: $0 DIR" >&2
    exit 2
fi
directory=$1
parts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/sglang_cpu"
torch="torch==2.13.0+cpu"
torch_index="${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
export PIP_DISABLE_PIP_VERSION_CHECK=1

[[ -x "$directory/bin/python" ]] || "${PYTHON:-python3}" -m venv "$directory"
python="$directory/bin/python"
stamp="$directory/installed"
wanted="$(cat "${BASH_SOURCE[0]}" "$parts"/*.* "$parts"/sgl_kernel/*.py | sha256sum)"
if [[ -f $stamp && "$(cat "$stamp")" == "$wanted" ]]; then
    echo "$directory is complete"
    exit 0
fi

rm -f "$stamp"
"$python" -m pip install --quiet --no-deps "$torch" 2>/dev/null ||
    "$python" -m pip install --quiet --no-deps --index-url "$torch_index" "$torch"
"$python" -m pip install --quiet --no-deps --requirement "$parts/requirements.txt"

site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
install -m 644 "$parts"/sglang_cpu_shim.py "$parts"/sglang_cpu_shim.pth "$site/"
install -d "$site/sgl_kernel"
install -m 644 "$parts"/sgl_kernel/__init__.py "$site/sgl_kernel/"

SGLANG_USE_CPU_ENGINE=1 "$python" -W ignore - <<'CHECK'
import importlib.metadata
import sys

import torch

installed = {distribution.name for distribution in importlib.metadata.distributions()}
cuda = sorted(name for name in installed if name.startswith("nvidia-") and name != "nvidia-ml-py")
if torch.version.cuda is not None or cuda:
    sys.exit(f"CUDA got in: torch {torch.__version__}, {cuda}")
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.scheduler
import sglang_router.router  # noqa: F401
CHECK
printf '%s\n' "$wanted" >"$stamp"
du -sh "$directory"

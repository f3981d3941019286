"""The local Slurm itself: one that does not come up leaves nothing behind."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import START_SECONDS, TOOL

pytestmark = pytest.mark.slurm


def test_a_cluster_that_does_not_come_up_says_why_and_leaves_nothing():
    with tempfile.TemporaryDirectory(prefix="grpo_mega-slurm-") as name:
        broken = Path(name) / "broken.sh"
        text = TOOL.read_text()
        broken.write_text(
            text.replace("JobRequeue=1", "NoSuchKey=1").replace("READY_SECONDS=30", "READY_SECONDS=3")
        )
        folder = Path(name) / "cluster"
        with (Path(name) / "said").open("w+") as said:  # daemons would hold a pipe open
            command = ["bash", str(broken), "start", str(folder)]
            done = subprocess.run(command, stdout=said, stderr=said, timeout=START_SECONDS, check=False)
            said.seek(0)
            assert done.returncode == 1 and "unrecognized key: NoSuchKey" in said.read()
        processes = psutil.process_iter(["cmdline"])
        assert not [process for process in processes if name in " ".join(process.info["cmdline"] or [])]
        assert not (folder / "namespaces").exists()

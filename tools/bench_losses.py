"""Both benchmarks of the losses, tables on the terminal, JSON and pictures in a directory.

python tools/bench_losses.py OUT            # as docs/benchmarks.md has them; minutes
python tools/bench_losses.py OUT --small    # does it run: seconds
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grpo_mega.bench import logprob, losses, show


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.small:
        results = {"losses": losses.run(4, 64, 1), "logprob": logprob.run(64, 32, 1000, repeats=1)}
    else:
        results = {"losses": losses.run(repeats=6), "logprob": logprob.run()}
    for title, rows in results.items():
        show.table(rows, title)
        for path in show.write(rows, title, options.out):
            print(path)


if __name__ == "__main__":
    main()

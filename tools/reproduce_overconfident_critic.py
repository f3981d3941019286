"""An over-confident critic, and what a preset does about it: warm-ups on the same pairs that differ in the
critic's loss alone.

python tools/reproduce_overconfident_critic.py --picture docs/critic_presets.png     # about 20 minutes
python tools/reproduce_overconfident_critic.py --recipes gad hot --seeds 0

Each run is a recipe of recipes/discriminator, cut down to two stages: the policy reads teacher text for a
while, then it stands still and the critic learns to tell its answers from the teacher's. Prints a table of
the last steps, of training pairs and of the frozen audit set, and draws both with the bands of the critic's
health. Runs that are there already, of the same sizes, are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from grpo_mega.critic.health import BANDS
from grpo_mega.monitor.jsonl import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[1]
AUDIT_EVERY = 5
LAST_STEPS = 20
"""Whose mean the table shows."""
PANELS = (
    ("critic/d_acc", "T > S, pairs of the step"),
    ("critic_audit/d_acc", "T > S, frozen pairs"),
    ("critic/score_diff", "T - S, pairs of the step"),
    ("critic_audit/score_diff", "T - S, frozen pairs"),
    ("critic/grad_norm", "gradient norm before clipping"),
    ("critic/teacher_wins", "T > S, pairs that differ"),
)
COLOURS = ("#b3541e", "#1f5a94", "#3c7a3c", "#7a3c7a")
Curve = dict[int, float]


@dataclass(frozen=True)
class Sizes:
    seqkd: int  # steps in which the policy reads teacher text
    warmup: int  # steps of the critic


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["before_fix", "warmup_2026_01"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seqkd", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=120)
    parser.add_argument("--dir", type=Path, default=ROOT / "runs" / "overconfident_critic")
    parser.add_argument("--picture", type=Path, help="default: critic_presets.png beside the runs")
    given = parser.parse_args()
    sizes = Sizes(given.seqkd, given.warmup)
    curves = {
        recipe: [train(recipe, seed, sizes, given.dir) for seed in given.seeds] for recipe in given.recipes
    }
    print("\n".join(table(curves, given.seeds)))
    picture = given.picture or given.dir / "critic_presets.png"
    draw(curves, picture)
    print(picture)


def train(recipe: str, seed: int, sizes: Sizes, folder: Path) -> dict[str, Curve]:
    """The run's curves by metric; over the critic's own steps, from 1 on."""
    run_dir = folder / f"{recipe}-{seed}-{sizes.seqkd}-{sizes.warmup}"
    if not (run_dir / "hf").is_dir():
        print(f"{recipe}, seed {seed} ...", file=sys.stderr, flush=True)
        read = f"{{steps: {sizes.seqkd}, batch_size: 128, lr: 2.0e-3, warmup_steps: 20}}"
        overrides = [
            f"seed={seed}",
            f"run.dir={run_dir}",
            "parallel.dp=1",
            f"stages=[{{seqkd: {read}}}, {{warmup: {{steps: {sizes.warmup}, samples: 4}}}}]",
            "reward=[{rule: {kind: exact}}]",
            "eval.every=0",
            "checkpoint.every=0",
            f"critic.audit.every={AUDIT_EVERY}",
        ]
        source = ROOT / "recipes" / "discriminator" / f"{recipe}.yaml"
        command = [sys.executable, "-m", "grpo_mega", "train", str(source), "--overwrite", *overrides]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    curves: dict[str, Curve] = {}
    for record in read_metrics(run_dir / METRICS_FILE):
        for name, value in record.metrics.items():
            if name.startswith("critic"):
                curves.setdefault(name, {})[record.step - sizes.seqkd] = value
    return curves


def last(curve: Curve) -> float:
    return statistics.mean(value for step, value in curve.items() if step > max(curve) - LAST_STEPS)


def table(curves: dict[str, list[dict[str, Curve]]], seeds: list[int]) -> list[str]:
    lines = [
        "| recipe | seed | d_acc | audit d_acc | score_diff | audit score_diff | largest score_diff "
        "| grad_norm | largest grad_norm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, runs in curves.items():
        for seed, run in zip(seeds, runs, strict=True):
            cells = [
                f"{last(run['critic/d_acc']):.2f}",
                f"{last(run['critic_audit/d_acc']):.2f}",
                f"{last(run['critic/score_diff']):.2f}",
                f"{last(run['critic_audit/score_diff']):.2f}",
                f"{max(run['critic/score_diff'].values()):.2f}",
                f"{last(run['critic/grad_norm']):.2f}",
                f"{max(run['critic/grad_norm'].values()):.1f}",
            ]
            lines.append(f"| {recipe} | {seed} | {' | '.join(cells)} |")
    return lines


def draw(curves: dict[str, list[dict[str, Curve]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bands = {band.metric.split("/")[1]: band for band in BANDS}
    figure, axes = plt.subplots(3, 2, figsize=(12, 9.5), sharex=True)
    for axis, (metric, title) in zip(axes.flat, PANELS, strict=True):
        band = bands[metric.split("/")[1]]
        axis.axhspan(band.low, band.high, color="#e0efdc", label="healthy")
        for (recipe, runs), colour in zip(curves.items(), COLOURS, strict=False):
            for number, run in enumerate(runs):
                curve = run.get(metric, {})
                label = recipe if number == 0 else None
                axis.plot(list(curve), list(curve.values()), color=colour, lw=1, alpha=0.8, label=label)
        axis.set_title(title, fontsize=10)
        if metric.endswith("grad_norm"):
            axis.set_yscale("log")
    axes[0][0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("steps of the critic")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

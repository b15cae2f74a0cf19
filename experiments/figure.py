"""Draws the README's figure from experiments/results/default.jsonl (made by experiments/seeds.py) and two fits. Needs matplotlib.

    python experiments/figure.py           # writes experiments/results/figure.png; half a minute
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from critic import quantile_levels
from experiments.fit_tails import fitted_quantiles, tails
from experiments.seeds import interval
from risk import RiskConfig

RESULTS = Path(__file__).parent / "results"
COLOURS = {"dvpo": "#c0392b", "ppo": "#2c3e50"}


def draw_training(axes, runs, measure, title):
    for algo, colour in COLOURS.items():
        curves = {}
        for run in (run for run in runs if run["algo"] == algo):
            curves.setdefault(0, []).append(run["before"][measure])
            for row in run["curve"]:
                key = "eval/" + measure.replace(", ", "/").replace(" ", "_")
                if key in row:
                    curves.setdefault(row["iteration"], []).append(row[key])
        x = sorted(curves)
        mean, half = zip(*(interval(curves[step]) for step in x))
        axes.plot(x, mean, color=colour, label=algo.upper())
        axes.fill_between(x, [m - h for m, h in zip(mean, half)], [m + h for m, h in zip(mean, half)], color=colour, alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel="iteration (128 responses each)", ylabel="held-out accuracy, sampled", ylim=(0.15, 1.0))
    axes.legend(loc="upper left", frameon=False)


def draw_tails(axes):
    levels = quantile_levels(200)
    for name, config, colour in (("quantile regression", None, COLOURS["ppo"]), ("+ DVPO's terms", RiskConfig(), COLOURS["dvpo"])):
        q = fitted_quantiles("heavy lower tail", config, m=200, steps=1200)
        mean, low, up = tails(q)
        axes.plot(levels, q, color=colour, label=f"{name}\nmean {mean:.2f}, tails -{low:.2f} / +{up:.2f}")
    axes.axvspan(0, 0.1, color="0.9", zorder=0)
    axes.axvspan(0.9, 1, color="0.9", zorder=0)
    axes.set(title="What the critic believes: heavy lower tail", xlabel="probability level (tails grey)", ylabel="return", xlim=(0, 1))
    axes.legend(loc="upper left", frameon=False, fontsize=8)


def main():
    torch.set_num_threads(1)
    runs = [json.loads(line) for line in (RESULTS / "default.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    seeds = len({run["seed"] for run in runs})
    draw_training(axes[0], runs, "in domain, sampled", f"20 % of rewards flipped, {seeds} seeds")
    draw_training(axes[1], runs, "out of domain, sampled", "the same models, longer dialogues")
    draw_tails(axes[2])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / "figure.png", dpi=130)
    print(f"written: {RESULTS / 'figure.png'}")


if __name__ == "__main__":
    main()

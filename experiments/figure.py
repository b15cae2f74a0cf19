"""Draws the README's figure from experiments/results/default.jsonl (made by experiments/seeds.py) and two fits. Needs matplotlib.

    python experiments/figure.py           # writes experiments/results/figure.png; half a minute
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from critic import quantile_levels
from experiments.fit_tails import fitted_quantiles, tails
from experiments.seeds import interval
from risk import RiskConfig

RESULTS = Path(__file__).parent / "results"
COLOURS = {"dvpo": "#c0392b", "ppo": "#2c3e50"}


def curves_of(runs, measure):
    """{algo: {iteration: that measure of evaluation, a value per seed}}; iteration 0 is the evaluation before."""
    curves, key = {algo: {} for algo in COLOURS}, "eval/" + measure.replace(", ", "/").replace(" ", "_")
    for run in runs:
        curves[run["algo"]].setdefault(0, []).append(run["before"][measure])
        for row in run["curve"]:
            if key in row:
                curves[run["algo"]].setdefault(row["iteration"], []).append(row[key])
    return curves


def band_of(curve):
    """{iteration: values} as lists to draw: iterations, means and half-widths of the 95 % interval."""
    x = sorted(curve)
    mean, half = zip(*(interval(curve[step]) for step in x))
    return {"iteration": x, "mean": mean, "half": half}


def draw_band(axes, band, colour, label, style="-"):
    low, high = ([m + sign * h for m, h in zip(band["mean"], band["half"])] for sign in (-1, 1))
    axes.plot(band["iteration"], band["mean"], style, color=colour, label=label)
    axes.fill_between(band["iteration"], low, high, color=colour, alpha=0.15, linewidth=0)


def draw_training(axes, bands, title, colours=COLOURS):
    for (algo, colour), style in zip(colours.items(), ("-", "--")):
        draw_band(axes, bands[algo], colour, algo.upper(), style)
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
    import matplotlib.pyplot as plt

    torch.set_num_threads(1)
    runs = [json.loads(line) for line in (RESULTS / "default.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    seeds = len({run["seed"] for run in runs})
    titles = {"in domain, sampled": f"20 % of rewards flipped, {seeds} seeds", "out of domain, sampled": "the same models, longer dialogues"}
    for ax, (measure, title) in zip(axes, titles.items()):
        draw_training(ax, {algo: band_of(curve) for algo, curve in curves_of(runs, measure).items()}, title)
    draw_tails(axes[2])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / "figure.png", dpi=130)
    print(f"written: {RESULTS / 'figure.png'}")


if __name__ == "__main__":
    main()

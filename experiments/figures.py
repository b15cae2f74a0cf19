"""The figures, one command each. Needs matplotlib.

    python experiments/figures.py first         # training over seeds, and two fits; half a minute
    python experiments/figures.py terms         # what each risk term does to a fit; 2 minutes
    python experiments/figures.py terms --redraw    # from the stored data alone

Each writes what is drawn, experiments/results/figure-NAME.json, and figure-NAME.png (figure.png).
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from tqdm import tqdm

from critic import quantile_levels
from experiments.fit_tails import OFF, RETURNS, fitted_quantiles, tails
from experiments.seeds import RESULTS, current_commit, interval, read_rows, run_script
from risk import RiskConfig
from tasks import InputError

# Of Okabe and Ito: told apart by the colour-blind, too.
RED, BLUE = "#D55E00", "#0072B2"
MEASURES = ("in domain, sampled", "out of domain, sampled")
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"legend.loc": "upper left", "legend.frameon": False, "legend.fontsize": 8}


def rounded(values):
    return [round(value, 4) for value in values.tolist()]


def terms_data(steps=700, m=64):
    """What each risk term does to a fit."""
    alone = {f"+ {term}": {**OFF, term: getattr(RiskConfig, term)} for term in OFF}
    configs = {"core": OFF, **alone, "all": {}}
    fits = {kind: {} for kind in RETURNS}
    for kind, name in tqdm([(kind, name) for kind in RETURNS for name in configs], desc="fits"):
        q = fitted_quantiles(kind, RiskConfig(**configs[name]), m=m, steps=steps)
        mean, low, up = tails(q)
        ends = {"worst": round(mean - low, 4), "mean": round(mean, 4), "best": round(mean + up, 4)}
        fits[kind][name] = {"quantiles": rounded(q), **ends}
    return {"levels": rounded(quantile_levels(m)), "fits": fits}


def draw_fit(above, below, levels, row, name, fit):
    """One fit: its quantiles above, if it has all or no terms, and its tails below."""
    colour, style = {"core": (BLUE, "--"), "all": (RED, "-")}.get(name, ("0.45", "-"))
    if name in ("core", "all"):
        text = "core: quantile regression" if name == "core" else "all of DVPO's terms"
        above.plot(levels, fit["quantiles"], style, color=colour, label=text)
    below.plot([fit["worst"], fit["mean"], fit["best"]], [row] * 3, "|-", color=colour)


def draw_terms(figure, data):
    means = [{name: fit["mean"] for name, fit in fits.items()} for fits in data["fits"].values()]
    moved = max(abs(mean["+ shape"] - mean["core"]) for mean in means)
    figure.suptitle(
        "DVPO's terms contract the lower tail (a coin has none to contract) and expand the upper "
        f"one;\nthe mean stays, which the shape term alone would move by up to {moved:.2f}"
    )
    axes = figure.subplots(2, 3, height_ratios=(3, 2))
    for (kind, fits), above, below in zip(data["fits"].items(), *axes):
        for row, (name, fit) in enumerate(fits.items()):
            draw_fit(above, below, data["levels"], row, name, fit)
        core, full = fits["core"], fits["all"]
        lower = [fit["mean"] - fit["worst"] for fit in (core, full)]
        upper = [fit["best"] - fit["mean"] for fit in (core, full)]
        title = "returns: {}\nlower tail {:.2f} -> {:.2f}\nupper tail {:.2f} -> {:.2f}"
        above.set(title=title.format(kind, *lower, *upper), xlabel="probability level", xlim=(0, 1))
        below.set(xlabel="return (reward units)", yticks=range(len(fits)), yticklabels=fits)
        below.invert_yaxis()
    axes[0, 0].set_ylabel("return (reward units)")
    axes[1, 0].set_ylabel("worst tenth, mean,\nbest tenth")
    axes[0, 0].legend()


def bands_of(runs, measure):
    """{algo: iterations, means and half-widths over seeds}; iteration 0: before training."""
    curves, bands, key = {}, {}, "eval/" + measure.replace(", ", "/").replace(" ", "_")
    for run in runs:
        curve = curves.setdefault(run["algo"], {})
        curve.setdefault(0, []).append(run["before"][measure])
        for row in run["curve"]:
            if key in row:
                curve.setdefault(row["iteration"], []).append(row[key])
    for algo, curve in curves.items():
        mean, half = zip(*(interval(curve[step]) for step in sorted(curve)))
        bands[algo] = {"iteration": sorted(curve), "mean": mean, "half": half}
    return bands


def draw_band(ax, band, colour, text, style="-"):
    low, high = ([m + sign * h for m, h in zip(band["mean"], band["half"])] for sign in (-1, 1))
    ax.plot(band["iteration"], band["mean"], style, color=colour, label=text)
    ax.fill_between(band["iteration"], low, high, color=colour, alpha=0.15, linewidth=0)


def first_data(steps=1200, m=200):
    """Training over seeds, and two fits."""
    runs, fits = read_rows(RESULTS / "default.jsonl"), {}
    bands = {measure: bands_of(runs, measure) for measure in MEASURES}
    for name, config in (("quantile regression", None), ("+ DVPO's terms", RiskConfig())):
        q = fitted_quantiles("heavy lower tail", config, m=m, steps=steps)
        fits[name] = {"quantiles": rounded(q), "tails": tails(q)}
    seeds, levels = len({run["seed"] for run in runs}), rounded(quantile_levels(m))
    return {"seeds": seeds, "bands": bands, "levels": levels, "fits": fits}


def draw_first(figure, data):
    *axes, last = figure.subplots(1, 3)
    seeds = f"20 % of rewards flipped, {data['seeds']} seeds"
    for ax, measure, title in zip(axes, MEASURES, (seeds, "the same models, longer dialogues")):
        draw_band(ax, data["bands"][measure]["dvpo"], RED, "DVPO")
        draw_band(ax, data["bands"][measure]["ppo"], BLUE, "PPO", "--")
        words = {"xlabel": "iteration (128 responses each)", "ylabel": "held-out accuracy, sampled"}
        ax.set(title=title, ylim=(0.15, 1.0), **words)
        ax.legend()
    for (name, fit), colour in zip(data["fits"].items(), (BLUE, RED)):
        mean, low, up = fit["tails"]
        text = f"{name}\nmean {mean:.2f}, tails -{low:.2f} / +{up:.2f}"
        last.plot(data["levels"], fit["quantiles"], color=colour, label=text)
    last.axvspan(0, 0.1, color="0.9", zorder=0)
    last.axvspan(0.9, 1, color="0.9", zorder=0)
    words = {"xlabel": "probability level (tails grey)", "ylabel": "return"}
    last.set(title="What the critic believes: heavy lower tail", xlim=(0, 1), **words)
    last.legend()


FIGURES = {  # name: what computes the data, what draws it, width and height in inches
    "first": (first_data, draw_first, (13, 3.8)),
    "terms": (terms_data, draw_terms, (9, 6.2)),
}


def draw_one(args):
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("it needs matplotlib: see requirements-dev.txt") from error
    torch.set_num_threads(1)
    compute, draw, size = FIGURES[args.name]
    stored = RESULTS / f"figure-{args.name}.json"
    target = RESULTS / "figure.png" if args.name == "first" else stored.with_suffix(".png")
    if not args.redraw:
        about = {"commit": current_commit(), "torch": torch.__version__}
        stored.write_text(json.dumps(about | compute()) + "\n")
    data = json.loads(stored.read_text())
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, data)
        figure.savefig(target, dpi=140)
    print(f"written: {target}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=FIGURES)
    parser.add_argument("--redraw", action="store_true", help="from the stored data")
    run_script(parser, draw_one)


if __name__ == "__main__":
    main()

"""The figures, one command each. Needs matplotlib.

    python experiments/figures.py first         # training over seeds, and two fits; half a minute
    python experiments/figures.py terms         # what each risk term does to a fit; 2 minutes
    python experiments/figures.py calibration   # a run, then held-out reliability; 4 minutes
    python experiments/figures.py terms --redraw    # from the stored data alone

Each writes what is drawn, experiments/results/figure-NAME.json, and figure-NAME.png (figure.png).
"""

import argparse
import copy
import importlib.util
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from tqdm import tqdm, trange

import dvpo
import rollout as ro
import train
from critic import quantile_levels
from experiments.fit_tails import OFF, RETURNS, fitted_quantiles, tails
from experiments.seeds import RESULTS, ROOT, current_commit, interval, json_lines
from harness.flags import RISK_TERMS, parse_args
from harness.setup import build, respond
from risk import RiskConfig

# Of Okabe and Ito: told apart by the colour-blind, too.
RED, BLUE = "#D55E00", "#0072B2"
MEASURES = ("in domain, sampled", "out of domain, sampled")
LEVEL, RETURN, STEP = "probability level", "return (reward units)", "iteration (128 responses each)"


def rounded(values):
    return [round(value, 4) for value in values.tolist()]


def label(ax, title, x="", y="", legend=None, **more):
    """The words of a panel; legend: where it stands, None for no legend."""
    ax.set(title=title, xlabel=x, ylabel=y, **more)
    if legend:
        ax.legend(loc=legend, frameon=False, fontsize=8)


# ---- terms: what each risk term does


def terms_data(steps=700, m=64):
    alone = {f"+ {term}": {**OFF, term: getattr(RiskConfig, term)} for term in RISK_TERMS}
    configs = {"core": OFF, **alone, "all": {}}
    fits = {kind: {} for kind in RETURNS}
    for kind, name in tqdm([(kind, name) for kind in RETURNS for name in configs], desc="fits"):
        q = fitted_quantiles(kind, RiskConfig(**configs[name]), m=m, steps=steps)
        mean, low, up = tails(q)
        ends = {"worst": round(mean - low, 4), "mean": round(mean, 4), "best": round(mean + up, 4)}
        fits[kind][name] = {"quantiles": rounded(q), **ends}
    return {"levels": rounded(quantile_levels(m)), "fits": fits}


def draw_fit(above, below, levels, row, name, fit):
    """One fit: a line of quantiles above if it is of all or no terms, and its tails below."""
    colour, style = {"core": (BLUE, "--"), "all": (RED, "-")}.get(name, ("0.45", "-"))
    if name in ("core", "all"):
        text = "core: quantile regression" if name == "core" else "all of DVPO's terms"
        above.plot(levels, fit["quantiles"], style, color=colour, label=text)
        for edge, tail in ((0, "worst"), (0.9, "best")):
            above.plot([edge, edge + 0.1], [fit[tail]] * 2, color=colour, linewidth=5, alpha=0.6)
            below.axvline(fit[tail], color=colour, linestyle=":", linewidth=1, zorder=0)
    below.plot([fit["worst"], fit["best"]], [row, row], "|-", color=colour, markersize=9)
    below.plot(fit["mean"], row, "o", color=colour, markersize=5)


def draw_terms(figure, data):
    pairs = [(fits["+ shape"]["mean"], fits["core"]["mean"]) for fits in data["fits"].values()]
    moved = max(abs(shape - core) for shape, core in pairs)
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
        label(above, title.format(kind, *lower, *upper), LEVEL, xlim=(0, 1))
        label(below, "", RETURN, yticks=range(len(fits)), yticklabels=fits)
        below.invert_yaxis()
    axes[0, 0].set_ylabel(f"{RETURN}\nbars: mean of the outer tenth")
    axes[1, 0].set_ylabel("worst tenth, mean,\nbest tenth")
    axes[0, 0].legend(loc="upper left", frameon=False)


# ---- calibration: is the critic right on held-out rollouts?


@torch.no_grad()
def held_out(run, args, rounds):
    """{domain: returns (tokens,), quantiles (tokens, M)}; every call makes the same draws."""
    torch.manual_seed(args.seed + 1)
    run, found = copy.copy(run), {}
    run.noise = torch.Generator().manual_seed(args.seed + 1)
    for domain, prompts in run.evals.items():
        parts = []
        for batch in [batch for _ in range(rounds) for batch in prompts.iter(args.batch_size)]:
            rollout = respond(run, args, batch, args.temperature)
            # With training's noise: it is part of what the critic predicts.
            scores, _ = train.judge(run, args, batch, rollout)
            logprobs, reference = (
                ro.response_logprobs(model, rollout, args.temperature)
                for model in (run.policy, run.reference)
            )
            mask = rollout.mask
            rewards = dvpo.token_rewards(scores, logprobs, reference, mask, args.kl_coef)
            returns = dvpo.discounted_returns(rewards, mask, args.gamma)
            heads = ro.response_quantiles(run.critic, rollout)
            parts.append((returns[mask], heads.mean(dim=2).sort(dim=-1).values[mask]))
        found[domain] = [torch.cat(part) for part in zip(*parts)]
    return found


def coverage(returns, quantiles, taus, tie):
    """The share of returns below Q(tau), for each tau: (R,), (R, M), (T,) -> (T,).

    As the share of randomised PIT values below tau, u = P(q < y - tie) + U P(y - tie <= q <= y +
    tie), U uniform and seeded: a return within `tie` of a quantile ties with it. With two-valued
    returns and tie 0 the share is a step even for a critic that is right up to a hair.
    """
    y = returns.unsqueeze(1)
    below = (quantiles < y - tie).double().mean(dim=1)
    up_to = (quantiles <= y + tie).double().mean(dim=1)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(len(returns), generator=generator, dtype=torch.float64)
    u = below + uniform * (up_to - below)
    return (u.unsqueeze(1) <= taus).double().mean(dim=0)


PANELS = {  # held-out prompts, tie
    "in domain, as they are": ("in domain", 0.0),
    "in domain, ties broken": ("in domain", 0.25),
    "out of domain, ties broken": ("out of domain", 0.25),
}


def calibration_data(flags="--total-episodes 9600", every=15, rounds=4):
    """A run of train.py's iterations, looked at after every so many of them."""
    args = parse_args([*flags.split(), "--output-dir", str(ROOT / "runs" / "figure-calibration")])
    run, taus = build(args), torch.arange(1, 40, dtype=torch.float64) / 40
    data = {"flags": flags, "rounds": rounds, "taus": rounded(taus), "mean": {}}
    data["curves"] = {panel: {} for panel in PANELS}
    transformers.set_seed(args.seed)
    for iteration in trange(1, args.total_episodes // args.batch_size + 1, desc="iterations"):
        experience, _ = train.collect(run, args)
        train.update(run, args, experience)
        run.iteration = iteration
        if iteration % every:
            continue
        with torch.random.fork_rng():
            found = held_out(run, args, rounds)
        for panel, (domain, tie) in PANELS.items():
            data["curves"][panel][str(iteration)] = rounded(coverage(*found[domain], taus, tie))
        data["mean"][str(iteration)] = {
            domain: rounded(torch.stack([returns.mean(), quantiles.mean()]))
            for domain, (returns, quantiles) in found.items()
        }
    return data


def largest_gap(data, panel):
    """The largest distance of a panel's curves from the diagonal, at any moment."""
    curves = data["curves"][panel].values()
    return max(abs(share - tau) for curve in curves for share, tau in zip(curve, data["taus"]))


def draw_calibration(figure, data):
    from matplotlib import colormaps

    means = [mean["out of domain"] for mean in data["mean"].values()]
    excess = [predicted - sampled for sampled, predicted in means]
    gap = largest_gap(data, list(PANELS)[1])
    figure.suptitle(
        f"Held-out prompts: the critic's coverage is right within {gap:.2f} in domain;\n"
        f"out of domain its mean is too optimistic, by {min(excess):.2f} to {max(excess):.2f}"
    )
    axes = figure.subplots(1, 3)
    for ax, (panel, curves) in zip(axes, data["curves"].items()):
        ax.plot([0, 1], [0, 1], color="0.75", linewidth=5)
        for i, (iteration, curve) in enumerate(curves.items()):
            colour = colormaps["viridis_r"](0.15 + 0.85 * i / len(curves))
            ax.plot(data["taus"], curve, color=colour, label=f"iteration {iteration}")
        sampled, predicted = list(data["mean"].values())[-1][PANELS[panel][0]]
        end = f"end: mean {predicted:.2f} predicted, {sampled:.2f} sampled"
        title = f"{panel}\nat most {largest_gap(data, panel):.2f} off the diagonal\n{end}"
        label(ax, title, "probability level tau", "share of returns below Q(tau)", aspect="equal")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)


# ---- first: training over seeds, and two fits


def curves_of(runs, measure):
    """{algo: {iteration: that evaluation, a value per seed}}; iteration 0: the one before."""
    curves, key = {}, "eval/" + measure.replace(", ", "/").replace(" ", "_")
    for run in runs:
        curve = curves.setdefault(run["algo"], {})
        curve.setdefault(0, []).append(run["before"][measure])
        for row in run["curve"]:
            if key in row:
                curve.setdefault(row["iteration"], []).append(row[key])
    return curves


def band_of(curve):
    """{iteration: values} as lists to draw: iterations, means and half-widths of intervals."""
    steps = sorted(curve)
    mean, half = zip(*(interval(curve[step]) for step in steps))
    return {"iteration": steps, "mean": mean, "half": half}


def draw_band(ax, band, colour, text, style="-"):
    low, high = ([m + sign * h for m, h in zip(band["mean"], band["half"])] for sign in (-1, 1))
    ax.plot(band["iteration"], band["mean"], style, color=colour, label=text)
    ax.fill_between(band["iteration"], low, high, color=colour, alpha=0.15, linewidth=0)


def first_data(steps=1200, m=200):
    runs, fits = json_lines(RESULTS / "default.jsonl"), {}
    bands = {}
    for measure in MEASURES:
        curves = curves_of(runs, measure)
        bands[measure] = {algo: band_of(curve) for algo, curve in curves.items()}
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
        label(ax, title, STEP, "held-out accuracy, sampled", "upper left", ylim=(0.15, 1.0))
    for (name, fit), colour in zip(data["fits"].items(), (BLUE, RED)):
        mean, low, up = fit["tails"]
        text = f"{name}\nmean {mean:.2f}, tails -{low:.2f} / +{up:.2f}"
        last.plot(data["levels"], fit["quantiles"], color=colour, label=text)
    for start in (0, 0.9):
        last.axvspan(start, start + 0.1, color="0.9", zorder=0)
    title = "What the critic believes: heavy lower tail"
    label(last, title, "probability level (tails grey)", "return", "upper left", xlim=(0, 1))


FIGURES = {  # name: what computes the data, what draws it, width and height in inches
    "first": (first_data, draw_first, (13, 3.8)),
    "terms": (terms_data, draw_terms, (9, 6.2)),
    "calibration": (calibration_data, draw_calibration, (9, 4.4)),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=FIGURES)
    parser.add_argument("--redraw", action="store_true", help="from the stored data")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("matplotlib"):
        parser.exit(2, "figures.py: error: it needs matplotlib: see requirements-dev.txt\n")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    torch.set_num_threads(1)
    compute, draw, size = FIGURES[args.name]
    stored = RESULTS / f"figure-{args.name}.json"
    target = RESULTS / "figure.png" if args.name == "first" else stored.with_suffix(".png")
    try:
        if not args.redraw:
            about = {"commit": current_commit(), "torch": torch.__version__}
            stored.write_text(json.dumps(about | compute()) + "\n")
        data = json.loads(stored.read_text())
    except FileNotFoundError as error:
        parser.exit(2, f"figures.py: error: {error}\n")
    style = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False}
    with rc_context({**style, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, data)
        figure.savefig(target, dpi=140)
    print(f"written: {target}")


if __name__ == "__main__":
    main()

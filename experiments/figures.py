"""The figures that explain the critic, one command each. Needs matplotlib.

    python experiments/figures.py terms          # what each risk term does to a fitted return distribution; 2 minutes on one core
    python experiments/figures.py kappa          # a coin flip fitted at kappa 1 and 0.01; seconds
    python experiments/figures.py levels         # levels (j - 1/2)/M against j/M on N(0, 1); seconds
    python experiments/figures.py calibration    # a short run of train.py, then reliability on held-out rollouts; 4 minutes
    python experiments/figures.py curves         # training curves over seeds, from results/default.jsonl
    python experiments/figures.py questions      # KL, explained variance and reward over training, from default, slow, slower and noise-*.jsonl
    python experiments/figures.py terms --redraw   # from the stored data alone

Each writes experiments/results/figure-NAME.json, all numbers that are drawn, and figure-NAME.png.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import dvpo
import rollout as ro
import train
from critic import quantile_huber_loss, quantile_levels
from experiments import noise
from experiments.figure import band_of, curves_of, draw_band, draw_training
from experiments.fit_tails import OFF, RETURNS, fitted_quantiles
from experiments.seeds import current_commit
from risk import RiskConfig, lower_tail_mean, upper_tail_mean

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
RED, BLUE, GREEN, PURPLE = "#D55E00", "#0072B2", "#009E73", "#CC79A7"  # of Okabe and Ito: told apart by the colour-blind, too
GRIDS = {"midpoint": ("(j - 1/2)/M", RED, "o-"), "right": ("j/M", BLUE, "s--")}  # label, colour, style


def rounded(values):
    return [round(value, 4) for value in values.tolist()]


# ---- terms: what each risk term does


def terms_data(steps=700, m=64):
    alone = {f"+ {term}": {**OFF, term: getattr(RiskConfig, term)} for term in train.RISK_TERMS}
    configs = {"core": OFF, **alone, "all": {}}
    fits = {kind: {} for kind in RETURNS}
    for kind, name in tqdm([(kind, name) for kind in RETURNS for name in configs], desc="fits"):
        q = fitted_quantiles(kind, RiskConfig(**configs[name]), m=m, steps=steps)
        tails = torch.stack([lower_tail_mean(q, 0.1), q.mean(), upper_tail_mean(q, 0.1)])
        fits[kind][name] = {"quantiles": rounded(q), **dict(zip(("worst", "mean", "best"), rounded(tails)))}
    return {"levels": rounded(quantile_levels(m)), "fits": fits}


def draw_terms(figure, data):
    moved = max(abs(fits["+ shape"]["mean"] - fits["core"]["mean"]) for fits in data["fits"].values())
    figure.suptitle("DVPO's terms contract the lower tail (a coin has none to contract) and expand the upper one;\n"
                    f"the mean stays, which the shape term alone would move by up to {moved:.2f}")  # fmt: skip
    axes = figure.subplots(2, 3, height_ratios=(3, 2))
    for column, (kind, fits) in enumerate(data["fits"].items()):
        above, below = axes[:, column]
        for row, (name, fit) in enumerate(fits.items()):
            label, colour, style = {"core": ("core: quantile regression", BLUE, "--"), "all": ("all of DVPO's terms", RED, "-")}.get(name, ("", "0.45", "-"))
            if label:
                above.plot(data["levels"], fit["quantiles"], style, color=colour, label=label)
                for edge, tail in ((0, "worst"), (0.9, "best")):
                    above.plot([edge, edge + 0.1], [fit[tail]] * 2, color=colour, linewidth=5, alpha=0.6, solid_capstyle="butt")
                    below.axvline(fit[tail], color=colour, linestyle=":", linewidth=1, zorder=0)
            below.plot([fit["worst"], fit["best"]], [row, row], "|-", color=colour, markersize=9, markeredgewidth=2)
            below.plot(fit["mean"], row, "o", color=colour, markersize=5)
        low, up = ([abs(fits[name]["mean"] - fits[name][tail]) for name in ("core", "all")] for tail in ("worst", "best"))
        tails = f"lower tail {low[0]:.2f} -> {low[1]:.2f}\nupper tail {up[0]:.2f} -> {up[1]:.2f}"
        above.set(title=f"returns: {kind}\n{tails}", xlabel="probability level", xlim=(0, 1))
        below.set(xlabel="return (reward units)", yticks=range(len(fits)), yticklabels=fits if column == 0 else [])
        below.invert_yaxis()
    axes[0, 0].set_ylabel("return (reward units)\nbars: mean of the outer tenth")
    axes[1, 0].set_ylabel("worst tenth, mean,\nbest tenth")
    axes[0, 0].legend(loc="upper left", frameon=False)


# ---- kappa and levels: free quantiles on fixed returns


def fitted(returns, levels, kappa, start=0.0, steps=400):
    """Quantiles (M,) that minimise the loss on fixed returns (K,), by Adam with a falling step, and the top one every tenth step."""
    quantiles, top = torch.full((len(levels),), start, requires_grad=True), []
    optimizer = torch.optim.Adam([quantiles], lr=0.1)
    for step in range(steps):
        if step % 10 == 0:
            top.append(round(quantiles[-1].item(), 4))
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad()
        quantile_huber_loss(quantiles, returns, levels, kappa).backward()
        optimizer.step()
    return quantiles.detach(), top


def kappa_data(kappas=(0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)):
    levels = quantile_levels(32)
    fits = {kappa: fitted(torch.tensor([0.0, 1.0]), levels, kappa)[0] for kappa in tqdm(kappas, desc="fits")}
    stds = [round(q.std(unbiased=False).item(), 4) for q in fits.values()]
    return {"levels": rounded(levels), "kappas": kappas, "stds": stds, "quantiles": {str(kappa): rounded(fits[kappa]) for kappa in (1.0, 0.01)}}


def draw_kappa(figure, data):
    stds = dict(zip(data["kappas"], data["stds"]))
    figure.suptitle(f"A coin flip (std 0.5): std {stds[1.0]:.2f} is fitted at kappa = 1, {stds[0.01]:.2f} at kappa = 0.01")
    left, right = figure.subplots(1, 2)
    left.plot([0, 0.5, 0.5, 1], [0, 0, 1, 1], color="0.7", linewidth=6, label="the coin's own")
    for kappa, colour, style in (("1.0", BLUE, "s--"), ("0.01", RED, "o-")):
        left.plot(data["levels"], data["quantiles"][kappa], style, color=colour, markersize=4, label=f"kappa = {float(kappa):g}")
    left.set(title="at 1 the quantile function is a straight line", xlabel="probability level", ylabel="return (reward units)")
    left.legend(frameon=False)
    right.axhline(0.5, color="0.7", linewidth=6)
    right.semilogx(data["kappas"], data["stds"], "-", color="0.45")
    for kappa, colour, mark in ((1.0, BLUE, "s"), (0.01, RED, "o")):
        right.plot(kappa, stds[kappa], mark, color=colour, markersize=8)
    right.set(title="the spread is lost where kappa nears the rewards' scale", ylim=(0, 0.6))
    right.set(xlabel="kappa (reward units)", ylabel="std of the fit (reward units)")


def levels_data(m=16, count=4096, steps=3000):
    returns, data = torch.special.ndtri(quantile_levels(count).double()).float(), {"returns": count, "fits": {}}
    with tqdm(total=2 * len(GRIDS), desc="fits") as bar:
        for grid in GRIDS:
            levels = quantile_levels(m, grid)
            q, _ = fitted(returns, levels, 0.01, 0.0, steps)
            bar.update()
            _, top = fitted(returns, levels, 0.01, 6.0, 1000)
            bar.update()
            data["fits"][grid] = {"levels": rounded(levels), "quantiles": rounded(q), "mean": round(q.mean().item(), 4), "top": top}
    return data


def draw_levels(figure, data):
    means = {grid: fit["mean"] + 0.0 for grid, fit in data["fits"].items()}
    figure.suptitle(f"N(0, 1), M = 16: with levels j/M the mean is {means['right']:+.2f}, with (j - 1/2)/M {abs(means['midpoint']):.2f}")
    left, right = figure.subplots(1, 2)
    true = quantile_levels(500).double()
    left.plot(true, torch.special.ndtri(true), color="0.7", linewidth=4, label="N(0, 1)'s own")
    for grid, (label, colour, style) in GRIDS.items():
        fit = data["fits"][grid]
        left.plot(fit["levels"], fit["quantiles"], style[0], color=colour, markersize=5, label=f"{label}, started at 0")
        left.axhline(fit["mean"], color=colour, linestyle=style[1:], linewidth=1)
        right.plot(range(0, 10 * len(fit["top"]), 10), fit["top"], style[1:], color=colour, label=label)
    left.set(title=f"fitted to {data['returns']} returns; lines: the mean", xlabel="probability level", ylabel="return (reward units)")
    right.set(title="started too high, level 1 never comes down", xlabel="step of Adam", ylabel="top quantile (reward units)", ylim=(0, 6.5))
    left.legend(frameon=False)
    right.legend(loc="center right", frameon=False)


# ---- calibration: is the critic right on held-out rollouts?


@torch.no_grad()
def held_out(checkpoint, rounds):
    """{domain: returns sampled on held-out prompts by a checkpoint's policy, its critic's quantiles there}: (tokens,), (tokens, M)."""
    args = train.parse_args(["--resume", str(checkpoint)])
    state, found = train.build(args), {}
    for domain, prompts in state.evals.items():
        torch.manual_seed(args.seed + 1)  # the same draws for every checkpoint
        parts = []
        for batch in itertools.chain(*(prompts.iter(args.batch_size) for _ in range(rounds))):
            rollout = train.sample_batch(state, args, batch, args.temperature)
            scores, _ = train.judge(state, args, batch, rollout)  # with training's noise: it is part of what the critic predicts
            logprobs, reference = (ro.response_logprobs(model, rollout, args.temperature) for model in (state.policy, state.reference))
            returns = dvpo.discounted_returns(train.rewards_of(args, scores, logprobs, reference, rollout.mask), rollout.mask, args.gamma)
            quantiles = ro.response_quantiles(state.critic, rollout).mean(dim=2).sort(dim=-1).values
            parts.append((returns[rollout.mask], quantiles[rollout.mask]))
        found[domain] = [torch.cat(part) for part in zip(*parts)]
    return found


def coverage(returns, quantiles, taus, tie):
    """The share of returns below Q(tau), for each tau, as the share of randomised PIT values below tau: (R,), (R, M), (T,) -> (T,).

    u = P(q < y - tie) + U P(y - tie <= q <= y + tie), U uniform, seeded: a return within `tie` of a quantile ties with it. With
    two-valued returns and tie 0 the share is a step even for a critic that is right up to a hair.
    """
    y = returns.unsqueeze(1)
    below, up_to = (quantiles < y - tie).double().mean(dim=1), (quantiles <= y + tie).double().mean(dim=1)
    u = below + torch.rand(len(returns), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * (up_to - below)
    return (u.unsqueeze(1) <= taus).double().mean(dim=0)


PANELS = {  # held-out prompts, tie
    "in domain, as they are": ("in domain", 0.0),
    "in domain, ties broken": ("in domain", 0.25),
    "out of domain, ties broken": ("out of domain", 0.25),
}


def calibration_data(flags="--total-episodes 9600 --save-steps 15 --save-total-limit 10", folder="runs/figure-calibration", rounds=4):
    if not (ROOT / folder / "results.json").exists():
        assert train.main([*flags.split(), "--output-dir", str(ROOT / folder)]) == 0, "the run of train.py failed"
    taus = torch.arange(1, 40, dtype=torch.float64) / 40
    data = {"flags": flags, "rounds": rounds, "taus": rounded(taus), "curves": {panel: {} for panel in PANELS}, "mean": {}}
    for number, checkpoint in tqdm(train.checkpoints(ROOT / folder).items(), desc="checkpoints"):
        iteration, found = str(number), held_out(checkpoint, rounds)
        for panel, (domain, tie) in PANELS.items():
            data["curves"][panel][iteration] = rounded(coverage(*found[domain], taus, tie))
        data["mean"][iteration] = {domain: rounded(torch.stack([y.mean(), q.mean()])) for domain, (y, q) in found.items()}  # sampled, predicted
    return data


def largest_gap(data, panel):
    """The largest distance of a panel's curves from the diagonal, at any moment."""
    return max(abs(share - tau) for curve in data["curves"][panel].values() for share, tau in zip(curve, data["taus"]))


def draw_calibration(figure, data):
    from matplotlib import colormaps

    excess = [predicted - sampled for sampled, predicted in (mean["out of domain"] for mean in data["mean"].values())]
    figure.suptitle(f"Held-out prompts: the critic's coverage is right within {largest_gap(data, list(PANELS)[1]):.2f} in domain;\n"
                    f"out of domain it is too optimistic, its mean {min(excess):.2f} to {max(excess):.2f} too high")  # fmt: skip
    axes = figure.subplots(1, 3)
    for ax, (panel, curves) in zip(axes, data["curves"].items()):
        ax.plot([0, 1], [0, 1], color="0.75", linewidth=5)
        for i, (iteration, curve) in enumerate(curves.items()):
            ax.plot(data["taus"], curve, color=colormaps["viridis_r"](0.15 + 0.85 * i / len(curves)), label=f"iteration {iteration}")
        sampled, predicted = list(data["mean"].values())[-1][PANELS[panel][0]]
        ax.set(title=f"{panel}\nat most {largest_gap(data, panel):.2f} off the diagonal\nend: mean {predicted:.2f} predicted, {sampled:.2f} sampled")
        ax.set(xlabel="probability level tau", ylabel="share of returns below Q(tau)", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)


# ---- curves: training, over seeds


def curves_data(runs="default"):
    runs = [json.loads(line) for line in (RESULTS / f"{runs}.jsonl").read_text().splitlines()]
    data = {"seeds": len({run["seed"] for run in runs}), "bands": {}}
    for measure in ("in domain, sampled", "out of domain, sampled"):
        curves = curves_of(runs, measure)
        paired = {step: [a - b for a, b in zip(values, curves["ppo"][step], strict=True)] for step, values in curves["dvpo"].items() if step}
        data["bands"][measure] = {name: band_of(curve) for name, curve in {**curves, "difference": paired}.items()}
    return data


def holding_zero(data):
    """Whether the interval of DVPO - PPO holds 0, for each evaluation."""
    return [abs(m) <= half for bands in data["bands"].values() for m, half in zip(bands["difference"]["mean"], bands["difference"]["half"])]


def draw_curves(figure, data):
    axes = figure.subplots(1, 3)
    figure.suptitle(f"DVPO and PPO learn alike under 20 % flipped rewards: mean and 95 % interval, {data['seeds']} seeds")
    for ax, (measure, colour, style) in zip(axes, (("in domain, sampled", GREEN, "-"), ("out of domain, sampled", PURPLE, "--"))):
        draw_training(ax, data["bands"][measure], measure.split(",")[0], {"dvpo": RED, "ppo": BLUE})
        draw_band(axes[2], data["bands"][measure]["difference"], colour, measure.split(",")[0], style)
    axes[2].axhline(0, color="0.45", linewidth=1)
    hold = holding_zero(data)
    axes[2].set(title=f"paired: {sum(hold)} of {len(hold)} intervals hold 0", ylim=(-0.15, 0.12))
    axes[2].set(xlabel="iteration (128 responses each)", ylabel="accuracy, DVPO - PPO")
    axes[2].legend(loc="lower left", frameon=False)


# ---- questions: what people ask of their first curves


RATES = {"1e-4": ("default", RED), "1e-5": ("slow", BLUE), "1e-6": ("slower", GREEN)}  # learning rate: its runs in results/, colour
CRITIC_RATES = {"1.2e-2": ("critic-learning-rate 1.2e-2", RED), "3e-3": ("defaults", PURPLE), "7.5e-4": ("critic-learning-rate 7.5e-4", BLUE)}


def questions_data(noise_kind="offset, outliers"):
    stored = {name: [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()] for name, _ in RATES.values()}
    curves = lambda name, key: [[float(f"{row[key]:.4g}") for row in run["curve"]] for run in stored[name] if run["algo"] == "dvpo"]
    mean = lambda runs: [round(statistics.fmean(values), 4) for values in zip(*runs, strict=True)]
    finished = noise.current("flags")
    runs = {rate: finished[noise_kind, method] for rate, (method, _) in CRITIC_RATES.items()}
    if not (shared := set.intersection(*(set(found) for found in runs.values()))):
        raise FileNotFoundError("expected finished runs of `noise.py --grid flags`, found none")
    kl = {rate: [curve[:60] for curve in curves(name, "objective/kl")] for rate, (name, _) in RATES.items()}  # as long as the slow runs
    return {
        "warm-up": train.parse_args([]).critic_warmup_steps, "kl": kl, "ev": curves("default", "val/explained_var"),
        "scores": mean(curves("default", "objective/scores")), "true": mean(curves("default", "objective/true_scores")),
        "seeds": len(shared), "lagging": {rate: mean([found[seed]["ev"] for seed in sorted(shared)]) for rate, found in runs.items()},
    }  # fmt: skip


def below_zero(curves, start):
    """How many of all numbers behind the first `start` of each curve are below 0, and how many there are."""
    later = [value for curve in curves for value in curve[start:]]
    return sum(value < 0 for value in later), len(later)


def draw_questions(figure, data):
    (kl, ev), (reward, lag) = figure.subplots(2, 2)
    for rate, curves in data["kl"].items():
        count, total = below_zero(curves, data["warm-up"] + 1)
        for seed, curve in enumerate(curves):
            label = f"learning rate {rate}: {count} of {total} below 0" if seed == 0 else None
            kl.plot(range(1, len(curve) + 1), curve, ".", color=RATES[rate][1], markersize=3.5, label=label)
    kl.set_yscale("symlog", linthresh=1e-3)
    kl.set(title="KL to the starting policy, an estimate;\none dot per iteration and seed", xlabel="iteration", ylabel="nats per response")
    kl.set(xlim=(0, 61), ylim=(-0.05, 3e3))
    by_step, steps = list(zip(*data["ev"])), range(1, len(data["true"]) + 1)
    ev.fill_between(steps, *zip(*((min(values), max(values)) for values in by_step)), color=RED, alpha=0.25, linewidth=0, label="lowest to highest seed")
    ev.plot(steps, [statistics.fmean(values) for values in by_step], color=RED, linewidth=1, label="mean")
    count, total = below_zero(data["ev"], 1)
    ev.set(title=f"explained variance, default task: 0 at first,\nthen below 0 in {count} of {total} iterations", xlabel="iteration")
    for name, label, colour in (("true", "without noise", GREEN), ("scores", "as training sees it", RED)):
        reward.plot(steps, data[name], color=colour, linewidth=1, label=label)
    reward.plot(steps, [0.2 + 0.6 * value for value in data["true"]], "--", color="0.3", linewidth=1, label="0.2 + 0.6 x that without noise")
    reward.axvspan(1, data["warm-up"], color="0.9", label="the policy rests")
    reward.set(title=f"reward, default task, mean of {len(data['ev'])} seeds", xlabel="iteration", ylim=(0.35, 0.9))
    for rate, curve in data["lagging"].items():
        lag.plot([noise.WINDOW * (i + 1) for i in range(len(curve))], curve, "o-", color=CRITIC_RATES[rate][1], markersize=3, label=f"critic at {rate}")
    lag.set(title=f"explained variance where there is much to explain\n(prompt offsets and outliers, mean of {data['seeds']} seeds)", xlabel="iteration")
    for ax in (ev, kl, lag):
        ax.axhline(0, color="0.45", linewidth=1)
    for ax, place in ((kl, "upper left"), (ev, "upper left"), (reward, "lower right"), (lag, "lower right")):
        ax.legend(frameon=False, fontsize=8, loc=place)


FIGURES = {  # name: what computes the data, what draws it, height in inches at a width of 9
    "terms": (terms_data, draw_terms, 6.2),
    "kappa": (kappa_data, draw_kappa, 3.4),
    "levels": (levels_data, draw_levels, 3.4),
    "calibration": (calibration_data, draw_calibration, 4.4),
    "curves": (curves_data, draw_curves, 3.2),
    "questions": (questions_data, draw_questions, 6),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"figures.py: error: {message}\n")
    parser.add_argument("name", choices=FIGURES)
    parser.add_argument("--redraw", action="store_true", help="from the stored data, without computing it again")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("matplotlib"):
        parser.error("it needs matplotlib, which is in requirements-dev.txt")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    torch.set_num_threads(1)
    compute, draw, height = FIGURES[args.name]
    stored = RESULTS / f"figure-{args.name}.json"
    if not args.redraw:
        try:
            data = compute()
        except FileNotFoundError as error:  # of runs that a figure is made of
            parser.error(str(error))
        stored.write_text(json.dumps({"commit": current_commit(), "torch": torch.__version__, **data}) + "\n")
    elif not stored.exists():
        parser.error(f"--redraw: expected data in {stored.name}, found none: run without it first")
    with rc_context({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, height), layout="constrained")
        draw(figure, json.loads(stored.read_text()))
        figure.savefig(stored.with_suffix(".png"), dpi=140)
    print(f"written: {stored}, {stored.with_suffix('.png').name}")


if __name__ == "__main__":
    main()

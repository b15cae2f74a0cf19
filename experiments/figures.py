"""The figures, one command each. Needs matplotlib.

    python experiments/figures.py first         # of noise.py's runs, and one more; two minutes
    python experiments/figures.py terms    # what each risk term does to a fit; --redraw: as stored

Each writes what is drawn, experiments/results/figure-NAME.json, and figure-NAME.png (figure.png).
"""

import contextlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from tqdm import tqdm

import train
from critic import quantile_levels
from experiments import noise
from experiments.fit_tails import OFF, RETURNS, fitted_quantiles, tails
from experiments.inspect_tokens import forward
from experiments.scripts import current_commit, load_run, new_parser, run_script
from experiments.tables import RESULTS, interval
from harness.setup import judge, respond
from risk import RiskConfig
from rollout import response_quantiles
from tasks import InputError, naming
from tasks.prompts import PROMPT_IDS

# Of Okabe and Ito: told apart by the colour-blind, too.
RED, BLUE = "#D55E00", "#0072B2"
CURVES = (  # method, legend, colour, line
    ("dvpo, spread, lr 2e-4", "DVPO, spread", RED, "-"),
    ("control, lr 2e-4", "its control: PPO, bounded", "#CC79A7", (0, (4, 1, 1, 1, 1, 1))),
    ("ppo, lr 2e-4", "PPO", BLUE, "--"),
    ("grpo, lr 2e-4", "GRPO", "#009E73", "-."),
    ("reinforce++, lr 2e-4", "Reinforce++", "#E69F00", (0, (1, 1))),
    ("robust, lr 2e-4", "robust PPO", "0.4", ":"),
)
FITS = {  # that are drawn in full: colour, line, legend
    "core": (BLUE, "--", "core: quantile regression"),
    "all": (RED, "-", "all of DVPO's terms"),
}
NUM_BELIEFS = 1024  # responses
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


def draw_terms(figure, data):
    kinds = data["fits"]
    moved = max(abs(fits["+ shape"]["mean"] - fits["core"]["mean"]) for fits in kinds.values())
    figure.suptitle(
        "DVPO's terms contract the lower tail (a coin has none to contract) and expand the upper "
        f"one;\nthe mean stays, which the shape term alone would move by up to {moved:.2f}"
    )
    axes = figure.subplots(2, 3, height_ratios=(3, 2))
    for (kind, fits), above, below in zip(kinds.items(), *axes):
        for row, (name, fit) in enumerate(fits.items()):
            colour, line, text = FITS.get(name, ("0.45", "-", None))
            if text:
                above.plot(data["levels"], fit["quantiles"], line, color=colour, label=text)
            below.plot([fit["worst"], fit["mean"], fit["best"]], [row] * 3, "|-", color=colour)
        ends = [fits[name] for name in FITS]
        lower = [fit["mean"] - fit["worst"] for fit in ends]
        upper = [fit["best"] - fit["mean"] for fit in ends]
        title = "returns: {}\nlower tail {:.2f} -> {:.2f}\nupper tail {:.2f} -> {:.2f}"
        above.set(title=title.format(kind, *lower, *upper), xlabel="probability level", xlim=(0, 1))
        below.set(xlabel="return (reward units)", yticks=range(len(fits)), yticklabels=fits)
        below.invert_yaxis()
    axes[0, 0].set_ylabel("return (reward units)")
    axes[1, 0].set_ylabel("worst tenth, mean,\nbest tenth")
    axes[0, 0].legend()


def bands_of(runs):
    """{measure: iterations, means and half-widths over seeds}; iteration 0: before training."""
    bands = {}
    for measure in noise.SPLITS:
        key = "eval/" + measure.replace(", ", "/").replace(" ", "_")
        curve = {0: [run["before"][measure] for run in runs.values()]}
        for row in (row for run in runs.values() for row in run["curve"]):
            curve.setdefault(row["iteration"], []).append(row[key])
        mean, half = zip(*map(interval, curve.values()))
        bands[measure] = {"iteration": list(curve), "mean": mean, "half": half}
    return bands


def beliefs(method, seed, folder):
    """{domain: its scores and the critic's quantiles at the last token}, once a run has ended."""
    words = noise.seeded(noise.flags_of("long", method, "reward model"), seed, folder)
    with contextlib.redirect_stdout(None):  # its progress is shown
        status = train.main(words)
    if status:
        raise InputError(f"{method}: expected a finished run, found status {status} of train.py")
    run, args = load_run(folder)
    batch = run.data[:NUM_BELIEFS]
    rollout = respond(run, args, batch, args.temperature)
    scores, _ = judge(run, args, batch, rollout)
    quantiles = forward(run, args, rollout, response_quantiles, run.critic)
    last, found = quantiles[:, -1].mean(dim=1).sort(dim=-1).values, {}
    domains = [ids[run.domain_at] for ids in batch[PROMPT_IDS]]
    for domain in set(domains):
        rows = torch.tensor([own == domain for own in domains])
        name, own = run.tokenizer.decode([domain]), scores[rows]
        found[name] = {"scores": rounded(own.quantile(run.critic.levels)), "std": own.std().item()}
        found[name] |= {"believed": rounded(last[rows].mean(dim=0))}
    return found


def first_data():
    """Training under a reward model's noise, over seeds, and what the critic believes of it."""
    runs, bands = noise.current("long"), {}
    for method, *_ in CURVES:
        own = runs["reward model", method]
        if len(own) < 2:
            raise InputError(f"expected runs of {method}, found {len(own)}: noise.py --grid long")
        with naming(f"results: {method}"):
            bands[method] = bands_of(own)
    seeds = len(runs["reward model", CURVES[0][0]])
    found = beliefs(CURVES[0][0], min(noise.GRIDS["long"][2]), Path("runs/figure-first"))
    ends = sorted(found, key=lambda name: found[name]["std"])
    shown = {name: found[name] for name in (ends[0], ends[-1])}
    return {"seeds": seeds, "bands": bands, "levels": rounded(quantile_levels(200)), "fits": shown}


def draw_first(figure, data):
    *axes, last = figure.subplots(1, 3)
    titles = (f"a reward model's noise, {data['seeds']} seeds", "the same models, longer dialogues")
    for ax, measure, title in zip(axes, noise.SPLITS, titles):
        for method, text, colour, line in CURVES:
            band = data["bands"][method][measure]
            at, pairs = band["iteration"], [*zip(band["mean"], band["half"])]
            low, high = ([mean + sign * half for mean, half in pairs] for sign in (-1, 1))
            ax.plot(at, band["mean"], linestyle=line, color=colour, label=text)
            ax.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        words = {"xlabel": "iteration (128 responses each)", "ylabel": "held-out accuracy, greedy"}
        ax.set(title=title, **words)
    axes[0].legend(loc="lower left")
    for (name, fit), colour in zip(data["fits"].items(), (BLUE, RED)):
        last.plot(data["levels"], fit["scores"], ":", color=colour, label=f"scores, {name}")
        last.plot(data["levels"], fit["believed"], color=colour, label=f"the critic's, {name}")
    words = {"xlabel": "probability level", "ylabel": "score (reward units)", "xlim": (0, 1)}
    last.set(title="The least and the most noisy domain", **words)
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
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        with naming(f"{stored}: expected the data of a figure"):
            draw(figure, json.loads(stored.read_text()))
        figure.savefig(target, dpi=140)
    print(f"written: {target}")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("name", choices=FIGURES)
    parser.add_argument("--redraw", action="store_true", help="from the stored data")
    run_script(parser, draw_one)


if __name__ == "__main__":
    main()

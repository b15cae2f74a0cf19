"""Which tokens carry the advantage: a finished DVPO run's critic beside a scalar one, by token.

    python experiments/inspect_tokens.py runs/dialogue-dvpo-seed0 --html tokens.html
    python experiments/inspect_tokens.py runs/dialogue-dvpo-seed0 --scalar runs/dialogue-ppo-seed0

The newest checkpoint answers held-out prompts under the run's own flags, but without noise. Per
token: quantiles of the return that the critic predicts before it, their spread, the advantage, and
the same of a scalar critic: that of a run with --algo ppo, or one fitted here on --samples
responses. On the page blue is above what was expected, orange below.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from jinja2 import Template
from tqdm import trange

import dvpo
import rollout as ro
from critic import QuantileCritic
from experiments.scripts import COUNT, load_run, new_parser, run_script
from harness.checkpoints import newest_checkpoint
from harness.flags import number_in, parse_args
from harness.setup import autocast, build_critic, judge, respond, to_train
from risk import tail_size
from tasks import InputError, naming
from tasks.prompts import PROMPT_IDS
from train import collect, update

SHOWN = (0.05, 0.25, 0.5, 0.75, 0.95)
CELLS = ("std", "mean", "advantage", "scalar", "scalar_advantage", "return")
# Or two critics predict different things.
SAME = "task dataset_name model_name_or_path reward user max_turns seed gamma kl_coef".split()


def flags_of(folder, flag, algo):
    """The flags of a run whose critic can be looked at; raises InputError."""
    newest_checkpoint(Path(folder), flag)
    args = parse_args([f"--resume={folder}"])
    if args.algo != algo or args.whiten_rewards:
        found = args.algo + " --whiten-rewards" * args.whiten_rewards
        raise InputError(f"{flag}: {folder}: expected a run with --algo {algo}, found {found}")
    return args


def forward(run, args, rollout, function, model, *rest):
    """function(model, some rows, *rest) for all rows, in train.py's micro-batches and precision."""
    limits = (args.micro_batch_size, args.micro_batch_tokens)
    with autocast(run), torch.no_grad():
        return ro.in_micro_batches(function, model, rollout, *limits, *rest)


def answer(run, args, batch):
    """Responses, their scores without noise (B,), and token rewards (B, T)."""
    rollout = respond(run, args, batch, args.temperature)
    _, true_scores = judge(run, args, batch, rollout)
    penalties = args.missing_eos_penalty * rollout.truncated
    scores = true_scores.to(penalties.device) - penalties
    models, what = (run.policy, run.reference), (run, args, rollout, ro.response_logprobs)
    logprobs, reference = (model and forward(*what, model, args.temperature) for model in models)
    rewards = dvpo.token_rewards(scores, logprobs, reference, rollout.mask, args.kl_coef)
    return rollout, scores, rewards


def judged_by(critic, run, args, rollout, rewards):
    """What a critic says: sorted quantiles of the heads' mean (B, T, M) and advantages (B, T)."""
    heads, after = forward(run, args, rollout, ro.response_quantiles, critic, True).mean(2), None
    if args.bootstrap_truncated:
        after = torch.where(rollout.truncated.unsqueeze(1), heads[:, -1], 0)
    quantiles = heads[:, :-1].sort(dim=-1).values
    numbers = (rewards, quantiles, rollout.mask, args.gamma, args.lam, after)
    return quantiles, dvpo.scalar_advantage(dvpo.distributional_gae(*numbers)[0])


def scalar_critic(folder, args):
    """The critic of a PPO run that is, but for its algorithm, like that of args."""
    other = flags_of(folder, "--scalar", "ppo")
    for name in SAME:
        ours, theirs = getattr(args, name), getattr(other, name)
        if ours != theirs:
            expected = f"expected --{name.replace('_', '-')} {ours}, as in the other run"
            raise InputError(f"--scalar: {folder}: {expected}, found {theirs}")
    with naming(f"--scalar: {folder}"):
        return QuantileCritic.from_pretrained(newest_checkpoint(Path(folder)) / "critic")


def fitted_critic(run, args, samples):
    """A scalar critic, taught as --algo ppo does it, and on how many of the policy's responses."""
    count = math.ceil(samples / args.batch_size)
    size = samples // count
    fit = {"algo": "ppo", "group_size": 1, "critic_warmup_steps": math.inf, "batch_size": size}
    fit = argparse.Namespace(**{**vars(args), **fit})
    fit.num_mini_batches = min(args.num_mini_batches, size)
    own = copy.copy(run)
    own.critic, rate = build_critic(fit, own.policy, own.context), fit.critic_learning_rate
    own.critic_optimizer = to_train(own.critic, own.policy.device, fit, rate)
    for own.iteration in trange(count, desc="fitting a scalar critic"):
        experience, _ = collect(own, fit)
        update(own, fit, experience)
    return own.critic, count * size


def visible(text):
    """A token as one line without anything that a terminal would obey."""
    shown = {"\n": "↵", "\t": "⇥"}
    return "".join(shown.get(c, c if c.isprintable() else "·") for c in text)


def look(run, args, batch, scalar):
    """[{prompt, score, truncated, tokens: [{text, before, quantiles, shown, std, mean, ...}]}]

    Floats in reward units; shown: at SHOWN, Q(p) the least quantile with a share of p or more at or
    below it. before: what a user said since the policy's last token, as the template has it, or "".
    """
    rollout, scores, rewards = answer(run, args, batch)
    quantiles, advantages = judged_by(run.critic, run, args, rollout, rewards)
    values, scalar_advantages = judged_by(scalar, run, args, rollout, rewards)
    at_shown = [tail_size(quantiles.shape[-1], p) - 1 for p in SHOWN]
    columns = {
        "quantiles": quantiles,
        "shown": quantiles[..., at_shown],
        "std": quantiles.std(dim=-1, unbiased=False),
        "mean": quantiles.mean(dim=-1),
        "advantage": advantages,
        "scalar": values.mean(dim=-1),
        "scalar_advantage": scalar_advantages,
        "reward": rewards,
        "return": dvpo.discounted_returns(rewards, rollout.mask, args.gamma),
    }
    columns = {name: c.double().round(decimals=5).tolist() for name, c in columns.items()}
    shown = []
    for row, (prompt_ids, score) in enumerate(zip(batch[PROMPT_IDS], scores.tolist())):
        ids, tokens = rollout.response_ids[row].tolist(), []
        begin = len(ids) - int(rollout.lengths[row, 1])
        for t in rollout.mask[row].nonzero().flatten().tolist():
            texts = [visible(run.tokenizer.decode(part)) for part in (ids[begin:t], [ids[t]])]
            token = {"before": texts[0], "text": texts[1], "id": ids[t]}
            tokens.append(token | {name: column[row][t] for name, column in columns.items()})
            begin = t + 1
        found = {"prompt": run.tokenizer.decode(prompt_ids), "tokens": tokens}
        shown.append({**found, "score": score, "truncated": rollout.truncated[row].item()})
    return shown


def scored(row):
    return f"score {row['score']:.3f}" + ", truncated" * row["truncated"]


def table(row):
    """A line per token: quantiles, spread, mean and advantage, the scalar critic's, the return."""
    names = [*(f"{p:.0%}" for p in SHOWN), "std", "mean", "adv", "scalar", "its adv", "return"]
    lines = [f"{'token':16}" + "".join(f"{name:>8}" for name in names)]
    for token in row["tokens"]:
        lines += [f"({token['before']})"] if token["before"] else []
        values = [*token["shown"], *(token[name] for name in CELLS)]
        cells = "".join(f"{round(value, 3) + 0.0:8.3f}" for value in values)  # no -0.000
        lines.append(f"{token['text'][:16]:16}{cells}")
    return "\n".join(lines)


def page(shown, said):
    """The whole HTML page as text: the template escapes texts, its script gets numbers alone."""
    rows, names = [row["tokens"] for row in shown], ("quantiles", "shown", "reward", *CELLS)
    numbers = [[{name: token[name] for name in names} for token in tokens] for tokens in rows]
    advantages = ("advantage", "scalar_advantage")
    found = [abs(token[name]) for tokens in rows for token in tokens for name in advantages]
    scale = max(found, default=0) or 1.0  # the advantage that gets full colour
    text = (Path(__file__).parent / "inspect_tokens.html").read_text(encoding="utf-8")
    parts = {"rows": shown, "said": said, "numbers": numbers, "scale": scale}
    return Template(text, autoescape=True).render(parts, table=table, scored=scored)


def inspect(args):
    flags = flags_of(args.run, "run", "dvpo")
    scalar = scalar_critic(args.scalar, flags) if args.scalar else None
    if args.html:
        args.html.open("a").close()  # what cannot be written ends it here
    with naming(f"run: {args.run}"):
        run, flags = load_run(args.run)
        if not run.evals:
            raise InputError("expected held-out prompts, found none")
    which = f"PPO's, of {args.scalar}, which learned from its own policy's responses"
    if scalar is None:
        scalar, count = fitted_critic(run, flags, args.samples)
        which = f"fitted here, as --algo ppo does it, on {count} responses of this policy"
    torch.manual_seed(args.seed)  # the same responses whichever critic stands beside
    batch = next(iter(run.evals.values()))[: args.rows]
    shown = look(run, flags, batch, scalar.to(run.policy.device))
    said = f"{args.run}, temperature {flags.temperature:g}, gamma {flags.gamma:g}"
    said += f", lambda {flags.lam:g}, KL coefficient {flags.kl_coef:g}. Scalar critic: {which}."
    print(said)
    print("Per token: the return predicted before it, the advantage, and the scalar critic's view.")
    for index, row in enumerate(shown, 1):
        print(f"\n{index}. prompt: {visible(row['prompt'])}\n   {scored(row)}\n{table(row)}")
    if args.html:
        args.html.write_text(page(shown, said), encoding="utf-8")
        print(f"\nwritten: {args.html}")


def main():
    parser = new_parser(__doc__)
    parser.add_argument("run", help="the folder of a finished run with --algo dvpo")
    parser.add_argument("--rows", type=COUNT, default=4, help="how many held-out prompts")
    parser.add_argument("--scalar", help="the folder of a PPO run, else alike; or one is fitted")
    parser.add_argument("--samples", type=COUNT, default=512, help="responses to fit it on")
    parser.add_argument("--html", type=Path, help="also write a page to this file")
    parser.add_argument("--seed", type=number_in("[0, 2147483647]", int), default=0)
    run_script(parser, inspect)


if __name__ == "__main__":
    main()

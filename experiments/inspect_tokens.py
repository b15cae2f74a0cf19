"""Which tokens carry the advantage: a finished DVPO run's critic beside a scalar one, token by token.

    python experiments/inspect_tokens.py runs/dialogue-dvpo-seed0 --html tokens.html
    python experiments/inspect_tokens.py runs/dialogue-dvpo-seed0 --scalar runs/dialogue-ppo-seed0 --greedy --prompt "area north" "book"

The newest checkpoint answers held-out prompts (or --prompt) under the run's own flags, and the run's reward scores the answers, without the
noise that training added. Per token: the quantiles of the return that the critic predicts before it, their spread, the advantage, and what a
scalar critic says of the same token: that of a run with --algo ppo, or one that is fitted here on --samples of the policy's responses, by
train.py's own steps. In a conversation the user's turns stand between the tokens. Colour by advantage, blue above what was expected,
orange below; NO_COLOR and FORCE_COLOR are heeded.
"""

import argparse
import html
import json
import math
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import dvpo
import rollout as ro
from critic import QuantileCritic
from risk import tail_size
from rollout import InputError
from train import after_truncated, build, build_critic, collect, context_of, judge, load, number_in, parse_args, run_script, sample_batch, update

SHOWN = (0.05, 0.25, 0.5, 0.75, 0.95)
PALETTE = {1: (255, 195, 153, 117, 75), -1: (255, 230, 223, 216, 208)}  # of 256 terminal colours: white to blue, white to orange
SAME = ("task", "dataset_name", "model_name_or_path", "reward", "user", "max_turns", "seed", "gamma", "kl_coef")  # or two critics predict different things


def flags_of(folder, flag, algo):
    """The flags of a run whose critic can be looked at, its newest checkpoint in args.resume; raises InputError."""
    try:
        args = parse_args([f"--resume={folder}"])
    except InputError as error:
        raise InputError(str(error).partition("; without --resume")[0].replace("--resume", flag)) from error
    for wrong, expected in (
        (args.algo != algo, f"a run with --algo {algo}{', whose critic predicts a distribution' if algo == 'dvpo' else ''}, found {args.algo}"),
        (args.whiten_rewards, "a critic in the reward's units, found one trained with --whiten-rewards"),
    ):
        if wrong:
            raise InputError(f"{flag}: {folder}: expected {expected}")
    return args


def prompts_of(state, args, texts, rows):
    """The batch to answer, {prompt, its ids, other columns: lists}: the given texts, or the first held-out rows; raises InputError."""
    if not texts:
        if not state.evals:
            raise InputError("--prompt: expected one, as the run holds none out; found none")
        return next(iter(state.evals.values()))[:rows]
    if state.user and (needed := ro.needed_parameters(state.user, positional=1)):
        raise InputError(f"--prompt: expected none, as the run's user needs the data's column {needed[0]!r}; found {texts[0][:40]!r}")
    try:
        prompt_ids = ro.encode_prompts(texts, state.tokenizer, args.chat_template == "auto")
    except InputError as error:
        raise InputError(f"--prompt: {error}") from error
    room = context_of(state.policy) - args.response_length
    if (longest := max(map(len, prompt_ids))) > room:
        raise InputError(f"--prompt: expected at most {room} tokens, the model's context less the run's --response-length, found {longest}")
    ro.note_unknown("--prompt", prompt_ids, state.tokenizer)
    data = Dataset.from_dict({"prompt": texts, ro.PROMPT_IDS: prompt_ids})
    ro.assert_known_ids("--prompt", data, state.policy.config.vocab_size)
    return data[:]


def forward(state, args, rollout, function):
    """function(rollout of some rows) for all rows, as train.py computes it."""
    with state.autocast(), torch.no_grad():
        return ro.in_micro_batches(function, rollout, args.micro_batch_size, args.micro_batch_tokens)


def answer(state, args, batch, greedy):
    """Responses of the policy, their scores without noise (B,), and token rewards (B, T); NaN where the reward needs columns that a prompt lacks."""
    with state.autocast():
        rollout = sample_batch(state, args, batch, 0.0 if greedy else args.temperature)
    quiet = argparse.Namespace(**{**vars(args), "reward_noise_fp": 0.0, "reward_noise_fn": 0.0, "reward_noise_outlier": [0.0, 0.0]})
    try:
        scores, _ = judge(state, quiet, batch, rollout)
    except InputError as error:
        if "needs the column" not in str(error):
            raise
        scores = torch.full(rollout.mask.shape[:1], math.nan, device=rollout.mask.device)
    logprobs_of = lambda model: forward(state, args, rollout, lambda part: ro.response_logprobs(model, part, args.temperature))
    ref_logprobs = logprobs_of(state.reference) if state.reference is not None else None
    return rollout, scores, dvpo.token_rewards(scores, logprobs_of(state.policy), ref_logprobs, rollout.mask, args.kl_coef)


def judged_by(critic, state, args, rollout, rewards):
    """What a critic says of responses: sorted quantiles of the heads' mean (B, T, M) and advantages (B, T), in reward units."""
    heads = forward(state, args, rollout, lambda part: ro.response_quantiles(critic, part, after_last=True)).mean(dim=2)
    after = after_truncated(heads, rollout) if args.bootstrap_truncated else None
    quantiles = heads[:, : rollout.mask.shape[1]].sort(dim=-1).values
    advantages, _ = dvpo.distributional_gae(rewards, quantiles, rollout.mask, args.gamma, args.lam, after)
    return quantiles, dvpo.scalar_advantage(advantages)


def scalar_critic(state, args, folder, samples):
    """PPO's critic, of the run in a folder or, without one, fitted here; and a few words on which of both it is."""
    if folder:
        other = flags_of(folder, "--scalar", "ppo")
        for name in SAME:
            ours, theirs = getattr(args, name), getattr(other, name)
            if ours != theirs:
                raise InputError(f"--scalar: {folder}: expected --{name.replace('_', '-')} {ours}, as in the other run, found {theirs}")
        critic = load(QuantileCritic, Path(other.resume) / "critic", "--scalar", other.trust_remote_code).to(state.policy.device)
        return critic, f"PPO's, of {folder} ({Path(other.resume).name}), which learned from its own policy's responses"
    num_batches = math.ceil(samples / args.batch_size)
    fit = {"algo": "ppo", "resume": None, "score_floor": "none", "group_size": 1, "critic_warmup_steps": math.inf,  # the policy rests
           "batch_size": samples // num_batches, "num_mini_batches": min(args.num_mini_batches, samples // num_batches)}  # fmt: skip
    fit, own = argparse.Namespace(**{**vars(args), **fit}), argparse.Namespace(**vars(state))
    own.critic = build_critic(fit, own.policy, context_of(own.policy)).to(own.policy.device)
    own.critic_optimizer = torch.optim.AdamW(own.critic.parameters(), lr=fit.critic_learning_rate, weight_decay=0.0, fused=True)
    for own.iteration in tqdm(range(num_batches), desc="fitting a scalar critic"):
        experience, metrics = collect(own, fit)
        update(own, fit, experience)
    explained = f"explained variance {metrics['val/explained_var']:.3f} on the last {fit.batch_size} before it learned from them"
    return own.critic, f"fitted here, as --algo ppo does it, on {num_batches * fit.batch_size} responses of this run's policy ({explained})"


def visible(text):
    """A token as one line without anything that a terminal would obey."""
    return "".join({"\n": "↵", "\t": "⇥"}.get(c, c if c.isprintable() else "·") for c in text)


def look(state, args, batch, greedy, scalar):
    """[{prompt, score, truncated, tokens: [{text, id, before, quantiles, shown, std, mean, advantage, scalar, scalar_advantage, reward, return}]}]

    Floats in reward units; shown: at SHOWN, Q(p) the least quantile with a share of p or more at or below it. None where the score is not known.
    before: in a conversation, what a user said since the policy's last token, with the chat template's own tokens; else "".
    """
    rollout, scores, rewards = answer(state, args, batch, greedy)
    quantiles, advantages = judged_by(state.critic, state, args, rollout, rewards)
    values, scalar_advantages = judged_by(scalar, state, args, rollout, rewards)
    columns = {
        "id": rollout.response_ids, "quantiles": quantiles, "shown": quantiles[..., [tail_size(quantiles.shape[-1], p) - 1 for p in SHOWN]],
        "std": quantiles.std(dim=-1, unbiased=False), "mean": quantiles.mean(dim=-1), "advantage": advantages, "scalar": values.mean(dim=-1),
        "scalar_advantage": scalar_advantages, "reward": rewards, "return": dvpo.discounted_returns(rewards, rollout.mask, args.gamma),
    }  # fmt: skip
    columns = {name: column.tolist() for name, column in columns.items()}
    known = lambda value: None if isinstance(value, float) and math.isnan(value) else value
    shown = []
    for row, (prompt_ids, score) in enumerate(zip(batch[ro.PROMPT_IDS], scores.tolist())):
        at = rollout.mask[row].nonzero().flatten().tolist()
        tokens = [{name: known(column[row][t]) for name, column in columns.items()} for t in at]
        for t, previous, token in zip(at, [-1, *at], tokens):
            token["text"] = visible(state.tokenizer.decode([token["id"]]))
            token["before"] = visible(state.tokenizer.decode(columns["id"][row][previous + 1 : t]))
        shown.append({"prompt": state.tokenizer.decode(prompt_ids), "score": known(score), "truncated": rollout.truncated[row].item(), "tokens": tokens})
    return shown


def largest(shown):
    """The advantage that gets full colour: the largest one, of either critic."""
    found = [abs(token[name]) for row in shown for token in row["tokens"] for name in ("advantage", "scalar_advantage") if token[name] is not None]
    return max(found, default=0.0) or 1.0


def tinted(text, advantage, scale, colour):
    if not colour or advantage is None:
        return text
    shade = PALETTE[1 if advantage >= 0 else -1][round(4 * min(abs(advantage) / scale, 1))]
    return f"\x1b[38;5;16;48;5;{shade}m{text}\x1b[0m"


def number(value):
    return f"{'-':>7}" if value is None else f"{round(value, 3) + 0.0:7.3f}"  # + 0.0: no -0.000


def scored(row):
    score = "no advantage: the reward needs columns that this prompt lacks" if row["score"] is None else f"score {row['score']:.3f}"
    return score + (", truncated" if row["truncated"] else "")


def table(row, scale=1.0, colour=False):
    """A line per token: its quantiles, spread and mean, the advantage, the scalar critic's value and advantage, and the return."""
    names = [*(f"{p:.0%}" for p in SHOWN), "std", "mean", "adv", "scalar", "its adv", "return"]
    lines = [f"{'token':16}" + "".join(f"{name:>8}" for name in names)]
    for token in row["tokens"]:
        lines += [f"({token['before']})"] if token["before"] else []
        cells = [*map(number, (*token["shown"], token["std"], token["mean"], token["advantage"], token["scalar"], token["scalar_advantage"], token["return"]))]
        for cell, name in ((7, "advantage"), (9, "scalar_advantage")):
            cells[cell] = tinted(cells[cell], token[name], scale, colour)
        lines.append(" ".join([tinted(f"{token['text'][:16]:16}", token["advantage"], scale, colour), *cells]))
    return "\n".join(lines)


def print_rows(shown, colour):
    scale, said = largest(shown), lambda token: f"({token['before']})|" if token["before"] else ""
    print("Per token: quantiles of the return predicted before it, their std and mean, the advantage (what came, minus the mean, by GAE), the scalar\n"
          "critic's value and its advantage, and the return that came." + colour * f" Blue: better than predicted, orange: worse, in full at {scale:.3f}.")
    lines = (("distribution", "advantage"), ("scalar", "scalar_advantage")) if colour else (("response", "advantage"),)
    for index, row in enumerate(shown, 1):
        print(f"\n{index}. prompt: {visible(row['prompt'])}\n   {scored(row)}")
        for name, key in lines:
            print(f"   {name:13}" + "|".join(said(token) + tinted(token["text"], token[key], scale, colour) for token in row["tokens"]))
        print(table(row, scale, colour))


def rounded(value):
    return [rounded(v) for v in value] if isinstance(value, list) else value and round(value, 4)


def page(shown, said):
    """The whole HTML page as text. Texts are escaped here; the script gets numbers alone."""
    scale, sections, numbers = largest(shown), [], []

    def cell(token, key, hidden=""):
        value, text = token[key] or 0.0, html.escape(token["text"]) or "&nbsp;"
        return f'<span class="{"up" if value >= 0 else "down"}" style="--share:{abs(value) / scale:.3f}"{hidden}>{text}</span>'

    def turn(token):
        return f'<span class="user">{html.escape(token["before"])}</span>' if token["before"] else ""

    for index, row in enumerate(shown):
        buttons = [f'{turn(token)}<button type="button" class="token" data-row="{index}" data-column="{column}">{cell(token, "advantage")}'
                   f'{cell(token, "scalar_advantage", " aria-hidden=true")}</button>' for column, token in enumerate(row["tokens"])]  # fmt: skip
        sections.append(
            f'<section><h2>{index + 1}. {html.escape(scored(row))}</h2><p class="prompt">{html.escape(row["prompt"])}</p>'
            f'<div class="line"><span class="names"><span>distribution</span><span>scalar</span></span><span>{"".join(buttons)}</span></div>'
            f'<div class="detail" aria-live="polite"></div><details><summary>All numbers</summary><pre>{html.escape(table(row))}</pre></details></section>'
        )
        numbers.append([{name: rounded(value) for name, value in token.items() if name not in ("text", "id", "before")} for token in row["tokens"]])
    template = (Path(__file__).parent / "inspect_tokens.html").read_text(encoding="utf-8")
    parts = {"SAID": html.escape(said), "SCALE": f"{scale:.3f}", "NUMBERS": json.dumps(numbers), "SECTIONS": "\n".join(sections)}
    for name, value in parts.items():
        template = template.replace(f"<!--{name}-->", value)
    return template


def inspect(args):
    run = flags_of(args.run, "run", "dvpo")
    state = build(run)
    torch.manual_seed(args.seed)
    batch = prompts_of(state, run, args.prompt, args.rows)
    scalar, which = scalar_critic(state, run, args.scalar, args.samples)
    torch.manual_seed(args.seed)  # the same responses whichever critic stands beside
    shown = look(state, run, batch, args.greedy, scalar)
    mode = "greedy" if args.greedy else f"sampled at temperature {run.temperature:g}"
    said = f"{args.run}, {Path(run.resume).name}, {mode}, gamma {run.gamma:g}, lambda {run.lam:g}, KL coefficient {run.kl_coef:g}. Scalar critic: {which}."
    print(said)
    print_rows(shown, bool(os.environ.get("FORCE_COLOR") or sys.stdout.isatty()) and not os.environ.get("NO_COLOR"))
    if args.html:
        args.html.write_text(page(shown, said), encoding="utf-8")
        print(f"\nwritten: {args.html}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="the folder of a finished run with --algo dvpo")
    parser.add_argument("--prompt", nargs="+", default=[], help="prompts to answer; without them the first held-out ones")
    parser.add_argument("--rows", type=number_in("[1, inf)", int), default=4, help="how many held-out prompts")
    parser.add_argument("--scalar", help="the folder of a run with --algo ppo, else alike, whose critic stands beside; without it one is fitted")
    parser.add_argument("--samples", type=number_in("[1, inf)", int), default=512, help="responses to fit a scalar critic on")
    parser.add_argument("--html", type=Path, help="also write a page to this file")
    parser.add_argument("--greedy", action="store_true", help="the most probable token each time")
    parser.add_argument("--seed", type=number_in("[0, 2147483647]", int), default=0)
    run_script(parser, inspect, parser.parse_args())


if __name__ == "__main__":
    main()

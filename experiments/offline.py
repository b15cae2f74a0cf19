"""The worst-case methods of the paper's abstract, CQL and RFQI: they learn from a log.

    python experiments/offline.py --method cql --noise "reward model"    # or rfqi, awr
    python experiments/offline.py --first 100 --seeds 2 --temperature 0.3     # to choose it
    python experiments/offline.py --table         # print what results/offline.jsonl holds

One log of responses of the starting policy, scored as noise.py scores: as many as a run of noise.py
samples. On it a critic is fitted, Q (B, T, V) over the vocabulary, and from it a policy is taken in
one step: log-probs of the log weighted by exp(A / temperature), A = Q(s, a) - E_b Q(s, b) [ours].
awr is that alone; cql and rfqi are awr with alpha or radius 0, bit for bit. Finished runs are kept.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm, trange

from critic import QuantileCritic
from dvpo import masked_mean
from experiments import noise
from experiments.seeds import COUNT, RESULTS, current_commit, interval, read_rows, run_script
from harness.flags import number_in, parse_args
from harness.reports import evaluate
from harness.setup import build, judge, respond
from rollout import response_logprobs, response_quantiles
from tasks import InputError
from tasks.prompts import batch_rows

FOUND = RESULTS / "offline.jsonl"
METHODS = {"awr": {}, "cql": {"alpha": 1.0}, "rfqi": {"radius": 0.1}}
KEYS = ("method", "noise", "temperature", "alpha", "radius", "seed")  # of a row
MOST_WEIGHT = 20.0  # of a token, however good it looks
CRITIC_EPOCHS, POLICY_EPOCHS, ROWS = 4, 2, 64


def cql_loss(q, actions, targets, mask, alpha):
    """Regression on the sampled return, and a price for what the log does not hold: -> ().

    q (B, T, V), actions (B, T) ids, targets (B, T), mask (B, T). Per token:
        (Q(s, a) - y)^2 / 2 + alpha (log sum_b exp Q(s, b) - Q(s, a))
    The price is CQL's (Kumar et al. 2020, equation 4, CQL(H)); over tokens, as in ILQL (Snell et
    al. 2022), whose implicit maximum is left out. [ours] y is a return: nothing is bootstrapped.
    q and targets in units of the returns' standard deviation.
    """
    assert q.shape[:-1] == actions.shape == targets.shape == mask.shape, f"q {tuple(q.shape)}"
    taken = q.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    loss = (taken - targets).square() / 2
    if alpha:
        loss = loss + alpha * (q.logsumexp(dim=-1) - taken)
    return masked_mean(loss, mask)


def robust_value(values, worst, radius):
    """The least mean of V over all distributions of the next state within radius: -> (...).

        min {E_P V : TV(P, P_0) <= radius} = (1 - radius) V(s') + radius min(V(s'), worst)

    values (...): V(s') of the state that follows for sure, as tokens are appended; worst: the least
    V of the states to which P may move. It is max_eta {eta - (eta - V(s'))_+ - radius (eta -
    worst)_+}, the dual of RFQI (Panaganti et al. 2022), whose worst state is a failure of value 0.
    """
    assert 0 <= radius <= 1, f"radius {radius}"
    return (1 - radius) * values + radius * torch.clamp(values, max=worst)


def robust_returns(rewards, mask, gamma, radius, worst):
    """Returns along the sampled path, each next state as bad as the ball allows: (B, T) -> (B, T).

        y_t = r_t + gamma robust_value(y_{t+1}),  y_T = r_T.  radius 0: discounted returns.

    [ours] RFQI bootstraps V(s'); here the sampled return stands for it, so that a noisy one adds
    pessimism, too: E min(y, worst) <= min(E y, worst). The radius is paid for at every token.
    """
    following, has_next = torch.zeros_like(rewards[:, 0]), torch.zeros_like(mask[:, 0])
    returns = torch.zeros_like(rewards)
    for t in reversed(range(mask.shape[1])):
        after = torch.where(has_next, robust_value(following, worst, radius), 0)
        value = rewards[:, t] + gamma * after
        returns[:, t] = torch.where(mask[:, t], value, 0)
        following = torch.where(mask[:, t], value, following)
        has_next = has_next | mask[:, t]
    return returns


def response_logits(model, rollout):
    """(B, T, V) of the positions that chose the response's tokens."""
    inputs = (rollout.input_ids[:, :-1], rollout.attention_mask[:, :-1])
    places = {"position_ids": rollout.position_ids[:, :-1], "use_cache": False}
    return model(*inputs, **places, logits_to_keep=rollout.mask.shape[1]).logits.float()


@torch.no_grad()
def sampled_log(run, args):
    """[(Rollout, rewards (B, T))] of the starting policy, as many as a run would sample."""
    log = []
    for first in tqdm(range(0, args.total_episodes, args.batch_size), "log", leave=False):
        batch = run.data[batch_rows(len(run.data), first, args.batch_size, args.seed)]
        rollout = respond(run, args, batch, args.temperature)
        rewards = torch.zeros(rollout.mask.shape)
        rewards[:, -1] = judge(run, args, batch, rollout)[0]  # a response ends in the last column
        log.append((rollout, rewards))
    return log


def in_turn(log):
    """All of the log by chance, once: (number of a batch, ROWS of its rows)."""
    size = len(log[0][1])
    parts = [(n, rows) for n in range(len(log)) for rows in torch.randperm(size).split(ROWS)]
    return [parts[at] for at in torch.randperm(len(parts)).tolist()]


def step(loss, model, optimizer):
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def state_values(critic, policy, rollout):
    """Q (B, T, V), and V (B, T) as the mean of Q over what the policy would say."""
    q = response_quantiles(critic, rollout)[:, :, 0]
    return q, (response_logits(policy, rollout).softmax(dim=-1) * q).sum(dim=-1)


def fitted_critic(run, args, log, own):
    """Q of the starting policy on its log; rfqi's worst state is looked for after each epoch."""
    returns = torch.cat([rewards[:, -1] for _, rewards in log])
    critic = QuantileCritic(copy.deepcopy(run.policy.base_model), 1, run.policy.config.vocab_size)
    critic.scale.copy_(returns.std().clamp(min=1e-8))
    critic.heads.bias.data.fill_((returns.mean() / critic.scale).item())
    optimizer = torch.optim.AdamW(critic.parameters(), args.critic_learning_rate, weight_decay=0.0)
    # At first the worst state is the worst return.
    worst = returns.min()
    for epoch in trange(CRITIC_EPOCHS, desc="critic", leave=False):
        if own.radius and epoch:
            # What P may move to: the states of the log, as the critic now sees them.
            values = [state_values(critic, run.policy, r)[1][r.mask].min() for r, _ in log]
            worst = torch.stack(values).min()
        for number, rows in in_turn(log):
            rollout, rewards = log[number][0][rows], log[number][1][rows]
            rewards, mask = rewards[:, -rollout.mask.shape[1] :], rollout.mask
            targets = robust_returns(rewards, mask, args.gamma, own.radius, worst) / critic.scale
            q = response_quantiles(critic, rollout)[:, :, 0] / critic.scale
            step(cql_loss(q, rollout.response_ids, targets, mask, own.alpha), critic, optimizer)
    return critic


def extracted_policy(run, args, log, critic, own):
    """Trains a copy of the policy on its log, token by token as the critic likes it."""
    advantages = []
    for rollout, _ in log:
        q, values = state_values(critic, run.policy, rollout)
        taken = q.gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
        advantages.append(taken - values)
    scale = torch.cat([a[r.mask] for a, (r, _) in zip(advantages, log)]).std()
    policy = copy.deepcopy(run.policy)
    optimizer = torch.optim.AdamW(policy.parameters(), args.learning_rate, weight_decay=0.0)
    for _ in trange(POLICY_EPOCHS, desc="policy", leave=False):
        for number, rows in in_turn(log):
            rollout = log[number][0][rows]
            part = advantages[number][rows][:, -rollout.mask.shape[1] :]
            logprobs = response_logprobs(policy, rollout, args.temperature)
            weights = (part / (own.temperature * scale)).exp().clamp(max=MOST_WEIGHT)
            step(-masked_mean(weights * logprobs, rollout.mask), policy, optimizer)
    return policy


@torch.no_grad()
def foreseen(critic, policy, log):
    """The mean over the log's prompts of what the critic expects of the policy's first token."""
    found = []
    for rollout, _ in log:
        values = state_values(critic, policy, rollout)[1]
        found.append(values.gather(1, rollout.mask.long().argmax(dim=1, keepdim=True)))
    return torch.cat(found).mean().item()


def by_turns(prompts, scores):
    """{number of the user's turns, without `book`: accuracy}, as more of them are harder."""
    found = {}
    for prompt, score in zip(prompts, scores.tolist()):
        found.setdefault(str(len(prompt) // 2), []).append(score)
    return {turns: round(statistics.fmean(found[turns]), 4) for turns in sorted(found)}


def run_one(own, kind, seed):
    """One method on one log -> its row."""
    torch.set_num_threads(1)
    flags = noise.flags_of("quick" if own.quick else "main", "ppo", kind)
    with tempfile.TemporaryDirectory() as folder:
        flags += f" --seed {seed} --reward-noise-seed {seed} --output-dir {folder}"
        args = parse_args(flags.split())
        noise.borrow_warm_start(Path(folder), seed)
        run = build(args)
    torch.manual_seed(seed)
    before, _ = evaluate(run, args)
    log = sampled_log(run, args)
    critic = fitted_critic(run, args, log, own)
    policy = extracted_policy(run, args, log, critic, own)
    # What it expects, and what a fresh batch of responses then gets, from the same noisy judge.
    row = {"foreseen": foreseen(critic, policy, log), "before": means(before)}
    run.policy = run.sampler = policy
    batch = run.data[batch_rows(len(run.data), 0, len(run.data), seed)[:1024]]
    scored, true = judge(run, args, batch, respond(run, args, batch, args.temperature))
    after, _ = evaluate(run, args)
    row |= {"scored": scored.mean().item(), "true": true.mean().item(), "after": means(after)}
    splits = {name: after[f"{name}, greedy"] for name in run.evals}
    turns = {name: by_turns(run.evals[name]["prompt"], splits[name]) for name in splits}
    return row | {"by turns": turns}


def means(scores):
    return {name: values.mean().item() for name, values in scores.items()}


def run_all(args):
    """Runs what offline.jsonl lacks, then prints the table."""
    for name in ("alpha", "radius"):
        given, usual = getattr(args, name), METHODS[args.method].get(name)
        if given is not None and usual is None:
            expected = f"expected none with --method {args.method}"
            raise InputError(f"--{name}: {expected}, found {given:g}")
        setattr(args, name, (usual or 0.0) if given is None else given)
    rows = read_rows(FOUND) if FOUND.exists() else []
    done = [tuple(row[key] for key in KEYS) for row in rows]
    seeds = range(args.first, args.first + args.seeds)
    for kind, seed in tqdm([*itertools.product(args.noise, seeds)], args.method):
        row = {"method": args.method, "noise": kind, "seed": seed}
        row |= {"temperature": args.temperature, "alpha": args.alpha, "radius": args.radius}
        if args.table or tuple(row[key] for key in KEYS) in done:
            continue
        row |= run_one(args, kind, seed) | {"commit": current_commit()}
        if not args.quick:
            with open(FOUND, "a") as out:
                out.write(json.dumps(row) + "\n")
        rows.append(row)
    print_table(rows)


def print_table(rows):
    """Accuracy, how conservative, and how even: means over seeds with Student's intervals."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS[:-1]), []).append(row)
    heads = ("greedy", "out of domain", "foreseen", "scored", "worst turns")
    print(
        f"{'noise':18}{'method':10}{'temp.':>6}{'by':>6}{'seeds':>6}",
        *map("{:>15}".format, heads),
    )
    for (method, kind, temperature, alpha, radius), found in groups.items():
        columns = [
            [row["after"][f"{name}, greedy"] for row in found]
            for name in ("in domain", "out of domain")
        ]
        columns += [[row[name] for row in found] for name in ("foreseen", "scored")]
        columns.append([min(row["by turns"]["in domain"].values()) for row in found])
        pairs = [interval(column) if len(column) > 1 else (column[0], 0) for column in columns]
        cells = ["{:8.3f} ±{:5.3f}".format(*pair) for pair in pairs]
        start = f"{kind:18}{method:10}{temperature:6g}{alpha + radius:6g}{len(found):6}"
        print(start, *map("{:>15}".format, cells))
    print("foreseen: the critic's mean for the new policy; scored: what the noisy judge then says")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=METHODS, default="awr")
    parser.add_argument("--noise", nargs="+", choices=noise.NOISES, default=["reward model"])
    parser.add_argument("--seeds", type=COUNT, default=10, help="how many")
    parser.add_argument("--first", type=COUNT, default=20, help="the first seed; 100: for choosing")
    parser.add_argument("--temperature", type=number_in("(0, inf)", float), default=1.0)
    parser.add_argument("--alpha", type=number_in("[0, inf)", float), help="cql's price")
    parser.add_argument("--radius", type=number_in("[0, 1]", float), help="rfqi's ball")
    parser.add_argument("--quick", action="store_true", help="a small log; nothing is kept")
    parser.add_argument("--table", action="store_true", help="run nothing")
    run_script(parser, run_all)


if __name__ == "__main__":
    main()

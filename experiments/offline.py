"""The worst-case methods of the paper's abstract, CQL and RFQI: they learn from a log.

    python experiments/offline.py --jobs 2     # awr, cql and rfqi under all kinds of noise
    python experiments/offline.py --table      # print what results/offline.jsonl holds

A log for each seed: responses of the starting policy, as many as a run of noise.py samples, scored
as there. On it a method fits a critic, Q (B, T, V) over the vocabulary, and takes a policy in one
step. cql and rfqi with alpha or radius 0 are awr, bit for bit. Rows that are there are kept; those
of one noise and seed are made, and written, together.
"""

import copy
import dataclasses
import functools
import itertools
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from torch.nn.utils import clip_grad_norm_

from critic import QuantileCritic
from dvpo import masked_mean
from experiments import noise, scripts
from experiments.tables import RESULTS, by_seed, read_results
from harness.flags import number_in, parse_args
from harness.setup import build, judge, respond
from rollout import in_micro_batches, micro_batches, response_logprobs, response_quantiles
from tasks import InputError
from tasks.prompts import batch_rows

FOUND = RESULTS / "offline.jsonl"
METHODS = ("awr", "cql", "rfqi")
KEYS = ("method", "advantage", "temperature", "alpha", "radius", "flags", "seed")  # of a row
COLUMNS = (noise.COLUMNS, ("in domain, sampled", "out of domain, sampled", "foreseen", "scored"))
COLUMNS += (("foreseen - scored", "uneven turns", "uneven changes"),)
MOST_WEIGHT = 20.0  # of a token, however good it looks
CRITIC_EPOCHS, POLICY_EPOCHS, LIMITS = 2, 2, (64, 2**20)  # rows and tokens of a step


def of_tokens(q, ids):
    """Q (B, T, V) of the tokens ids (B, T): -> (B, T)."""
    return q.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def cql_loss(q, actions, targets, mask, alpha):
    """Regression on the sampled return, and a price for what the log does not hold: -> ().

    q (B, T, V), actions (B, T) ids, targets (B, T), mask (B, T). Per token, in units of the
    scores' standard deviation:  (Q(s, a) - y)^2 / 2 + alpha (log sum_b exp Q(s, b) - Q(s, a))
    """
    assert q.shape[:-1] == actions.shape == targets.shape == mask.shape, f"q {tuple(q.shape)}"
    # Whatever stands off the mask changes nothing, its gradient included.
    q, actions = q.where(mask.unsqueeze(-1), 0), actions.where(mask, 0)
    taken, targets = of_tokens(q, actions), targets.where(mask, 0)
    loss = (taken - targets).square() / 2
    if alpha:
        loss = loss + alpha * (q.logsumexp(dim=-1) - taken)
    return masked_mean(loss, mask)


def robust_value(values, worst, radius):
    """The least mean of V over all distributions of the next state within radius: -> (...).

        min {E_P V : TV(P, P_0) <= radius} = (1 - radius) V(s') + radius min(V(s'), worst)
                                 = max_eta {eta - (eta - V(s'))_+ - radius (eta - worst)_+}

    values (...): V(s') of the state that follows for sure, as tokens are appended; worst: the least
    V of the states to which P may move.
    """
    assert 0 <= radius <= 1, f"radius {radius}"
    return (1 - radius) * values + radius * torch.clamp(values, max=worst)


def robust_returns(rewards, mask, gamma, radius, worst):
    """Returns along the sampled path, each next state as bad as the ball allows: (B, T) -> (B, T).

    y_t = r_t + gamma robust_value(y_{t+1}),  y_T = r_T.  radius 0: discounted returns.
    """
    assert rewards.shape == mask.shape, f"rewards {tuple(rewards.shape)}, mask {tuple(mask.shape)}"
    returns, after = (torch.zeros_like(own * 1.0) for own in (rewards, rewards[:, 0]))
    for t in reversed(range(mask.shape[1])):
        value = rewards[:, t] + gamma * after
        returns[:, t] = torch.where(mask[:, t], value, 0)
        after = torch.where(mask[:, t], robust_value(value, worst, radius), after)
    return returns


def response_q(critic, rollout):
    """(B, T, V): what the critic calls quantiles are the tokens that may be said."""
    return response_quantiles(critic, rollout)[:, :, 0]


def response_probs(policy, rollout):
    """(B, T, V): how probable each of them is."""
    inputs = (rollout.input_ids[:, :-1], rollout.attention_mask[:, :-1])
    more = {"position_ids": rollout.position_ids[:, :-1], "logits_to_keep": rollout.mask.shape[1]}
    return policy(*inputs, use_cache=False, **more).logits.softmax(dim=-1)


@torch.enable_grad()
def train_epoch(model, optimizer, log, numbers, loss_of):
    """Steps on rows of similar length, so that little is padding; numbers (B, T)."""
    groups = micro_batches(log, torch.randperm(len(log.mask)), *LIMITS)
    for rows in (groups[at] for at in torch.randperm(len(groups))):
        part = log[rows]
        loss_of(part, numbers[rows, -part.mask.shape[1] :]).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def fitted(run, args, log, scores, probs, alpha, radius):
    """Fits Q to the log -> critic, {name: advantages (B, T)}: y or Q(s, a) minus E_b Q(s, b)."""
    critic = QuantileCritic(copy.deepcopy(run.policy.base_model), 1, probs.shape[-1])
    critic.scale.copy_(scores.std().clamp(min=1e-8))
    critic.heads.bias.fill_(scores.mean() / critic.scale)
    optimizer = torch.optim.AdamW(critic.parameters(), args.critic_learning_rate, weight_decay=0.0)
    rewards, worst = torch.zeros(log.mask.shape), scores.mean()
    rewards[:, -1] = scores  # a response ends in the last column

    def loss_of(part, targets):
        q = response_q(critic, part) / critic.scale
        return cql_loss(q, part.response_ids, targets, part.mask, alpha)

    for left in reversed(range(CRITIC_EPOCHS)):
        targets = robust_returns(rewards, log.mask, args.gamma, radius, worst) / critic.scale
        train_epoch(critic, optimizer, log, targets, loss_of)
        if radius or not left:
            q = in_micro_batches(response_q, critic, log, *LIMITS)
            values = (probs * q).sum(dim=-1)
            worst = values[log.mask].min()  # P may move to any state of the log, as it now looks
    taken, returns = of_tokens(q, log.response_ids), targets * critic.scale
    return critic, {"q": taken - values, "return": returns - values}


def extracted(run, args, log, advantages, temperature):
    """The Run with a policy trained on the log: on each token as much as the critic likes it."""
    policy, scale = copy.deepcopy(run.policy), temperature * advantages[log.mask].std()
    weights = (advantages / scale).exp().clamp(max=MOST_WEIGHT)
    optimizer = torch.optim.AdamW(policy.parameters(), args.learning_rate, weight_decay=0.0)

    def loss_of(part, weights):
        return -masked_mean(weights * response_logprobs(policy, part, args.temperature), part.mask)

    for _ in range(POLICY_EPOCHS):
        train_epoch(policy, optimizer, log, weights, loss_of)
    return dataclasses.replace(run, policy=policy, sampler=policy)


def foresight(run, args, critic):
    """What the critic expects of new responses at their first tokens, and what they then get."""
    batch = run.data[batch_rows(len(run.data), 0, args.total_episodes // 8, args.seed)]
    rollout = respond(run, args, batch, args.temperature)
    run.noise.manual_seed(args.seed)
    scored = judge(run, args, batch, rollout)[0].mean().item()
    taken = of_tokens(response_q(critic, rollout), rollout.response_ids)
    first = taken.gather(1, rollout.mask.long().argmax(dim=1, keepdim=True)).mean().item()
    return {"foreseen": first, "scored": scored, "foreseen - scored": first - scored}


def start(flags, seed):
    """The starting policy, as a Run with the flags' noise, and all of its flags."""
    with torch.enable_grad(), noise.run_folder(seed) as folder:  # for a new warm start
        args = parse_args(noise.seeded(flags, seed, folder))
        return build(args), args


@functools.lru_cache(maxsize=1)
def log_of(seed):
    """What no noise touches: the start's scores, its responses, and how probable all tokens were.

    Kept for a process's next task, which is often of the same seed.
    """
    torch.manual_seed(seed)
    run, args = start(noise.flags_of("main", "ppo", "none"), seed)
    before = noise.evaluated(run, args, "before")
    batch = run.data[batch_rows(len(run.data), 0, args.total_episodes, seed)]
    log = respond(run, args, batch, args.temperature)
    return before, log, in_micro_batches(response_probs, run.policy, log, *LIMITS)


@torch.no_grad()
def run(kind, keys):
    """The rows of these KEYS, one noise's and one seed's, on one log."""
    flags, seed = keys[0][-2:]
    begin, (before, log, probs) = time.process_time(), log_of(seed)
    (run, args), rows = start(flags, seed), []
    batch = run.data[batch_rows(len(run.data), 0, args.total_episodes, seed)]
    scores, _ = judge(run, args, batch, log)
    for price, group in itertools.groupby(keys, lambda key: key[3:5]):
        torch.manual_seed(seed)
        critic, advantages = fitted(run, args, log, scores, probs, *price)
        for key in group:
            torch.manual_seed(seed)
            after = extracted(run, args, log, advantages[key[1]], key[2])
            row = dict(zip(KEYS, key)) | {"noise": kind} | before
            row |= noise.evaluated(after, args, "after")
            row["after"] |= foresight(after, args, critic)
            rows.append(row | {"seconds": time.process_time() - begin})
    return rows


def settings_of(args):
    """[(method, advantage, temperature, alpha, radius)], those of one critic together."""
    prices = {"awr": [(0.0, 0.0)], "cql": [(alpha, 0.0) for alpha in args.alpha]}
    prices["rfqi"] = [(0.0, radius) for radius in args.radius]
    critics = [(method, price) for method in args.method for price in prices[method]]
    ways = itertools.product(critics, args.advantage, args.temperature)
    found = [(method, advantage, heat, *price) for (method, price), advantage, heat in ways]
    return [*dict.fromkeys(found)]


def print_tables(rows):
    """Accuracies; what was foreseen and then scored; how uneven: and each minus awr's."""
    label = "{method} {alpha:g} {radius:g} {advantage} at {temperature:g}".format_map
    kinds, names = sorted({row["noise"] for row in rows}), sorted({*map(label, rows)})
    found = dict.fromkeys(itertools.product(kinds, names), {})
    found |= by_seed(rows, lambda row: (row["noise"], label(row)))
    found |= noise.averaged(found)
    for columns in COLUMNS:
        noise.print_table(noise.summarise(found, names[0], columns), names[0], columns)


def found_rows():
    """{its KEYS: row} of the file."""
    known = {"method": lambda name: name in METHODS, "noise": lambda name: name in noise.NOISES}
    rows = read_results(FOUND, *KEYS, "noise", "before", "after", **known)
    return {tuple(row[key] for key in KEYS): row for row in rows}


def run_and_print(args):
    """Runs what the file lacks, a task for each noise and seed, and prints the tables."""
    found, asked, todo = found_rows(), set(), []
    for seed, kind in itertools.product(*map(dict.fromkeys, (args.seeds, args.noise))):
        flags = noise.flags_of("main", "ppo", kind)
        keys = [(*own, flags, seed) for own in settings_of(args)]
        asked.update(keys)
        if lacks := [key for key in keys if key not in found]:
            todo.append((kind, lacks))
    failed = 0 if args.table else scripts.add_runs(run, todo, args.jobs, FOUND)
    rows = [row for key, row in found_rows().items() if key in asked]
    if rows:
        print_tables(rows)
    elif not failed:
        raise InputError("expected finished runs of these methods and seeds, found none")
    return failed


def main():
    parser = scripts.new_parser(__doc__)
    add, kinds = functools.partial(parser.add_argument, nargs="+"), [*noise.NOISES]
    add("--method", choices=METHODS, default=METHODS)
    add("--noise", choices=kinds, default=kinds)
    add("--seeds", type=number_in("[0, 2e9]", int), default=range(20, 30), help="choosing: 100 on")
    add("--advantage", choices=("return", "q"), default=["return"])
    add("--temperature", type=number_in("(0, inf)", float), default=[0.3])
    add("--alpha", type=number_in("[0, inf)", float), default=[0.1], help="cql's price")
    add("--radius", type=number_in("[0, 1]", float), default=[0.03], help="rfqi's ball")
    scripts.add_grid_flags(parser)
    scripts.run_script(parser, run_and_print)


if __name__ == "__main__":
    main()

"""How evenly a policy is right: accuracy by the number of turns and of changes of mind.

For the built-in dialogues. noise.py and offline.py add it to each row.
"""

import torch

from harness.reports import evaluate


def by_stratum(prompts, scores):
    """{"3 turns", "1 changes" (of mind): [right, prompts]}; `book` is no turn."""
    found = {}
    for prompt, score in zip(prompts, scores.tolist()):
        slots = [turn["content"].split()[0] for turn in prompt[:-1] if turn["role"] == "user"]
        for key in (f"{len(slots)} turns", f"{len(slots) - len(set(slots))} changes"):
            right, count = found.get(key, (0, 0))
            found[key] = [right + score, count + 1]
    return found


def unevenness(strata, name):
    """The standard deviation of accuracy over the strata of that name, weighted by prompts."""
    right, count = torch.tensor([own for key, own in strata.items() if key.endswith(name)]).T
    error = right / count - right.sum() / count.sum()
    return (error.square() @ count / count.sum()).sqrt().item()


def evaluated(run, args, when):
    """Mean scores without noise; greedy ones of both domains by stratum, and how uneven."""
    scores, _ = evaluate(run, args)
    prompts = [prompt for data in run.evals.values() for prompt in data["prompt"]]
    strata = by_stratum(prompts, torch.cat([scores[f"{name}, greedy"] for name in run.evals]))
    means = {name: own.mean().item() for name, own in scores.items()}
    means |= {f"uneven {name}": unevenness(strata, name) for name in ("turns", "changes")}
    return {when: means, f"strata {when}": strata}

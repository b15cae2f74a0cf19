"""Mutation check: does some test fail for every small change of the code? One change at a time, in a copy, against the file's test module.

    python experiments/mutants.py critic.py risk.py dvpo.py     # all of them; about 25 minutes on one core
    python experiments/mutants.py dvpo.py:120-180               # only those in these lines

Prints the mutants that no test kills. Each must stand in ACCEPTED with the reason why it may live, or the exit status is 1.
Not changed: docstrings, messages, annotations, names in strings. The slow fits (SLOW) are left out: what is killed, a quick test kills.
Runs are forks of one process that has torch and pytest loaded: Linux or macOS.
"""

import argparse
import ast
import itertools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import datasets  # noqa: F401  (these are loaded here once, for the forks)
import hypothesis
import pytest
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401
from tqdm import tqdm

ROOT, TIMEOUT = Path(__file__).parent.parent, 120
SLOW = {"risk.py": "not tail_contracts and not off_the_targets_own"}  # pytest -k; 3 to 10 seconds each
PAIRS = "+ -|* /|< <=|> >=|== !=|and or|min max|amin amax|minimum maximum|mean sum|any all|_lowest _highest|lower_tail_mean upper_tail_mean"
SWAPS = dict(pair for words in PAIRS.split("|") for pair in (words.split(), words.split()[::-1]))
SWAPS |= {"&": "|", "|": "&", "//": "*", "%": "//", "**": "*", "<<": ">>", "is": "is not", "is not": "is", "in": "not in"}
SWAPS |= {"ceil": "floor", "expm1": "exp", "zeros_like": "ones_like", "no_grad": "enable_grad"}
DROPPED = {"detach", "abs", "square", "sqrt", "rsqrt", "flip", "float", "double", "clamp", "contiguous", "to"}
OPERATOR = re.compile(r"is not|not in|//|\*\*|<<|[<>=!]=|[-+*/%&|<>@]|and|or|is|in")
FLAT = "the tensor has two dimensions here (levels: one), so that 1 means what -1 means"
MASKED = "what stands off the mask is masked once more below"
ACCEPTED = {  # file: (reason, mutated lines ...)
    "critic.py": [
        ("how many numbers at a time: speed and memory only",
         'CHUNK_SIZE = {"cpu": 3**16, "gpu": 2**23}  # numbers per row block of quantile_huber_loss',
         'CHUNK_SIZE = {"cpu": 2*16, "gpu": 2**23}  # numbers per row block of quantile_huber_loss',
         'CHUNK_SIZE = {"cpu": 2**17, "gpu": 2**23}  # numbers per row block of quantile_huber_loss',
         'CHUNK_SIZE = {"cpu": 2**16, "gpu": 3**23}  # numbers per row block of quantile_huber_loss',
         'CHUNK_SIZE = {"cpu": 2**16, "gpu": 2*23}  # numbers per row block of quantile_huber_loss',
         'CHUNK_SIZE = {"cpu": 2**16, "gpu": 2**24}  # numbers per row block of quantile_huber_loss'),
        ("both branches and their slopes agree at |u| = kappa",
         "distance = torch.where(distance < kappa, u.square() / (2 * kappa), distance - kappa / 2)  # H_kappa(u) / kappa"),
        ("u = 0 has distance 0 and slope 0, whatever its weight",
         "return ((levels.unsqueeze(-1) - (u <= 0).to(u.dtype)).abs() * distance).mean(dim=(-2, -1))"),
        ("more steps or more padding by infinity than the search needs",
         "step = 2 << (targets.shape[-1].bit_length() - 1)",
         "padded = nn.functional.pad(targets, (0, 3 * step - 1 - targets.shape[-1]), value=torch.inf)",
         "padded = nn.functional.pad(targets, (0, 2 * step + 1 - targets.shape[-1]), value=torch.inf)",
         "padded = nn.functional.pad(targets, (0, 2 * step - 1 + targets.shape[-1]), value=torch.inf)"),
        ("fp32 minus fp64 is fp64 already", "y, q, levels = y - centre, quantiles - centre, levels.double()"),
        ("1 - level is then rounded to fp32, 6e-8: less than the result's own rounding", "y, q, levels = y - centre, quantiles.double() - centre, levels"),
        ("sum_y[-1] is then 0, and it is 0 but for rounding: the targets are centred",
         "sum_y, sum_yy = (nn.functional.pad(x.cumsum(dim=-1), (1, 1)) for x in (y, y.square()))  # [i]: over the i smallest targets"),
        ("kappa = 0: only targets equal to q are near it, at distance 0", "corner = 1 / kappa if kappa > 0 else 1.0"),
        ("start.repeat makes the same of a number", "start = returns.mean(0, keepdim=False) if len(self.levels) == 1 else returns.quantile(self.levels)"),
        ("the same hidden states, and a cache that nobody reads",
         "output = self.trunk(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=True)"),
        ("a Linear's weights are contiguous",
         'save_file({name: value for name, value in self.heads.state_dict().items()}, Path(folder) / "critic_heads.safetensors")'),
        ("layout of a file", '(Path(folder) / "critic_config.json").write_text(json.dumps(self.settings, indent=3) + "\\n")'),
        (FLAT,
         "return ((levels.unsqueeze(1) - (u < 0).to(u.dtype)).abs() * distance).mean(dim=(-2, -1))",
         "step = 1 << (targets.shape[1].bit_length() - 1)",
         "padded = nn.functional.pad(targets, (0, 2 * step - 1 - targets.shape[1]), value=torch.inf)",
         "count.add_(padded[:, step - 1 :].gather(1, count) < edges, alpha=step)",
         "y = targets.double().sort(dim=1).values",
         "centre = y.mean(dim=1, keepdim=True)  # centred: differences of large sums lose digits",
         "sum_y, sum_yy = (nn.functional.pad(x.cumsum(dim=1), (1, 0)) for x in (y, y.square()))  # [i]: over the i smallest targets",
         "far_above = count_below(-y.flip(1), -q - kappa)",
         "high = y.shape[1] - far_above  # targets from `high` on lie more than kappa above q",
         "total, squares = (sums.gather(1, end) - sums.gather(-1, start) for sums in (sum_y, sum_yy))",
         "total, squares = (sums.gather(-1, end) - sums.gather(1, start) for sums in (sum_y, sum_yy))",
         "below += low * (q - kappa / 2) - sum_y.gather(1, low)",
         "above += sum_y[..., -1:] - sum_y.gather(1, high) - far_above * (q + kappa / 2)",
         "scale = y.shape[1] * q.shape[-1]",
         "scale = y.shape[-1] * q.shape[1]",
         "return loss.sum(dim=1) / scale, slope / scale"),
    ],
    "risk.py": [("zero times the mean is zero times the sum", "return q.mean(dim=-1) * 0")],
    "dvpo.py": [
        ("torch.where takes the other branch where the divisor is 0 or -1", "variance = centred.square().sum() / (count - 1)",
         "return torch.where(mask, mask.sum() / (lengths > 0).sum() / lengths.clamp(min=1), 0)",
         "return torch.where(mask, mask.sum() / (lengths > 0).sum().clamp(min=1) / lengths, 0)"),
        ("how many numbers at a time: speed and memory only",
         "def token_logprobs(logits, ids, temperature, chunk_size=3**24):",
         "def token_logprobs(logits, ids, temperature, chunk_size=2*24):",
         "def token_logprobs(logits, ids, temperature, chunk_size=2**25):"),
        ("nothing in a chunk is random: keeping the generator's state costs time only",
         "logprobs = torch.cat([checkpoint(chunk_logprobs, *chunk, use_reentrant=False, preserve_rng_state=True) for chunk in chunks])"),
        (MASKED,
         "rewards = torch.where(mask, rewards, 1).unsqueeze(-1)",
         "log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 1)  # where, not *: 0 * NaN is NaN",
         "advantages = torch.where(mask, advantages.detach(), 1)",
         "head_quantiles = torch.where(mask[..., None, None], head_quantiles, 1)",
         "targets = torch.where(mask[..., None], targets.detach(), 1)"),
        ("all of it is summed below", "crossing = (unsorted.diff(dim=-1) < 0).float().sum(dim=-2) / max(num_quantiles - 1, 1)"),
        ("the loop writes every slot", "advantages = torch.ones_like(quantiles)"),
        ("a floor without dimensions does not change the scores' dtype", "return scores.clamp(min=scores.float().quantile(level))"),
        ("distributional_gae asserts the same of the heads' mean",
         'rewards.shape == mask.shape == head_values.shape[:2], f"rewards {tuple(rewards.shape)}, head_values {tuple(head_values.shape)}"'),
        ("the targets of zero quantiles are the advantages",
         "return distributional_gae(rewards, torch.zeros_like(rewards).unsqueeze(-1), mask, gamma, 1.0)[1].squeeze(-1)"),
        ("a sum of True is a count, and its quotient fp32 too",
         '"clipfrac": masked_mean((clipped > unclipped), mask, num_tokens),',
         "crossing = (unsorted.diff(dim=-1) < 0).sum(dim=-1) / max(num_quantiles - 1, 1)",
         '"coverage": ((returns >= low) & (returns <= high)),'),
        (FLAT,
         "next_quantiles = next_advantage if bootstrap is None else bootstrap.sort(dim=1).values",
         "last = at_last_token(quantiles, mask).sort(dim=1).values",
         "floor = last[..., tail_size(last.shape[1], level) - 1]",
         "after = None if bootstrap is None else bootstrap.amin(dim=1, keepdim=True)",
         "q = unsorted.sort(dim=1).values",
         "mean, num_quantiles = q.mean(dim=1), q.shape[-1]",
         "mean, num_quantiles = q.mean(dim=-1), q.shape[1]",
         "crossing = (unsorted.diff(dim=1) < 0).float().sum(dim=-1) / max(num_quantiles - 1, 1)",
         "crossing = (unsorted.diff(dim=-1) < 0).float().sum(dim=1) / max(num_quantiles - 1, 1)",
         '"std": q.std(dim=1, unbiased=False),'),
    ],
}  # fmt: skip


def operands(node):
    match node:
        case ast.BinOp(left=left, right=right) | ast.AugAssign(target=left, value=right):
            return [left, right]
        case ast.BoolOp(values=values):
            return values
        case ast.Compare(left=left, comparators=others):
            return [left, *others]
    return []


def changes_at(node, span):
    match node:
        case ast.UnaryOp():
            yield span(node)[0], span(node)[0] + (4 if isinstance(node.op, ast.Not) else 1), ""
        case ast.Constant(value=bool()):
            yield *span(node), str(not node.value)
        case ast.Constant(value=int() | float()):
            yield *span(node), repr(node.value + 1)
        case ast.Raise() | ast.Assert():  # without the word, only the expression is left
            yield span(node)[0], span(node)[0] + len("raise " if isinstance(node, ast.Raise) else "assert "), ""
        case ast.Attribute(attr="values", value=ast.Call(func=ast.Attribute(attr="sort") as sort)):
            yield span(sort)[1] - len(".sort"), span(node)[1], ""
        case (ast.Attribute(attr=name) | ast.Name(id=name)) if name in SWAPS:
            yield span(node)[1] - len(name), span(node)[1], SWAPS[name]
        case ast.keyword(arg="min" | "max"):  # clamp's
            yield span(node)[0], span(node)[0] + 3, SWAPS[node.arg]
        case ast.Call(func=ast.Attribute(attr=name)) if name in DROPPED:
            yield span(node.func)[1] - len(name) - 1, span(node)[1], ""


def changes(source):
    """Every single change of a module, in order: (start, end, new text), offsets into the source."""
    starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
    span = lambda node: (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
    todo, found = [ast.parse(source)], []
    while todo:
        node = todo.pop()
        todo += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.JoinedStr)]
        found += changes_at(node, span)
        for left, right in itertools.pairwise(operands(node)):
            token = OPERATOR.search(source, span(left)[1], span(right)[0])
            found += [(*token.span(), SWAPS[token[0]])] if token[0] in SWAPS else []
    return sorted(found)


def run_pytest(folder, name):
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.dont_write_bytecode = True  # two mutants of one second and one size would share a .pyc
    quick = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=quick)
    hypothesis.settings.load_profile("mutants")
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", SLOW.get(name, ""), f"tests/test_{name}"]))


def survives(folder, name):
    run = multiprocessing.get_context("fork").Process(target=run_pytest, args=(folder, name))
    run.start()
    run.join(TIMEOUT)
    run.kill()
    run.join()
    return run.exitcode == 0


def check(folder, name, first=1, last=10**9):
    """Tries the mutants of one file; returns how many survive without being accepted."""
    source, reasons = (ROOT / name).read_text(), {line: why for why, *lines in ACCEPTED.get(name, []) for line in lines}
    if not survives(folder, name):
        sys.exit(f"mutants.py: tests/test_{name} fails without any mutant")
    line_of = lambda offset: source.count("\n", 0, offset) + 1
    mutants, survivors = [change for change in changes(source) if first <= line_of(change[0]) <= last], []
    for start, end, new in tqdm(mutants, name):
        (folder / name).write_text(source[:start] + new + source[end:])
        if survives(folder, name):
            number = line_of(start)
            before, after = (text.splitlines()[number - 1].strip() for text in (source, (folder / name).read_text()))
            survivors.append(after)
            tqdm.write(f"{name}:{number}: {reasons.get(after, 'NOT ACCEPTED')}\n  - {before}\n  + {after}")
    (folder / name).write_text(source)
    wrong = sum(after not in reasons for after in survivors)
    print(f"{name}: {len(mutants)} mutants, {len(mutants) - len(survivors)} killed, {len(survivors) - wrong} survivors accepted, {wrong} not")
    if (first, last) == (1, 10**9):
        for line in reasons.keys() - set(survivors):
            print(f"  in ACCEPTED, but no survivor: {line}")
    return wrong


def part(text):
    found = re.fullmatch(r"(\w+\.py)(?::(\d+)-(\d+))?", text)
    if not found or not all((ROOT / path).exists() for path in (found[1], f"tests/test_{found[1]}")):
        raise argparse.ArgumentTypeError(f"expected a file with a test module, dvpo.py or dvpo.py:120-180, found {text!r}")
    return found[1], *map(int, filter(None, found.groups()[1:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", type=part, metavar="FILE[:FIRST-LAST]")
    parts = parser.parse_args().parts
    with tempfile.TemporaryDirectory() as temporary:
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml", *ROOT.glob("tests/*.py"), *ROOT.glob("experiments/*.py")]:
            copy = Path(temporary) / path.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
        sys.exit(sum(check(Path(temporary), *each) for each in parts) > 0)

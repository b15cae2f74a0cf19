"""train.py on several GPUs: its own functions, on PyTorch's own engine (torchrun, FSDP2).

    torchrun --nproc-per-node 4 experiments/many_gpus.py [train.py's flags]

Every process runs train.train. It samples and scores its share of the prompts, and then holds the
whole batch, of which it reads its share of micro-batches. More: docs/many-gpus.md.
"""

import contextlib
import copy
import dataclasses
import functools
import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

import rollout
import train
from harness import checkpoints, reports
from harness.gpu import half_copy
from tasks import InputError, one_line

# What a single process calls: functions below take the place of some.
one = SimpleNamespace(**vars(checkpoints) | vars(train))
signals = SimpleNamespace()
RANK = int(os.environ.get("RANK", 0))


def sample_share(run, args, batch, rank, world):
    """One process's part of a batch, sampled and scored by random numbers of its own."""
    size, number = len(batch["prompt"]), world * run.iteration + rank
    part = slice(rank * size // world, (rank + 1) * size // world)
    own = {name: column[part] for name, column in batch.items()}
    run = dataclasses.replace(run, policy=run.sampler, trust_recorded=False)
    # Not by the number that the responses get.
    run.noise.manual_seed(2**32 + 1_000_003 * args.reward_noise_seed + number)
    with torch.random.fork_rng(devices=[]):
        transformers.set_seed((1_000_003 * args.seed + number) % 2**32)
        found, *scores = one.sample_and_score(run, args, own)
    fields = (found.input_ids, found.attention_mask, found.mask, found.truncated, *scores)
    return [field.cpu() for field in fields]


def together(shares, device):
    """The shares of all processes, as train.sample_and_score gives a batch."""
    fields = [[row for part in parts for row in part] for parts in zip(*shares)]
    wide = [rollout.padded(rows, 0, device) for rows in fields[:3]]
    truncated, *scores = [torch.stack(rows).to(device) for rows in fields[3:]]
    return rollout.Rollout(*wide, truncated), *scores


def sample_and_score(run, args, batch):
    shares = [None] * dist.get_world_size()
    own = sample_share(run, args, batch, RANK, len(shares))
    dist.all_gather_object(shares, own)
    return together(shares, run.policy.device)


def micro_batches(*arguments):
    """This process's share, as many as the others': a sharded model computes with all of them."""
    groups, world = one.micro_batches(*arguments), dist.get_world_size()
    while len(groups) % world:
        largest = max(range(len(groups)), key=lambda index: len(groups[index]))
        groups[largest : largest + 1] = groups[largest].chunk(2)
    return groups[RANK::world]


def in_micro_batches(*arguments):
    result = one.in_micro_batches(*arguments)
    # It was 0 in the rows of other processes.
    dist.all_reduce(result)
    return result


def minibatch_backward(*arguments):
    sums = one.minibatch_backward(*arguments)
    for value in sums.values():
        dist.all_reduce(value)
    return sums


def shard(model, optimizer):
    """Shards a model, layer by layer, and what its optimiser has learnt."""
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    for part in [*max(lists, key=len, default=()), model]:
        fully_shard(part, reshard_after_forward=True)
        # Sums over processes, not means: the losses are divided by the minibatch's tokens.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    group = optimizer.param_groups[0]
    whole, group["params"] = group["params"], [*model.parameters()]
    for before, parameter in zip(whole, group["params"]):
        for name, value in optimizer.state.pop(before, {}).items():
            if value.dim() > 0:
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][name] = value


def start_at(critic, optimizer, returns):
    """QuantileCritic.start_at, which could not write to shards; then, shards."""
    type(critic).start_at(critic, returns)
    shard(critic, optimizer)


def join(args):
    """Meets the other processes that torchrun has started; each takes a GPU, if there are any."""
    if "LOCAL_RANK" not in os.environ:
        raise InputError("expected torchrun --nproc-per-node K, found a single process")
    backend = "gloo"
    if torch.cuda.is_available() and args.device != "cpu":
        # Whatever the flag says: a resumed run's is the first process's.
        args.device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(args.device)
    if not dist.is_initialized():
        # They wait while the first one evaluates.
        dist.init_process_group(backend, timeout=timedelta(days=7))
    size, world = args.batch_size // args.num_mini_batches, dist.get_world_size()
    if size % world:
        expected = f"expected minibatches of a multiple of {world} responses"
        raise InputError(f"--num-mini-batches: {expected}, found {size}")


def start(args, num_iterations):
    """A Run to evaluate. run.sharded: what learns. run.whole: what the first process saves from."""
    join(args)
    # The others look into the folder when the first one has put it in order.
    if RANK != 0:
        dist.barrier()
    run = one.start(args, num_iterations)
    if RANK == 0:
        dist.barrier()
    run.sampler = half_copy(run.policy) if run.half else copy.deepcopy(run.policy)
    run.sharded, run.whole = dataclasses.replace(run), {}
    for name, optimizer in {"policy": "optimizer", "critic": "critic_optimizer"}.items():
        model = vars(run)[name]
        if model is not None:
            run.whole[name] = copy.deepcopy(model).cpu()
            run.whole[optimizer] = torch.optim.AdamW(run.whole[name].parameters())
            if model is run.critic and run.iteration == 0:
                model.start_at = functools.partial(start_at, model, vars(run)[optimizer])
            else:
                shard(model, vars(run)[optimizer])
    if RANK != 0:
        run.whole = dict.fromkeys(run.whole)
    run.policy = run.sampler
    return run


def iterate(run, args):
    metrics = one.iterate(run.sharded, args)
    for own, new in zip(run.sampler.parameters(), run.sharded.policy.parameters()):
        own.data.copy_(new.detach().full_tensor())
    run.iteration = run.sharded.iteration
    # All stop after the same iteration.
    said = [signals.received]
    dist.broadcast_object_list(said)
    signals.agreed += said[0]
    return metrics


def save_checkpoint(run, args):
    """train.py's own checkpoint, put together by all processes and written by the first one."""
    for name, part in run.whole.items():
        state = vars(run.sharded)[name].state_dict()
        state = tree_map_only(DTensor, lambda value: value.full_tensor().cpu(), state)
        if RANK == 0:
            part.load_state_dict(state)
    if RANK == 0:
        return one.save_checkpoint(dataclasses.replace(run.sharded, **run.whole), args)


@contextlib.contextmanager
def stopping_on_signals():
    with one.stopping_on_signals() as signals.received:
        signals.agreed = []
        yield signals.agreed


def take_places():
    """Puts the functions of this file in their places; only the first process speaks and writes."""
    for own in (start, iterate, sample_and_score, in_micro_batches, minibatch_backward):
        setattr(train, own.__name__, own)
    train.micro_batches = rollout.micro_batches = micro_batches
    checkpoints.save_checkpoint = save_checkpoint
    checkpoints.stopping_on_signals = stopping_on_signals
    if RANK != 0:
        nothing = lambda *arguments: (None, None)
        reports.evaluate = reports.log_iteration = reports.report = nothing
        checkpoints.try_saving = checkpoints.begin = nothing
        reports.open_log = lambda *arguments: contextlib.nullcontext()
        checkpoints.alone_in, checkpoints.STOPPING = contextlib.nullcontext, b""
        sys.stdout = open(os.devnull, "w")


def main(argv=None):
    take_places()
    try:
        return train.main(argv)
    except RuntimeError as error:
        # As a rule, another process has ended.
        found = f"many_gpus.py: process {RANK}: {one_line(error)}"
        print(f"{found}; the last checkpoint stays: --resume", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # The group would wait for a lost member at the interpreter's end.
    os._exit(status)

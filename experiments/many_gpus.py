"""train.py on several GPUs: its own functions, on PyTorch's own engine (torchrun, FSDP2).

    torchrun --nproc-per-node 4 experiments/many_gpus.py [train.py's flags]

Every process holds the whole batch and works on its share: of the sampling, of each scoring pass,
of each minibatch. Policy and critic are sharded; sampler and reference are whole on every GPU.
Checkpoints are train.py's: either program goes on from them. More: docs/many-gpus.md.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import os
import sys
import time
from pathlib import Path

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
from harness import checkpoints, reports, setup
from tasks import InputError, one_line

# What single processes call; below are functions of the same names that take their place.
ONE = {"respond": setup.respond, "judge": setup.judge, "micro_batches": rollout.micro_batches}
ONE |= {"in_micro_batches": rollout.in_micro_batches}
ONE |= {"minibatch_backward": train.minibatch_backward, "clip_grad_norm_": train.clip_grad_norm_}


def unsharded(run):
    """A Run that one process can use alone: its policy is the sampler."""
    return dataclasses.replace(run, policy=run.sampler)


def sample_share(run, args, batch, rank, world, *rest, **kwargs):
    """The fields of one process's Rollout, on the CPU, by random numbers of its own."""
    size = len(batch["prompt"])
    part = slice(rank * size // world, (rank + 1) * size // world)
    with torch.random.fork_rng():
        torch.manual_seed(1_000_003 * args.seed + world * run.iteration + rank)
        own = {name: column[part] for name, column in batch.items()}
        share = ONE["respond"](unsharded(run), args, own, *rest, **kwargs)
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, [*vars(share).values()])


def together(shares, device):
    """The shares of several processes as one Rollout."""
    fields = []
    for parts in zip(*shares):
        fields.append(None if parts[0] is None else [row for part in parts for row in part])
    *wide, truncated, _, logprobs, messages = fields
    wide = [rollout.padded(rows, 0, device) for rows in wide]
    logprobs = logprobs and rollout.padded(logprobs, 0.0, device)
    return rollout.Rollout(*wide, torch.stack(truncated).to(device), None, logprobs, messages)


def respond(run, args, batch, *rest, **kwargs):
    shares = [None] * dist.get_world_size()
    own = sample_share(run, args, batch, dist.get_rank(), len(shares), *rest, **kwargs)
    dist.all_gather_object(shares, own)
    return together(shares, run.policy.device)


def judge(run, args, batch, responses):
    """One process asks the reward: it may be a paid service, or draw random numbers."""
    found = [None, None]
    if dist.get_rank() == 0:
        scores = ONE["judge"](run, args, batch, responses)
        found = [[part.cpu() for part in scores], torch.get_rng_state()]
    dist.broadcast_object_list(found)
    # All processes go on with the same random numbers: they cut the same minibatches.
    torch.set_rng_state(found[1])
    return [scores.to(responses.mask.device) for scores in found[0]]


def micro_batches(responses, rows, *limits):
    """This process's share, as many as the others': a sharded model computes with all of them."""
    groups, world = ONE["micro_batches"](responses, rows, *limits), dist.get_world_size()
    while len(groups) % world:
        largest = max(range(len(groups)), key=lambda index: len(groups[index]))
        groups[largest : largest + 1] = groups[largest].chunk(2)
    return groups[dist.get_rank() :: world]


def in_micro_batches(*arguments):
    result = ONE["in_micro_batches"](*arguments)
    # It was 0 in the rows of other processes.
    dist.all_reduce(result)
    return result


def minibatch_backward(*arguments):
    sums = ONE["minibatch_backward"](*arguments)
    values = torch.stack([*sums.values()])
    dist.all_reduce(values)
    return dict(zip(sums, values))


def clip_grad_norm_(*arguments):
    return ONE["clip_grad_norm_"](*arguments).full_tensor()


def sharded_like(parameter, value):
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def shard(model, optimizer):
    """Shards a model, layer by layer -> its optimiser, with what the old one has learnt."""
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    for part in [*max(lists, key=len, default=()), model]:
        fully_shard(part)
        # Sums over processes, not means: the losses are divided by the minibatch's tokens.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    sharded = torch.optim.AdamW(model.parameters())
    sharded.load_state_dict(optimizer.state_dict())
    for parameter, state in sharded.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = sharded_like(parameter, value)
    return sharded


def shard_run(run):
    """Shards a Run's models -> those and their optimisers whole, on the CPU, to save from."""
    if run.sampler is run.policy:
        # In fp32.
        run.sampler = copy.deepcopy(run.policy).requires_grad_(False)
    parts, whole = vars(run), {}
    for name, optimizer in {"policy": "optimizer", "critic": "critic_optimizer"}.items():
        if parts[name] is not None:
            whole[name] = copy.deepcopy(parts[name]).cpu()
            whole[optimizer] = torch.optim.AdamW(whole[name].parameters())
            parts[optimizer] = shard(parts[name], parts[optimizer])
    if run.critic is not None:
        run.critic.start_at = functools.partial(start_at, run.critic, whole["critic"])
    refresh(run)
    return whole


@torch.no_grad()
def start_at(critic, whole, returns):
    """QuantileCritic.start_at, for sharded heads."""
    whole.start_at(returns.cpu())
    start = whole.heads.bias.detach().to(returns.device)
    critic.heads.bias.copy_(sharded_like(critic.heads.bias, start))
    critic.scale.copy_(whole.scale)


@torch.no_grad()
def refresh(run):
    """Gives every process's sampler the policy's weights."""
    for own, new in zip(run.sampler.parameters(), run.policy.parameters()):
        own.copy_(new.full_tensor())


def save(run, args, whole):
    """train.py's own checkpoint, put together by all processes and written by the first one."""
    for name, part in whole.items():
        state = vars(run)[name].state_dict()
        state = tree_map_only(DTensor, lambda value: value.full_tensor().cpu(), state)
        if dist.get_rank() == 0:
            part.load_state_dict(state)
    folder = None
    if dist.get_rank() == 0:
        folder = checkpoints.save_checkpoint(dataclasses.replace(run, **whole), args)
    dist.barrier()
    return folder


def agreed(received):
    """The signals that have reached any process."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, received)
    received[:] = sum(found, [])
    return received


def start(args, num_iterations):
    """-> Run, log. The first process puts the folder in order before the others look into it."""
    if dist.get_rank() == 0:
        run = train.start(args, num_iterations)
        dist.barrier()
        return run, reports.open_log(run, args, num_iterations)
    dist.barrier()
    run = setup.build(args)
    transformers.set_seed(args.seed)
    if args.resume:
        checkpoints.resume(run, args)
    return run, contextlib.nullcontext()


def train_on_all(args):
    """train.train, with every process in it -> exit status."""
    join(args)
    is_first = dist.get_rank() == 0
    num_iterations = math.ceil(args.total_episodes / args.batch_size)
    run, log = start(args, num_iterations)
    whole = shard_run(run)
    with log as log, checkpoints.stopping_on_signals() as received, last_words():
        while run.iteration < num_iterations and not agreed(received):
            begin = time.time()
            experience, metrics = train.collect(run, args)
            metrics |= train.update(run, args, experience)
            run.iteration += 1
            metrics["tps"] = experience.rollout.mask.sum().item() / (time.time() - begin)
            refresh(run)
            if is_first:
                reports.log_iteration(log, unsharded(run), args, metrics)
            if args.save_steps and run.iteration % args.save_steps == 0:
                save(run, args, whole)
        folder = save(run, args, whole)
    if run.iteration < num_iterations:
        print(f"stopped after iteration {run.iteration}: --resume {args.output_dir} goes on")
        return 128 + received[0]
    if is_first:
        reports.report(unsharded(run), args, folder)
    return 0


def join(args):
    """Joins the processes that torchrun has started, and puts this file's functions in place."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        raise InputError("expected torchrun --nproc-per-node K, found a single process")
    if torch.cuda.is_available() and args.device == "auto":
        args.device = f"cuda:{rank}"
        torch.cuda.set_device(int(rank))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    size, world = args.batch_size // args.num_mini_batches, dist.get_world_size()
    if size % world:
        expected = f"expected minibatches of a multiple of {world} responses"
        raise InputError(f"--num-mini-batches: {expected}, found {size}")
    for name in ONE:
        setattr(train, name, globals()[name])
    rollout.micro_batches = micro_batches


@contextlib.contextmanager
def last_words():
    """Ends this process with a line, when it learns of another one's end: by a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        found = f"many_gpus.py: process {os.environ.get('RANK')}: {one_line(error)}"
        print(f"{found}; the last checkpoint stays: --resume", file=sys.stderr, flush=True)
        # The group would wait for its lost member at the interpreter's end.
        os._exit(1)


def main(argv=None):
    train.train = train_on_all
    if os.environ.get("RANK", "0") != "0":
        # The first process speaks for all, and holds the folder.
        sys.stdout, checkpoints.STOPPING = open(os.devnull, "w"), b""
        checkpoints.alone_in = contextlib.nullcontext
    with last_words():
        return train.main(argv)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)

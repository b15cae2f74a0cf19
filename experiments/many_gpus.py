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
from torch.utils._pytree import tree_map

import rollout
import train
from harness import checkpoints, reports, setup
from harness.flags import parse_args
from tasks import InputError, one_line

# What single processes call; below are functions of the same names that take their place.
ONE = {"respond": setup.respond, "judge": setup.judge, "micro_batches": rollout.micro_batches}
ONE |= {"in_micro_batches": rollout.in_micro_batches}
ONE |= {"minibatch_backward": train.minibatch_backward, "clip_grad_norm_": train.clip_grad_norm_}


def full(value):
    """A sharded tensor put together, by all processes at once; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def unsharded(run):
    """A Run that one process can use alone: its policy is the sampler."""
    return dataclasses.replace(run, policy=run.sampler)


def sample_share(run, args, batch, rank, world, *rest, **kwargs):
    """The responses to one process's part of a batch, by random numbers of its own."""
    size = len(batch["prompt"])
    part = slice(rank * size // world, (rank + 1) * size // world)
    with torch.random.fork_rng():
        torch.manual_seed(1_000_003 * args.seed + world * run.iteration + rank)
        own = {name: column[part] for name, column in batch.items()}
        return ONE["respond"](unsharded(run), args, own, *rest, **kwargs)


def together(parts, device):
    """The rollouts of several processes as one."""
    names = ("input_ids", "attention_mask", "mask", "truncated", "logprobs", "messages")
    rows = {}
    for name in names:
        found = [getattr(part, name) for part in parts]
        rows[name] = None if found[0] is None else [row for part in found for row in part]
    result = rollout.Rollout(
        *(rollout.padded(rows[name], 0, device) for name in names[:3]),
        torch.stack(rows["truncated"]).to(device),
        messages=rows["messages"],
    )
    if rows["logprobs"]:
        result.logprobs = rollout.padded(rows["logprobs"], 0.0, device)
    return result


def respond(run, args, batch, *rest, **kwargs):
    parts = [None] * dist.get_world_size()
    share = sample_share(run, args, batch, dist.get_rank(), len(parts), *rest, **kwargs)
    dist.all_gather_object(parts, share)
    return together(parts, run.policy.device)


def judge(run, args, batch, responses):
    """One process asks the reward: it may be a paid service, or draw random numbers."""
    found = [None, None]
    if dist.get_rank() == 0:
        try:
            found = [ONE["judge"](run, args, batch, responses), torch.get_rng_state()]
        except InputError as error:
            found[0] = error
    dist.broadcast_object_list(found)
    if isinstance(found[0], InputError):
        raise found[0]
    # All processes go on with the same random numbers: they cut the same minibatches.
    torch.set_rng_state(found[1])
    return tuple(scores.to(responses.mask.device) for scores in found[0])


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
    values = torch.stack([sums[name] for name in sorted(sums)])
    dist.all_reduce(values)
    return dict(zip(sorted(sums), values))


def clip_grad_norm_(parameters, max_norm):
    parameters = list(parameters)
    for parameter in parameters:
        # FSDP takes the mean over processes; ours are sums, over the minibatch's tokens.
        parameter.grad.mul_(dist.get_world_size())
    return full(ONE["clip_grad_norm_"](parameters, max_norm))


def shard(model, optimizer):
    """Shards a model, layer by layer -> its optimiser, with what the old one has learnt."""
    before = list(model.parameters())
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    for layer in max(lists, key=len, default=()):
        fully_shard(layer)
    fully_shard(model)
    sharded = torch.optim.AdamW(model.parameters())
    sharded.param_groups[0] |= {**optimizer.param_groups[0], "params": [*model.parameters()]}
    for old, new in zip(before, model.parameters()):
        for name, value in optimizer.state[old].items():
            if value.shape == new.shape:
                value = distribute_tensor(value, new.device_mesh, new.placements)
            sharded.state[new][name] = value
    return sharded


def shard_run(run):
    """Shards a Run's models -> {name: model as it was, on the CPU, to save from}."""
    if run.sampler is run.policy:
        # In fp32.
        run.sampler = copy.deepcopy(run.policy).requires_grad_(False)
    plain = {"policy": copy.deepcopy(run.policy).cpu()}
    run.optimizer = shard(run.policy, run.optimizer)
    if run.critic is not None:
        plain["critic"] = copy.deepcopy(run.critic).cpu()
        run.critic_optimizer = shard(run.critic, run.critic_optimizer)
        run.critic.start_at = functools.partial(start_at, run.critic, plain["critic"])
    return plain


@torch.no_grad()
def start_at(critic, plain, returns):
    """QuantileCritic.start_at, for sharded heads."""
    plain.start_at(returns.cpu())
    bias = critic.heads.bias
    start = plain.heads.bias.detach().to(returns.device)
    bias.copy_(distribute_tensor(start, bias.device_mesh, bias.placements))
    critic.scale.copy_(plain.scale)


def save(run, args, plain):
    """train.py's own checkpoint, put together by all processes and written by the first one."""
    found = {}
    for name, optimizer in {"policy": "optimizer", "critic": "critic_optimizer"}.items():
        if name in plain:
            state, moments = getattr(run, name).state_dict(), getattr(run, optimizer).state_dict()
            plain[name].load_state_dict({key: full(value) for key, value in state.items()})
            found[name] = plain[name]
            found[optimizer] = torch.optim.AdamW(plain[name].parameters())
            found[optimizer].load_state_dict(tree_map(full, moments))
    folder = None
    if dist.get_rank() == 0:
        folder = checkpoints.save_checkpoint(dataclasses.replace(run, **found), args)
    dist.barrier()
    return folder


@torch.no_grad()
def refresh(run):
    """Gives every process's sampler the policy's weights."""
    for own, new in zip(run.sampler.parameters(), run.policy.parameters()):
        own.copy_(full(new))


def agreed(received, device):
    """Whether a signal has reached any process."""
    asked = torch.tensor(float(bool(received)), device=device)
    dist.all_reduce(asked)
    return asked.item() > 0


def begin(args):
    """What train.train does before its loop -> Run, a log that only the first process keeps."""
    is_first = dist.get_rank() == 0
    if not is_first:
        # The first one makes the warm start, and puts the folder of a resumed run in order.
        dist.barrier()
    run = setup.build(args)
    transformers.set_seed(args.seed)
    if args.resume:
        checkpoints.resume(run, args)
    if is_first:
        dist.barrier()
    if is_first and not args.resume:
        checkpoints.try_saving(run, args)
        run.before, run.examples = reports.evaluate(run, args)
    if not is_first:
        return run, contextlib.nullcontext()
    num_iterations = math.ceil(args.total_episodes / args.batch_size)
    reports.announce(run, args, num_iterations)
    checkpoints.begin(run, args)
    return run, reports.open_log(run, args, num_iterations)


def train_on_all(args):
    """train.train, with every process in it -> exit status."""
    run, log = begin(args)
    plain, num_iterations = shard_run(run), math.ceil(args.total_episodes / args.batch_size)
    is_first = dist.get_rank() == 0
    refresh(run)
    with log as log, checkpoints.stopping_on_signals() as received:
        while run.iteration < num_iterations and not agreed(received, run.policy.device):
            start = time.time()
            experience, metrics = train.collect(run, args)
            metrics |= train.update(run, args, experience)
            run.iteration += 1
            refresh(run)
            metrics["tps"] = experience.rollout.mask.sum().item() / (time.time() - start)
            if is_first:
                reports.log_iteration(log, unsharded(run), args, metrics)
            if args.save_steps and run.iteration % args.save_steps == 0:
                save(run, args, plain)
        folder = save(run, args, plain)
    if run.iteration < num_iterations:
        print(f"stopped after iteration {run.iteration}: --resume {args.output_dir} goes on")
        return 130
    if is_first:
        reports.report(unsharded(run), args, folder)
    return 0


def join():
    """Joins the processes that torchrun has started, and puts this file's functions in place."""
    args, rank = parse_args(), os.environ.get("LOCAL_RANK")
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
    return args


def main():
    reports.quiet()
    try:
        args = join()
        lock = contextlib.nullcontext()
        if dist.get_rank() == 0:
            lock = checkpoints.alone_in(args.output_dir)
        with lock:
            return train_on_all(args)
    except (InputError, OSError) as error:
        print(f"many_gpus.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # So a process learns of another one's end.
        found = f"many_gpus.py: process {os.environ['RANK']}: {one_line(error)}"
        print(f"{found}; the last checkpoint stays: --resume", file=sys.stderr)
        return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # A process group that has lost a member would wait for it at the interpreter's end.
    os._exit(status)

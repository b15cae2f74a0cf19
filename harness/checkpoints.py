"""Saving a run, going on with it, and stopping it: whole checkpoints or none, bit for bit."""

import contextlib
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy
import torch
import transformers

from critic import QuantileCritic
from harness.setup import load
from tasks import InputError, naming, one_line

# What a child that a user's code forks must not have of ours; and its parent's masks meanwhile.
LOCK, SIGNALS, MASKS = contextlib.ExitStack(), contextlib.ExitStack(), []
STOPPING = b"\nstopping after this iteration, with a checkpoint; once more: at once\n"


def flushed(path):
    """A file or folder, on the disk and not only on its way there."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_whole(path, text):
    """Text in a file: all of it, or what stood there before."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    flushed(aside)
    os.replace(aside, path)


def checkpoints(output_dir):
    """{iteration: folder} of all checkpoints in a run's folder, oldest first."""
    paths = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return dict(sorted((int(path.name[11:]), path) for path in paths))


def newest_checkpoint(output_dir, flag="--resume"):
    """The folder of the newest checkpoint; raises InputError where there is none."""
    for folder in reversed(checkpoints(output_dir).values()):
        return folder
    raise InputError(f"{flag}: expected a checkpoint in {str(output_dir)!r}, found none")


def write_checkpoint(run, folder):
    """policy/ with the tokenizer, critic/, and in state.pt all else that going on needs."""
    state = {"iteration": run.iteration, "before": run.before, "examples": run.examples}
    state |= {"seconds": time.time() - run.start, "optimizer": run.optimizer.state_dict()}
    # Every generator, in types that torch.load reads safely; without a GPU, cuda is empty.
    name, keys, *rest = numpy.random.get_state()
    state["random"] = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    state["random"] |= {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    state["noise"] = run.noise.get_state()
    what = f"cannot save {folder.stem} in --output-dir, earlier ones are kept"
    with naming(what), contextlib.ExitStack() as torn:
        torn.callback(shutil.rmtree, folder, ignore_errors=True)
        run.policy.save_pretrained(folder / "policy")
        run.tokenizer.save_pretrained(folder / "policy")
        if run.critic is not None:
            run.critic.save_pretrained(folder / "critic")
            state["critic_optimizer"] = run.critic_optimizer.state_dict()
        torch.save(state, folder / "state.pt")
        for path in [*folder.rglob("*"), folder]:
            flushed(path)
        torn.pop_all()


def try_saving(run, args):
    """Writes a checkpoint and takes it away: what the end needs shall fail before the start."""
    folder = Path(args.output_dir) / "checkpoint-000000.tmp"
    write_checkpoint(run, folder)
    shutil.rmtree(folder)


def save_checkpoint(run, args):
    """Writes output_dir/checkpoint-ITERATION, whole or not at all, and keeps the newest two."""
    output_dir = Path(args.output_dir)
    folder = output_dir / f"checkpoint-{run.iteration:06d}"
    for left in output_dir.glob("checkpoint-[0-9]*.tmp"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    if folder.exists():
        return folder
    write_checkpoint(run, folder.with_suffix(".tmp"))
    flushed(output_dir / "metrics.jsonl")
    os.replace(folder.with_suffix(".tmp"), folder)
    flushed(output_dir)
    for path in [*checkpoints(output_dir).values()][:-2]:
        shutil.rmtree(path.rename(path.with_suffix(".tmp")))
    return folder


def restore(run, folder):
    """Puts back what write_checkpoint wrote."""
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    run.policy.load_state_dict(load(type(run.policy), folder / "policy", "policy").state_dict())
    run.optimizer.load_state_dict(state["optimizer"])
    if run.critic is not None:
        critic = QuantileCritic.from_pretrained(folder / "critic", type(run.critic.trunk))
        run.critic.load_state_dict(critic.state_dict())
        run.critic_optimizer.load_state_dict(state["critic_optimizer"])
    run.iteration, run.before, run.examples = state["iteration"], state["before"], state["examples"]
    run.start = time.time() - state["seconds"]
    run.noise.set_state(state["noise"])
    torch.set_rng_state(state["random"]["torch"])
    random.setstate(state["random"]["python"])
    numpy.random.set_state(state["random"]["numpy"])
    torch.cuda.set_rng_state_all(state["random"]["cuda"][: torch.cuda.device_count()])


def cut_log(path, iteration):
    """Cuts metrics.jsonl behind an iteration's line; raises InputError where one is missing."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    right = 0
    for line in lines[:iteration]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            right += line.endswith(b"\n") and json.loads(line)["iteration"] == right + 1
    if right < iteration:
        expected = f"expected {iteration} lines in {path}, one for each iteration"
        raise InputError(f"--resume: {expected}, found {right} such of {len(lines)}")
    os.truncate(path, sum(map(len, lines[:iteration])))


def resume(run, args):
    """Goes on from the newest checkpoint that loads, renames newer ones; InputError if none."""
    output_dir, failed = Path(args.output_dir), {}
    flags = output_dir / "args.json"
    saved = json.loads(flags.read_text()).get("data") if flags.exists() else None
    if saved not in (None, run.checksum):
        raise InputError(f"--resume: expected the data and tokenizer of {flags}, found others")
    for iteration, folder in reversed(checkpoints(output_dir).items()):
        try:
            restore(run, folder)
            if run.iteration != iteration:
                raise ValueError(f"the state after iteration {run.iteration}")
            break
        except Exception as error:
            failed[folder] = f"{folder}: expected a whole checkpoint, found: {one_line(error)}"
    else:
        # If none loads, it may be the flags or the machine: nothing is renamed.
        raise InputError(f"--resume: {[*failed.values(), newest_checkpoint(output_dir)][0]}")
    if (run.iteration - 1) * args.batch_size >= args.total_episodes:
        expected = f"expected at least {run.iteration * args.batch_size}, as many are done"
        raise InputError(f"--total-episodes: {expected}, found {args.total_episodes}")
    cut_log(output_dir / "metrics.jsonl", run.iteration)
    for broken, found in failed.items():
        shutil.rmtree(broken.with_suffix(".broken"), ignore_errors=True)
        print(f"{found}; now {broken.rename(broken.with_suffix('.broken')).name}", file=sys.stderr)
    results = output_dir / "results.json"
    if run.iteration * args.batch_size < args.total_episodes and results.exists():
        results.rename(output_dir / f"results-{[*failed, folder][0].name[11:]}.json")
    print(f"going on from {folder}")


def set_aside(output_dir):
    """Moves an earlier run's files to output_dir/earlier-K; the warm start stays for reuse."""
    names = ("args.json", "metrics.jsonl", "results[.-]*json", "checkpoint-*", "events.out.*")
    found = [path for name in names for path in output_dir.glob(name)]
    if found:
        folders = (output_dir / f"earlier-{number}" for number in itertools.count(1))
        earlier = next(folder for folder in folders if not folder.exists())
        earlier.mkdir()
        for path in found:
            path.rename(earlier / path.name)
        print(f"{output_dir} holds an earlier run: {len(found)} files moved to {earlier}")


def begin(run, args):
    """Moves an earlier run aside, and writes what --resume needs to know: args.json."""
    if not args.resume:
        set_aside(Path(args.output_dir))
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    flags = {"flags": {**vars(args), "resume": None}, "versions": about, "data": run.checksum}
    write_whole(Path(args.output_dir) / "args.json", json.dumps(flags, indent=2) + "\n")


def alone_in(folder):
    """-> A context in which no other process's run gets into a folder; a crash, too, ends it."""
    with naming("--output-dir: expected a folder, or a place for one"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(folder, os.O_RDONLY)
        LOCK.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        LOCK.close()
        raise InputError(f"--output-dir: expected no other run in {folder}, found one") from error
    except OSError:
        pass  # there are no locks here
    return LOCK


@contextlib.contextmanager
def stopping_on_signals():
    """While it lasts, Ctrl-C and SIGTERM are noted in a list; a second one ends the program."""
    received = []

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        os.write(2, STOPPING)

    with SIGNALS:
        with contextlib.suppress(ValueError):  # another thread may set no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, handler) or signal.SIG_DFL
                SIGNALS.callback(signal.signal, number, before)
        yield received


def hold_signals():
    """Before a fork, as one that comes before the child has let go would be lost."""
    MASKS.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def take_signals():
    signal.pthread_sigmask(signal.SIG_SETMASK, MASKS.pop())


def let_go():
    """In a forked child: signals end it as if we were not there, and the lock is its parent's."""
    SIGNALS.close()
    LOCK.close()
    take_signals()


os.register_at_fork(before=hold_signals, after_in_parent=take_signals, after_in_child=let_go)

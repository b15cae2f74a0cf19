"""Saving a run, going on with it, and stopping it: whole checkpoints or none, bit for bit."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy
import torch
import transformers

from critic import QuantileCritic
from harness.setup import load
from tasks import InputError, one_line


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


def newest_checkpoint(output_dir):
    """The folder of the newest checkpoint; raises InputError where there is none."""
    for folder in reversed(checkpoints(output_dir).values()):
        return folder
    found = "none" if output_dir.is_dir() else "no such folder"
    raise InputError(f"--resume: expected a checkpoint in {str(output_dir)!r}, found {found}")


def random_states():
    """Every generator that is not the run's own, in types that torch.load reads safely."""
    name, keys, *rest = numpy.random.get_state()
    numbers = (name, keys.tolist(), *rest)
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numbers}
    # An empty list where there is no GPU.
    return states | {"cuda": torch.cuda.get_rng_state_all()}


def write_checkpoint(run, folder):
    """policy/ with the tokenizer, critic/, and in state.pt all else that going on needs."""
    run.policy.save_pretrained(folder / "policy")
    run.tokenizer.save_pretrained(folder / "policy")
    state = {
        "iteration": run.iteration,
        "before": run.before,
        "examples": run.examples,
        "seconds": time.time() - run.start,
        "optimizer": run.optimizer.state_dict(),
        "critic_optimizer": None,
        "random": random_states(),
        "noise": run.noise.get_state(),
    }
    if run.critic is not None:
        run.critic.save_pretrained(folder / "critic")
        state["critic_optimizer"] = run.critic_optimizer.state_dict()
    torch.save(state, folder / "state.pt")


def save_checkpoint(run, args):
    """Writes output_dir/checkpoint-ITERATION, whole or not at all, and keeps the newest two."""
    output_dir = Path(args.output_dir)
    folder = output_dir / f"checkpoint-{run.iteration:06d}"
    aside = folder.with_suffix(".tmp")
    for left in [*output_dir.glob("checkpoint-*.tmp"), *output_dir.glob("checkpoint-*.old")]:
        # By a run that was killed.
        shutil.rmtree(left)
    if folder.exists():
        return folder
    try:
        write_checkpoint(run, aside)
        for path in [*aside.rglob("*"), aside, output_dir / "metrics.jsonl"]:
            flushed(path)
    except Exception as error:
        # A full disk, in each library's own words.
        shutil.rmtree(aside, ignore_errors=True)
        found = f"cannot write {folder.name}, earlier ones are kept; found: {one_line(error)}"
        raise InputError(f"--output-dir: {found}") from error
    os.replace(aside, folder)
    flushed(output_dir)
    for path in [*checkpoints(output_dir).values()][:-2]:
        shutil.rmtree(path.rename(path.with_suffix(".old")))
    return folder


def restore(run, folder):
    """Puts back what write_checkpoint wrote."""
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    policy = load(type(run.policy), folder / "policy", "policy")
    run.policy.load_state_dict(policy.state_dict())
    run.optimizer.load_state_dict(state["optimizer"])
    if run.critic is not None:
        load(type(run.critic.trunk), folder / "critic", "critic")  # is no weight missing?
        critic = QuantileCritic.from_pretrained(folder / "critic", type(run.critic.trunk))
        run.critic.load_state_dict(critic.state_dict())
        run.critic_optimizer.load_state_dict(state["critic_optimizer"])
    run.iteration, run.before, run.examples = state["iteration"], state["before"], state["examples"]
    run.start = time.time() - state["seconds"]
    run.noise.set_state(state["noise"])
    torch.set_rng_state(state["random"]["torch"])
    random.setstate(state["random"]["python"])
    numpy.random.set_state(state["random"]["numpy"])
    if len(state["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random"]["cuda"])


def cut_log(path, iteration):
    """Cuts metrics.jsonl behind an iteration's line; raises InputError where it ends before."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if b"".join(lines[:iteration]).count(b"\n") < iteration:
        expected = f"expected {iteration} lines in {path}, one for each iteration"
        raise InputError(f"--resume: {expected}, found {len(lines)}")
    if lines:
        os.truncate(path, sum(map(len, lines[:iteration])))


def resume(run, args):
    """Goes on from the newest checkpoint that loads, renames newer ones; InputError if none."""
    output_dir, failed = Path(args.output_dir), {}
    for folder in reversed(checkpoints(output_dir).values()):
        try:
            restore(run, folder)
            break
        except Exception as error:
            failed[folder] = f"{folder}: expected a whole checkpoint, found: {one_line(error)}"
    else:
        # If none loads, it may be the flags or the machine: nothing is renamed.
        raise InputError(f"--resume: {[*failed.values(), newest_checkpoint(output_dir)][0]}")
    cut_log(output_dir / "metrics.jsonl", run.iteration)
    for broken, found in failed.items():
        shutil.rmtree(broken.with_suffix(".broken"), ignore_errors=True)
        print(f"{found}; now {broken.rename(broken.with_suffix('.broken')).name}", file=sys.stderr)
    print(f"going on from {folder}")


def set_aside(output_dir):
    """Moves an earlier run's files to output_dir/earlier-K; the warm start stays for reuse."""
    names = ("args.json", "metrics.jsonl", "results.json", "checkpoint-*", "events.out.*")
    found = [path for name in names for path in output_dir.glob(name)]
    if found:
        folders = (output_dir / f"earlier-{number}" for number in itertools.count(1))
        earlier = next(folder for folder in folders if not folder.exists())
        earlier.mkdir()
        for path in found:
            path.rename(earlier / path.name)
        print(f"{output_dir} holds an earlier run: {len(found)} files moved to {earlier}")


def write_flags(args):
    """args.json: what --resume goes on with, and what the run was made with."""
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    flags = {"flags": {**vars(args), "resume": None}, "versions": about}
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    write_whole(Path(args.output_dir) / "args.json", json.dumps(flags, indent=2) + "\n")


@contextlib.contextmanager
def stopping_on_signals():
    """While it lasts, Ctrl-C and SIGTERM are noted in a list; a second one ends the program."""
    received, before = [], {}

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        os.write(2, b"\nstopping after this iteration, with a checkpoint; once more: at once\n")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)

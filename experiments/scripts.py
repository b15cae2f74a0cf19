"""What scripts of this folder share: flags, models, and runs of train.py, many at a time."""

import argparse
import concurrent.futures
import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from experiments.tables import add_row, check, read_rows
from harness.checkpoints import newest_checkpoint, restore
from harness.flags import number_in, parse_args
from harness.reports import quiet
from harness.setup import build, load
from tasks import InputError, naming

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = number_in("[1, inf)", int)


def new_parser(doc):
    """A parser of flags: --help begins with a script's first line, errors are one line."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    return parser


def add_grid_flags(parser):
    """Those of a script that runs many and prints a table."""
    parser.add_argument("--jobs", type=COUNT, default=1, help="at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing, print what there is")


def run_script(parser, function):
    """Calls function(flags) -> how many runs failed, or None; one line ends what cannot work."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_intermixed_args(words[:end])  # flags may stand between the others
    # argparse would take a -- for its own where nothing stands before it.
    if hasattr(args, "flags"):
        args.flags += words[end + 1 :]
    elif words[end + 1 :]:
        parser.error(f"expected nothing behind --, found {words[end + 1]}")
    quiet()
    try:
        failed = function(args)
    except InputError as error:
        parser.error(error)
    except OSError as error:
        names = [key for key, value in vars(args).items() if value and str(value) == error.filename]
        given = {word.split("=")[0] for word in words}
        flags = [f"--{name}" if f"--{name}" in given else name for name in names]
        parser.error(": ".join([*flags, str(error)]))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    if failed:
        parser.exit(1, f"{parser.prog}: {failed} failed\n")


def load_policy(name, flag):
    """A causal language model, on the GPU if there is one, and its tokenizer."""
    model = load(AutoModelForCausalLM, name, flag).to(DEVICE)
    return model, load(AutoTokenizer, name, flag)


def load_run(folder):
    """A finished run's Run and flags, as its newest checkpoint has it; its data are not checked."""
    args = parse_args([f"--resume={folder}"])
    run = build(args)
    restore(run, newest_checkpoint(Path(folder)))
    return run, args


def current_commit():
    """The short hash of what is checked out, with -dirty if the code is not just that."""
    # Not experiments/results: results may change while runs go on.
    pathspec = ["--", ".", ":!experiments/results"]
    git = {"cwd": ROOT, "capture_output": True, "text": True}
    if shutil.which("git") is None:
        return "unknown"
    changed = subprocess.run(["git", "status", "--porcelain", "-uno", *pathspec], **git).stdout
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **git).stdout.strip()
    return commit + "-dirty" * bool(changed)


def machine():
    """What ran, and on what: rounding differs between kinds of CPU, and so do runs."""
    info = Path("/proc/cpuinfo")
    cpu = re.search("model name.*: (.*)", info.read_text() if info.exists() else "")
    about = {"commit": current_commit(), "torch": torch.__version__}
    about |= {"python": platform.python_version(), "cores": os.cpu_count()}
    return about | {"cpu": cpu[1] if cpu else platform.machine()}


def refuse(flags, own):
    """Raises InputError where flags behind -- are among a script's own: a pattern of names."""
    for word in flags:
        if re.fullmatch(f"--({own})", word.split("=")[0].replace("_", "-")):
            raise InputError(f"{word}: expected another flag behind --, found one that is set here")


def seeded(words, seed, folder):
    """Flags, of a seed, in a folder; with the noise of seed 0 all would meet the same."""
    own = f"--seed {seed} --reward-noise-seed {seed} --output-dir".split()
    return [*words, *own, str(folder)]


def train_quietly(what, words):
    """train.main(words), unheard; raises InputError with the last line of a run that failed."""
    silent, noting = contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO())
    with naming(what), silent, noting as said:
        try:
            status = train.main(words)
        except SystemExit as error:  # of bad flags
            status = error.code
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise RuntimeError((said.getvalue().strip() or "stopped").splitlines()[-1])


def read_run(folder):
    """What a finished run has written: flags, versions and results; and rows of metrics."""
    with naming(f"{folder}: expected a finished run"):
        names = ("args.json", "results.json")
        args, results = (json.loads(Path(folder, name).read_text()) for name in names)
        found = {**args, **results, "flags": {**args["flags"]}}
        scores = {when: results[when] for when in ("before", "after")}
    check(folder, scores)
    return found, read_rows(Path(folder, "metrics.jsonl"))


def begin_process():
    """One thread, and nothing to be heard: what fails is told by its exception."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")


def add_runs(run, todo, jobs, target, method="fork"):
    """Adds run(*arguments)'s rows to a file, for all of todo, jobs at a time -> how many failed.

    Forks share what is imported; a GPU takes the method spawn.
    """
    if not todo:
        return 0
    lock = open(target, "a")  # held as long as it is open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{target}: expected one program at a time, found another") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    failed, about, context = 0, machine(), multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(jobs, context, begin_process) as pool:
        futures = [pool.submit(run, *arguments) for arguments in todo]
        try:
            done = concurrent.futures.as_completed(futures)
            for future in tqdm(done, total=len(futures), desc=f"{jobs} at a time"):
                if future.exception():
                    tqdm.write(f"{Path(sys.argv[0]).name}: {future.exception()}", file=sys.stderr)
                    failed += 1
                else:
                    for row in future.result():
                        add_row(target, about | row)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C
            while workers := multiprocessing.active_children():
                workers[0].terminate()  # its run ends in order; it may have been handed one more
                workers[0].join(5)
    return failed

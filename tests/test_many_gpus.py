"""experiments/many_gpus.py, on two processes of a CPU."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common import weights
from safetensors.torch import load_file

import train
from experiments import many_gpus
from experiments.scripts import ROOT
from harness import checkpoints

ALGOS = ("dvpo", "ppo", "grpo")
FLAGS = """
    --total-episodes 48 --batch-size 16 --eval-samples 2 --micro-batch-size 3 --num-quantiles 8
    --critic-warmup-steps 1 --learning-rate 2e-4
""".split()
# Two processes for all methods, and one of them resumed: most of the time is importing.
DRIVER = """
import sys
from experiments import many_gpus
for algo in {algos}:
    argv = [*sys.argv[1:], "--algo", algo, "--output-dir", "{folder}/" + algo]
    assert many_gpus.main(argv) == 0
assert many_gpus.main(["--resume", "{folder}/dvpo", "--total-episodes", "64"]) == 0
"""


def torchrun(*words, count=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory, warm_start):
    """The folders of runs by two processes, a method each."""
    folder = tmp_path_factory.mktemp("two")
    for algo in ALGOS:
        shutil.copytree(warm_start, folder / algo / "warm_start")
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(algos=ALGOS, folder=folder))
    process = torchrun(driver, *FLAGS)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    # The first process speaks for all.
    assert out.count("prompts to train on") == 4 and out.count("going on from") == 1
    return folder


def as_by_two(run, args, batch):
    """train.sample_and_score, with the shares of two processes."""
    shares = [many_gpus.sample_share(run, args, batch, rank, 2) for rank in range(2)]
    return many_gpus.together(shares, "cpu")


def assert_same_policy(one, two, number):
    name = f"checkpoint-{number:06d}/policy/model.safetensors"
    one, two = load_file(one / name), load_file(two / name)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5)
    return one


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGOS)
def test_two_processes_end_where_one_does(algo, by_two, tmp_path, warm_start, monkeypatch):
    monkeypatch.setattr(train, "sample_and_score", as_by_two)
    shutil.copytree(warm_start, tmp_path / "warm_start")
    assert train.main([*FLAGS, "--algo", algo, "--output-dir", str(tmp_path)]) == 0
    one = assert_same_policy(tmp_path, by_two / algo, 3)
    start = load_file(warm_start / "model.safetensors")
    assert max((one[key] - start[key]).abs().max().item() for key in one) > 2e-4
    if algo == "dvpo":
        # A resumed one, too: with Adam's moments.
        assert train.main(["--resume", str(tmp_path), "--total-episodes", "64"]) == 0
        assert_same_policy(tmp_path, by_two / algo, 4)


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_have_saved(by_two):
    more = ["--resume", str(by_two / "dvpo"), "--total-episodes", "80"]
    assert train.main(more) == 0
    assert (by_two / "dvpo" / "checkpoint-000005").is_dir()


def process_of_rank(rank, launcher):
    """The pid of a process that torchrun has started."""
    for path in Path(f"/proc/{launcher.pid}/task").glob("*/children"):
        for pid in map(int, path.read_text().split()):
            if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                return pid
    raise AssertionError(f"no process {rank}")


def signalled(rank, number, folder, warm_start):
    """A long run, sent a signal after its first checkpoint -> torchrun, what was printed."""
    shutil.copytree(warm_start, folder / "warm_start")
    flags = ["--output-dir", folder, "--total-episodes", 10**6, "--save-steps", 1]
    process = torchrun("experiments/many_gpus.py", *FLAGS, *flags)
    while process.poll() is None and not checkpoints.checkpoints(folder):
        time.sleep(0.01)
    os.kill(process_of_rank(rank, process), number)
    out, _ = process.communicate(timeout=60)
    return process, out


@pytest.mark.slow
def test_a_signal_to_the_first_process_stops_all_after_the_same_iteration(tmp_path, warm_start):
    _, out = signalled(0, signal.SIGTERM, tmp_path, warm_start)
    done = int(checkpoints.newest_checkpoint(tmp_path).name[-6:])
    assert out.count(f"stopped by SIGTERM after iteration {done} of") == 1
    assert out.count("stopped by") == out.count("stopping after this iteration") == 1
    assert "many_gpus.py: process" not in out


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_the_last_checkpoint_stays(rank, tmp_path, warm_start):
    process, out = signalled(rank, signal.SIGKILL, tmp_path, warm_start)
    (line,) = (line for line in out.splitlines() if "many_gpus.py: process" in line)
    assert f"process {1 - rank}: " in line and "the last checkpoint stays: --resume" in line
    assert process.returncode != 0
    newest = checkpoints.newest_checkpoint(tmp_path)
    assert weights(newest).isfinite().all()
    done = int(newest.name[-6:])
    more = ["--resume", str(tmp_path), "--total-episodes", str(16 * (done + 1))]
    assert train.main(more) == 0
    assert checkpoints.newest_checkpoint(tmp_path).name == f"checkpoint-{done + 1:06d}"

"""experiments/many_gpus.py, on two processes of a CPU."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from experiments import many_gpus
from experiments.seeds import ROOT

ALGOS = ("dvpo", "ppo", "grpo")
FLAGS = """
    --total-episodes 48 --batch-size 16 --eval-samples 2 --micro-batch-size 3 --num-quantiles 8
    --critic-warmup-steps 1 --learning-rate 2e-4
""".split()
# Two processes for all methods: most of the time is importing.
DRIVER = """
import sys
from experiments import many_gpus
from harness import reports
reports.quiet()
argv = sys.argv[1:]
for algo in {algos}:
    sys.argv = ["many_gpus.py", *argv, "--algo", algo, "--output-dir", "{folder}/" + algo]
    args = many_gpus.join()
    assert many_gpus.train_on_all(args) == 0
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
    return folder


def sampled_as_by_two(run, args, batch, *rest, **kwargs):
    share = (run, args, batch)
    parts = [many_gpus.sample_share(*share, rank, 2, *rest, **kwargs) for rank in range(2)]
    return many_gpus.together(parts, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGOS)
def test_two_processes_end_where_one_does(algo, by_two, tmp_path, warm_start, monkeypatch):
    monkeypatch.setattr(train, "respond", sampled_as_by_two)
    shutil.copytree(warm_start, tmp_path / "warm_start")
    assert train.main([*FLAGS, "--algo", algo, "--output-dir", str(tmp_path)]) == 0
    name = "checkpoint-000003/policy/model.safetensors"
    start = load_file(warm_start / "model.safetensors")
    one, two = load_file(tmp_path / name), load_file(by_two / algo / name)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5)
    moved = max((one[key] - start[key]).abs().max().item() for key in one)
    assert moved > 2e-4


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_have_saved(by_two):
    more = ["--resume", str(by_two / "dvpo"), "--total-episodes", "64"]
    assert train.main(more) == 0
    assert (by_two / "dvpo" / "checkpoint-000004").is_dir()

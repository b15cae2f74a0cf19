"""harness/flags.py: every flag's range, what fits together, and what a resumed run keeps."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import (
    refused,
    some_of,
)

import train
from harness.flags import ALGORITHMS, FLAGS, parse_args

ROOT = Path(train.__file__).parent
BAD_FLAGS = [
    ("--alpha 0", "--alpha"),
    ("--alpha 1.5", "--alpha"),
    ("--beta -1", "--beta"),
    ("--alpha nan", "--alpha"),
    ("--num-mini-batches 3", "--num-mini-batches"),
    ("--num-mini-batches 0", "--num-mini-batches"),
    ("--batch-size 0", "--batch-size"),
    ("--batch-size x", "--batch-size"),
    ("--kappa -1", "--kappa"),
    ("--learning-rate 0", "--learning-rate"),
    ("--learning-rate inf", "--learning-rate"),
    ("--lam 1.1", "--lam"),
    ("--gamma -0.1", "--gamma"),
    ("--temperature 0", "--temperature"),
    ("--reward-noise-fp 2", "--reward-noise-fp"),
    ("--reward-noise-outlier 0.5", "--reward-noise-outlier"),
    ("--reward-noise-outlier 2 1", "--reward-noise-outlier"),
    ("--algo sac", "--algo"),
    ("--no-such-flag", "--no-such-flag"),
    ("--seed -1", "--seed"),
    ("--dataset-name data.jsonl", "--model-name-or-path"),
    ("--model-name-or-path x --dataset-name data.jsonl", "--reward"),
    ("--resume", "--resume"),
    ("--model-name-or-path ./no/such/folder", "--model-name-or-path"),
    ("--reward nonsense", "--reward"),
    ("--shape-weight -1", "--shape-weight"),
    ("--num-quantiles 0", "--num-quantiles"),
    ("--task chess", "--task"),
    ("--cliprange 0", "--cliprange"),
    ("--device cuda:0", "--device"),
    ("--eval-samples 0", "--eval-samples"),
    ("--critic-model-name-or-path ./nowhere", "--critic"),
    ("--device gpu", "--device"),
    ("--device meta", "--device"),
    ("--seed 40000000000000", "--seed"),
    ("--temperature 1e-42", "--temperature"),
    ("--response-length 300", "--response-length"),
    ("--reward-noise-outlier 1 1e30", "--reward-noise-outlier"),
    ("--group-size 5", "--group-size"),
    ("--group-size -1", "--group-size"),
    ("--algo grpo --group-size 1", "--group-size"),
    ("--algo dr_grpo --group-size 200", "--group-size"),
    ("--max-turns 0", "--max-turns"),
    ("--eval-samples 513", "--eval-samples"),
    ("--task sums --user json:dumps", "--user: expected none with --task sums"),
    ("--user nonsense", "--user"),
    ("--user json:nosuch", "--user"),
    ("--user os:sep", "--user"),
    ("--dataset-config main", "--dataset-name"),
    ("--prompt-column question", "--dataset-name"),
    ("--user json:dumps --chat-template never", "--chat-template"),
    ("--micro-batch-tokens 0", "--micro-batch-tokens"),
    ("--reward-noise-model -1", "--reward-noise-model"),
    ("--reward-noise-failure 2 1", "--reward-noise-failure"),
    ("--learning-rte 1", "--learning-rte"),
    ("--lr 1e-4", "--lr"),
    ("--kl 0", "--kl"),
    ("--zzzz", "unrecognized arguments: --zzzz"),
    ("stray", "stray"),
    ("--learning-rate", "--learning-rate: expected one argument"),
    ("--bootstrap-truncated --algo grpo", "--bootstrap-truncated"),
    ("--eval-dataset-name data.jsonl", "--dataset-name"),
    ("--reward model:x --reward-noise-fp 0.1", "--reward-noise-fp"),
    ("--report-to mlflow", "--report-to"),
    ("--dtype float16", "--dtype"),
    ("--tau-grid left", "--tau-grid"),
    ("--stop-token nosuchword", "--stop-token"),
    ("--algo grpo --batch-size 12 --num-mini-batches 2", "--group-size"),
    ("--reward-noise-outlier x 1", "--reward-noise-outlier"),
    ("--reward math:", "--reward"),
    ("--reward os:sep", "--reward"),
    ("--user :f", "--user"),
    ("--model-name-or-path a/b/c", "no such folder"),
    ("--critic-model-name-or-path a/b/c", "--critic-model-name-or-path"),
    ("--model-name-or-path nosuchmodel", "--model-name-or-path"),
    ("--dataset-split test", "--dataset-name: expected one with --dataset-split"),
    ("--eval-dataset-split test", "--eval-dataset-name: expected one with --eval-dataset-split"),
    ("--cliprange 1e308", "--cliprange: expected a number of 32 bits"),
    ("--num-quantiles 2000000000", "--num-quantiles: expected a whole number in [1, 10000]"),
    ("--total-episodes 99999999999999999999", "--total-episodes: expected a whole number of 32"),
    ("--output-dir run/warm_start/config.json", "File exists: 'run/warm_start/config.json'"),
    ("--output-dir run/warm_start/config.json/x", "directory: 'run/warm_start/config.json/x'"),
    ("--user :", "--user: expected module:function, found ':'"),
]
TEXTS = [
    name
    for flags in FLAGS.values()
    for name, default, allowed, _ in flags
    if allowed is None and default is not False and name != "resume"
]


def beyond(name, interval):
    """Values of a numeric flag that it must refuse: on either side of its interval, no number."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    yield from ("x", "nan", "", f"{low - 1:g}")
    if interval[0] == "(":
        yield f"{low:g}"
    if math.isinf(high):
        yield "inf"
    else:
        yield f"{high:g}" if interval[-1] == ")" else f"{high * 2 + 1:g}"


NUMERIC = {
    name: (default[0] if isinstance(default, tuple) else default, allowed)
    for flags in FLAGS.values()
    for name, default, allowed, _ in flags
    if isinstance(allowed, str) and not isinstance(default, list)
}


@pytest.mark.parametrize("name", NUMERIC)
def test_numbers_outside_their_range(name, capsys):
    default, interval = NUMERIC[name]
    assert isinstance(default, (int, float)) and default not in beyond(name, interval)
    values = [*beyond(name, interval)]
    if type(default) is int:
        values.append("1.5")
    for value in values:
        refused(capsys, [f"--{name}={value}"], f"--{name}", f"in {interval}", repr(value))
    assert len(values) >= 5


def test_the_tables_are_long_enough():
    numbers = sum(len([*beyond(name, interval)]) for name, (_, interval) in NUMERIC.items())
    assert len(BAD_FLAGS) >= 70 and numbers >= 150


@pytest.mark.parametrize("flags,culprit", BAD_FLAGS)
def test_bad_flags(flags, culprit, tmp_path, capsys, warm_start, monkeypatch):
    if culprit == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(warm_start, tmp_path / "run" / "warm_start")
    refused(capsys, ["--output-dir", "run", *flags.split()], culprit)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["warm_start"]


def test_help_names_every_flag_and_both_spellings_work(capsys):
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_info.value.code == 0
    assert all(f"--{name} " in text for flags in FLAGS.values() for name, *_ in flags)
    assert "default 0.95" in text and "default 0, 50 for a pretrained model, in [0, inf)" in text
    assert parse_args(["--batch_size", "64"]).batch_size == 64
    assert parse_args(["--batch_size=64"]).batch_size == 64


def test_flags_are_read_before_torch_is_there():
    """--help and a refused flag answer at once: harness/flags.py imports nothing heavy."""
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()"
    code = f"import sys; from harness.flags import parse_args; parse_args([]); print({heavy})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == "set()\n", found


def test_every_algorithm_is_a_row():
    """What the table says of each, against the papers: no row can change unseen."""
    assert {name: tuple(row) for name, row in ALGORITHMS.items()} == {
        "dvpo": ("quantiles", "reward", "token"),
        "ppo": ("scalar", "reward", "token"),
        "robust": ("scalars", "reward", "token"),
        "grpo": ("none", "loss", "response"),
        "dr_grpo": ("none", "loss", "constant"),
        "reinforce++": ("none", "reward", "token"),
    }


@pytest.mark.parametrize("name", TEXTS)
def test_a_flag_without_a_value_is_not_ignored(name, capsys):
    assert len(TEXTS) >= 12
    refused(capsys, [f"--{name}="], f"--{name}: expected a value, found none")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_logging_package_is_one_line(name, monkeypatch, tmp_path, capsys):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    argv = f"--report-to {name} --output-dir {tmp_path / 'run'}".split()
    refused(capsys, argv, f"--report-to: expected {name} to be installed", module)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_a_logging_package_is_not_the_package(
    monkeypatch, tmp_path, capsys
):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    refused(capsys, ["--report-to", "wandb"], "--report-to: expected wandb", "no attribute 'init'")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_a_run_does_not_begin_from_what_it_will_move(tmp_path, monkeypatch, capsys):
    """As a second stage does that is started into the first one's folder."""
    monkeypatch.chdir(tmp_path)
    own = "--dataset-name data.jsonl --reward math --model-name-or-path".split()
    for path in ("run/checkpoint-000001/policy", "run/../run/checkpoint-000002/policy"):
        found = "--model-name-or-path: expected none of --output-dir's own, "
        refused(capsys, [*own, path, "--output-dir", "run"], found, str(tmp_path / "run"))
        for folder in ("other", "run2", "run/warm_start"):
            assert parse_args([*own, path, "--output-dir", folder]).output_dir == folder


@pytest.mark.parametrize("flags", ["--help", "--alpha 0", "--algo grpo --group-size 1"])
def test_help_and_refused_flags_do_not_wait_for_torch(flags, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch is imported')\n")
    options = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "capture_output": True}
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags.split()], text=True, **options)
    assert done.returncode == (0 if flags == "--help" else 2), done.stderr
    assert len(done.stderr.splitlines()) == done.returncode // 2


WRONG_SAVED = [
    ("seed", "zero", "argument --seed: expected a whole number"),
    ("seed", 0.5, "argument --seed: expected a whole number"),
    ("batch_size", [1, 2], "unrecognized arguments: 2"),
    ("algo", "sac", "argument --algo: invalid choice"),
    ("reward_noise_outlier", 0.5, "argument --reward-noise-outlier: expected 2 arguments"),
    ("reward_noise_outlier", [0, "x"], "argument --reward-noise-outlier: expected a number"),
    ("whiten_rewards", "yes", "argument --whiten-rewards: ignored explicit argument 'yes'"),
    ("gamma", {"a": 1}, "argument --gamma: expected a number"),
    ("task", 5, "argument --task: invalid choice"),
]


@pytest.mark.parametrize("key,value,found", WRONG_SAVED)
def test_wrong_values_in_saved_flags_are_one_line(key, value, found, finished, tmp_path, capsys):
    known = json.loads((finished / "args.json").read_text())
    known["flags"][key] = value
    (tmp_path / "args.json").write_text(json.dumps(known))
    refused(capsys, ["--resume", str(tmp_path)], f"--resume: {tmp_path / 'args.json'}: {found}")


@pytest.mark.parametrize("text", ["[]", '{"flags": []}', '{"flags": 3}', "3", "{", "\udcff"])
def test_saved_flags_that_are_none_are_one_line(text, tmp_path, capsys):
    (tmp_path / "args.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(capsys, ["--resume", str(tmp_path)], "--resume: expected a run's flags", "found none")


def test_saved_flags_come_back_as_they_were(tmp_path):
    flags = "--reward-noise-outlier 0.5 2 --whiten-rewards --kappa 1e-7 --group-size 4 --gamma 0"
    args = parse_args([*flags.split(), "--stop-token=--x", "--output-dir", str(tmp_path)])
    (tmp_path / "args.json").write_text(json.dumps({"flags": {**vars(args), "resume": None}}))
    again = parse_args(["--resume", str(tmp_path)])
    assert vars(again) == {**vars(args), "resume": str(tmp_path)}


def test_resume_refuses_changed_flags_and_takes_more_episodes(finished, tmp_path, capsys):
    folder = str(finished)
    refused(capsys, ["--resume", "nowhere"], "nowhere/args.json, found none: [Errno 2] No such")
    refused(capsys, ["--resume", folder, "--seed", "5"], "--seed", "expected 0", "found 5")
    refused(capsys, ["--resume", folder, "--output-dir", str(tmp_path)], "--output-dir", folder)
    refused(capsys, ["--resume", str(tmp_path)], "--resume", "args.json", "found none")
    newest = str(finished / "checkpoint-000024")  # a run's folder is what it takes
    refused(capsys, ["--resume", newest], "--resume", "args.json", "found none")
    for argv in (["--resume", folder], ["--resume", "--output-dir", f"{folder}/"]):
        args = parse_args(argv)
        assert (Path(args.resume), Path(args.output_dir)) == (finished, finished)
    args = parse_args(["--resume", folder, "--total-episodes", "1600"])
    assert args.total_episodes == 1600 and args.num_quantiles == 16
    some_of(finished, tmp_path, "args.json", "warm_start")
    refused(capsys, ["--resume", str(tmp_path)], "--resume", "a checkpoint", "found none")


def test_a_run_of_a_version_with_other_flags_goes_on(finished, tmp_path):
    """Flags that it did not know have their defaults; those that are gone are forgotten."""
    known = json.loads((finished / "args.json").read_text())
    del known["flags"]["micro_batch_tokens"], known["flags"]["save_steps"]
    known["flags"]["kv_cache"] = "static"
    (tmp_path / "args.json").write_text(json.dumps(known))
    args = parse_args(["--resume", str(tmp_path)])
    assert args.micro_batch_tokens == 4096 and args.save_steps == 0 and args.num_quantiles == 16
    assert not hasattr(args, "kv_cache")


@pytest.mark.parametrize(
    "flags, name",
    [
        ("", "dialogue-dvpo-seed0"),
        ("--algo ppo --readout-width 2 --task sums --seed 3", "sums-ppo-seed3"),
        ("--algo ppo --readout spread", "dialogue-ppo-spread-seed0"),
        ("--readout spread --output-dir runs/own", "own"),
        ("--dataset-name me/v1.5 --model-name-or-path m --reward math", "v1.5-dvpo-seed0"),
        ("--dataset-name a/b.jsonl --model-name-or-path m --reward math", "b-dvpo-seed0"),
    ],
)
def test_methods_have_default_folders_of_their_own(flags, name):
    assert parse_args(flags.split()).output_dir == f"runs/{name}"


def test_a_resumed_run_is_compiled_as_before_or_from_now_on(tmp_path):
    for words, more, expected in (
        ("--compile", "", True),
        ("", "--compile", True),
        ("", "", False),
    ):
        args = parse_args([*words.split(), "--output-dir", str(tmp_path)])
        (tmp_path / "args.json").write_text(json.dumps({"flags": vars(args)}))
        assert parse_args(["--resume", str(tmp_path), *more.split()]).compile == expected

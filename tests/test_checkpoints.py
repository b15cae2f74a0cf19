"""harness/checkpoints.py: resuming bit for bit, after kills, signals and a full disk."""

import contextlib
import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from common import (
    MODEL,
    ONCE,
    SMALL,
    built,
    log,
    refused,
    rows_of,
    run_of,
    some_of,
    train_and_exit,
    train_in,
    weights,
    write_rows,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from critic import QuantileCritic
from harness import checkpoints, reports
from harness.checkpoints import newest_checkpoint
from harness.flags import parse_args
from harness.setup import build, respond
from tasks import InputError


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, capsys):
    """As after a crash in iteration 13 or later: an older checkpoint, and a log that went on."""
    some_of(finished, tmp_path, "checkpoint-000012", "args.json", "metrics.jsonl", "warm_start")
    with open(tmp_path / "metrics.jsonl", "a") as log_file:
        log_file.write('{"iteration": 25, "objec')  # torn by the crash
    assert train.main(["--resume", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"going on from {tmp_path / 'checkpoint-000012'}" in out
    same_run(tmp_path, finished)


@pytest.mark.parametrize("dtype,trusted", [("float32", True), ("bfloat16", False)])
def test_a_resumed_run_asks_anew_whether_to_trust_sampling(dtype, trusted, finished, tmp_path):
    """It may be on another device: the answer is in no checkpoint."""
    some_of(finished, tmp_path, "checkpoint-000012", "args.json", "metrics.jsonl", "warm_start")
    args = parse_args(["--resume", str(tmp_path)])
    args.dtype = dtype
    run = built(args)
    checkpoints.resume(run, args)
    assert run.trust_recorded is trusted and run.iteration == 12
    if trusted:
        return
    copies = zip(run.sampler.parameters(), run.policy.parameters())
    assert not all(torch.equal(a, b.bfloat16()) for a, b in copies)  # not yet
    respond(run, args, run.data[:2], 1.0)
    copies = zip(run.sampler.parameters(), run.policy.parameters())
    assert all(torch.equal(a, b.bfloat16()) for a, b in copies)


@pytest.mark.parametrize("more,stays", [(1536, True), (1537, False)])
def test_results_of_a_shorter_run_are_renamed_when_it_goes_on(more, stays, finished, tmp_path):
    """They would look like the longer one's, until that one ends; and they are not lost."""
    names = ("args.json", "metrics.jsonl", "results.json", "warm_start")
    some_of(finished, tmp_path, "checkpoint-000024", *names)
    args = parse_args(["--resume", str(tmp_path), "--total-episodes", str(more)])
    checkpoints.resume(built(args), args)
    assert (tmp_path / "results.json").exists() is stays
    kept = tmp_path / ("results.json" if stays else "results-000024.json")
    assert kept.read_text() == (finished / "results.json").read_text()
    (tmp_path / "results_mine.json").write_text("{}")
    checkpoints.set_aside(tmp_path)
    assert (tmp_path / "earlier-1" / kept.name).exists()
    assert (tmp_path / "results_mine.json").exists()


def test_results_keep_the_iteration_that_they_are_of(finished, tmp_path):
    """Not that of an older checkpoint, where the newest is broken."""
    names = ("args.json", "metrics.jsonl", "results.json", "warm_start")
    some_of(finished, tmp_path, "checkpoint-000024", *names)
    shutil.copytree(tmp_path / "checkpoint-000024", tmp_path / "checkpoint-000025")
    args = parse_args(["--resume", str(tmp_path), "--total-episodes", "1700"])
    checkpoints.resume(built(args), args)
    assert (tmp_path / "checkpoint-000025.broken").exists()
    assert (tmp_path / "results-000025.json").exists()


def same_tensors(a, b):
    """Whether two nested structures hold the same tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        keys = a if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(same_tensors(a[key], b[key]) for key in keys)
    return a == b


TORN = ["state.pt", "critic/critic_config.json", "policy/model.safetensors", "policy/config.json"]


PARTS = ["policy/model.safetensors", "critic/model.safetensors"]


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_without_one_weight_is_broken(part, finished, tmp_path, capsys):
    """transformers would make it up."""
    names = ("args.json", "metrics.jsonl", "warm_start")
    some_of(finished, tmp_path, "checkpoint-000012", "checkpoint-000024", *names)
    path = tmp_path / "checkpoint-000024" / part
    some = load_file(path)
    del some[min(name for name in some if "up_proj" in name)]
    save_file(some, path, metadata={"format": "pt"})
    args = parse_args(["--resume", str(tmp_path)])
    run = built(args)
    checkpoints.resume(run, args)
    assert run.iteration == 12 and "expected all weights" in capsys.readouterr().err
    assert (tmp_path / "checkpoint-000024.broken").is_dir()


@pytest.mark.parametrize("torn", [*TORN, "critic/model.safetensors", "gone: critic"])
def test_a_torn_checkpoint_is_renamed_with_a_line_and_the_older_one_used(
    torn, finished, tmp_path, capsys
):
    names = ("args.json", "metrics.jsonl", "warm_start")
    some_of(finished, tmp_path, "checkpoint-000012", "checkpoint-000024", *names)
    newest = tmp_path / "checkpoint-000024"
    if torn.startswith("gone"):
        shutil.rmtree(newest / torn.split()[1])
    else:
        (newest / torn).write_bytes((newest / torn).read_bytes()[:-20])
    args = parse_args(["--resume", str(tmp_path)])
    run = built(args)
    checkpoints.resume(run, args)
    random_state, err = torch.get_rng_state(), capsys.readouterr().err
    (line,) = (line for line in err.splitlines() if "checkpoint-000024" in line)
    assert "expected a whole checkpoint" in line and "checkpoint-000024.broken" in line
    assert (tmp_path / "checkpoint-000024.broken").is_dir() and not newest.exists()
    assert run.iteration == 12 and log(tmp_path) == log(finished)[:12]
    older = finished / "checkpoint-000012"
    numbers = [p.flatten() for model in (run.policy, run.critic) for p in model.parameters()]
    assert torch.equal(torch.cat(numbers), weights(older))
    state = torch.load(older / "state.pt", weights_only=True)
    assert same_tensors(run.optimizer.state_dict(), state["optimizer"])
    assert same_tensors(run.critic_optimizer.state_dict(), state["critic_optimizer"])
    assert torch.equal(run.noise.get_state(), state["noise"])
    assert torch.equal(random_state, state["random"]["torch"])


def test_where_no_checkpoint_loads_nothing_is_renamed(finished, tmp_path, capsys):
    """It may be the flags or the machine: once that is put right, the run goes on."""
    some_of(finished, tmp_path, "checkpoint-000024", "args.json", "metrics.jsonl", "warm_start")
    state = tmp_path / "checkpoint-000024" / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(b"torn")
    for _ in range(2):
        said = ("--resume", "checkpoint-000024", "expected a whole checkpoint")
        refused(capsys, ["--resume", str(tmp_path)], *said)
        assert log(tmp_path) == log(finished) and state.exists()
    state.write_bytes(whole)
    args = parse_args(["--resume", str(tmp_path)])
    run = built(args)
    checkpoints.resume(run, args)
    assert run.iteration == 24


def test_a_torn_line_of_metrics_is_refused_and_not_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"iter')
    for _ in range(2):
        with pytest.raises(InputError, match="expected 2 lines in .*metrics.jsonl"):
            checkpoints.cut_log(path, 2)
        assert path.read_bytes() == b'{"iteration": 1}\n{"iter'
    checkpoints.cut_log(path, 1)
    assert path.read_bytes() == b'{"iteration": 1}\n'


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"7", b'{"iteration": 1}', b'{"episode": 64}'])
def test_a_line_of_metrics_that_is_none_of_an_iteration_does_not_count(line, tmp_path):
    path, lines = tmp_path / "metrics.jsonl", [b'{"iteration": 1}', line, b'{"iteration": 2}', b""]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match="expected 2 lines in .*, found 1 such of 3"):
        checkpoints.cut_log(path, 2)
    assert path.read_bytes() == b"\n".join(lines)


def test_a_checkpoint_of_another_iteration_than_its_name_is_broken(finished, tmp_path, capsys):
    names = ("args.json", "metrics.jsonl", "warm_start")
    some_of(finished, tmp_path, "checkpoint-000012", *names)
    shutil.copytree(tmp_path / "checkpoint-000012", tmp_path / "checkpoint-000018")
    args = parse_args(["--resume", str(tmp_path)])
    run = built(args)
    checkpoints.resume(run, args)
    assert run.iteration == 12 and log(tmp_path) == log(finished)[:12]
    found = "checkpoint-000018: expected a whole checkpoint, found: the state after iteration 12"
    assert found in capsys.readouterr().err and (tmp_path / "checkpoint-000018.broken").is_dir()


def test_a_run_is_not_resumed_with_fewer_episodes_than_it_has_seen(finished, tmp_path, capsys):
    some_of(finished, tmp_path, "checkpoint-000012", "args.json", "metrics.jsonl", "warm_start")
    expected = "--total-episodes: expected at least 768, as many are done, found 64"
    refused(capsys, ["--resume", str(tmp_path), "--total-episodes", "64"], expected)
    assert log(tmp_path) == log(finished)


def test_a_run_is_not_resumed_with_other_data(model_folder, tmp_path, capsys):
    """Other answers to the same prompts, another order: one line; the file itself may move."""
    data, rows = tmp_path / "data.jsonl", rows_of()
    own = f"--model-name-or-path {model_folder} --dataset-name {data} --reward exact".split()
    folder = tmp_path / "run"
    argv = [*MODEL, *own, "--output-dir", str(folder)]
    write_rows(data, rows)
    assert train.main(argv) == 0
    again = ["--resume", str(folder), "--total-episodes", "16"]
    for others in (rows[::-1], rows[1:], [*rows[:-1], {**rows[-1], "answer": "other"}]):
        write_rows(data, others)
        refused(capsys, again, "--resume: expected the data and tokenizer of", "args.json")
    assert len(log(folder)) == 1
    write_rows(data, rows)
    known = json.loads((folder / "args.json").read_text())
    del known["data"]  # a run of an older version
    (folder / "args.json").write_text(json.dumps(known))
    assert train.main(again) == 0 and len(log(folder)) == 2


def test_a_checkpoint_that_breaks_twice_is_renamed_twice(finished, tmp_path):
    """The run went on from the older one, came by the same iteration, and broke again."""
    names = ("args.json", "metrics.jsonl", "warm_start")
    some_of(finished, tmp_path, "checkpoint-000012", "checkpoint-000024", *names)
    (tmp_path / "checkpoint-000024" / "state.pt").write_bytes(b"torn")
    shutil.copytree(tmp_path / "checkpoint-000024", tmp_path / "checkpoint-000024.broken")
    args = parse_args(["--resume", str(tmp_path)])
    run = built(args)
    checkpoints.resume(run, args)
    assert run.iteration == 12 and checkpoints.checkpoints(tmp_path).keys() == {12}


def test_resume_from_torn_flags_or_short_metrics_is_one_line(finished, tmp_path, capsys):
    some_of(finished, tmp_path, "checkpoint-000012", "args.json", "metrics.jsonl", "warm_start")
    log_file = tmp_path / "metrics.jsonl"
    log_file.write_text("".join(log_file.read_text().splitlines(keepends=True)[:9]))
    refused(capsys, ["--resume", str(tmp_path)], "--resume", "expected 12 lines", "found 9")
    (tmp_path / "args.json").write_text("{")
    refused(capsys, ["--resume", str(tmp_path)], "--resume", "args.json")


def test_resuming_a_finished_run_moves_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "evaluate", lambda run, args: (run.before, run.examples))
    names = ("args.json", "metrics.jsonl", "results.json", "warm_start")
    some_of(finished, tmp_path, "checkpoint-000024", *names)
    assert train.main(["--resume", str(tmp_path)]) == 0
    assert not (tmp_path / "earlier-1").exists() and log(tmp_path) == log(finished)


def test_a_second_run_moves_the_first_aside_and_reuses_the_warm_start(warm_start, tmp_path, capsys):
    few = [*"--total-episodes 64 --eval-samples 8".split(), *ONCE]
    train_in(tmp_path, warm_start, *few)
    first = log(tmp_path)
    made = (tmp_path / "warm_start" / "model.safetensors").stat().st_mtime_ns
    train_in(tmp_path, warm_start, *few, "--algo", "ppo")
    assert log(tmp_path / "earlier-1") == first != log(tmp_path)
    assert (tmp_path / "warm_start" / "model.safetensors").stat().st_mtime_ns == made
    assert "earlier-1" in capsys.readouterr().out


def test_a_runs_own_event_file_stays_and_earlier_folders_never_collide(
    warm_start, tmp_path, monkeypatch
):
    open_log = reports.open_log

    def with_event_file(run, args, num_iterations):
        (tmp_path / "events.out.new").touch()
        return open_log(run, args, num_iterations)

    monkeypatch.setattr(reports, "open_log", with_event_file)
    (tmp_path / "earlier-2").mkdir()  # the user threw earlier-1 away
    (tmp_path / "events.out.old").touch()
    train_in(tmp_path, warm_start, *"--total-episodes 64 --eval-samples 8".split(), *ONCE)
    assert (tmp_path / "events.out.new").exists()
    assert (tmp_path / "earlier-1" / "events.out.old").exists()
    checkpoints.set_aside(tmp_path)
    assert (tmp_path / "earlier-3" / "args.json").exists()
    assert not list((tmp_path / "earlier-2").iterdir())


def test_only_checkpoints_of_ours_count(tmp_path):
    ours = ["checkpoint-000002", "checkpoint-999999", "checkpoint-1000000"]
    others = ["checkpoint-best2", "checkpoint-000003-copy1", "checkpoint-7.tmp"]
    for name in reversed(ours + others):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints.checkpoints(tmp_path).values()] == ours
    assert newest_checkpoint(tmp_path).name == ours[-1]


def test_the_newest_checkpoints_are_kept_and_leftovers_cleared(warm_start, tmp_path):
    for left in ("checkpoint-000002.tmp", "checkpoint-000001.tmp"):
        (tmp_path / left).mkdir()
    flags = "--total-episodes 320 --save-steps 1 --eval-samples 4"
    assert train_in(tmp_path, warm_start, *flags.split(), *ONCE) == 0
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-000004", "checkpoint-000005"]


def loads(folder):
    """Whether every part of a checkpoint is there and can be read."""
    QuantileCritic.from_pretrained(folder / "critic")
    AutoModelForCausalLM.from_pretrained(folder / "policy")
    AutoTokenizer.from_pretrained(folder / "policy")
    state = torch.load(folder / "state.pt", weights_only=True)
    return state.keys() >= {"iteration", "optimizer", "random"}


def sizes(folder):
    """{file: its size} of a checkpoint whose state.pt can be read.

    A torn or unfinished one has others. Of state.pt it is not, as a generator's numbers vary.
    """
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state.keys() >= {"iteration", "optimizer", "critic_optimizer", "random", "noise"}
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "state.pt")
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def at_every_line(look, function, *rest):
    """What look() finds before every line of checkpoints.py that function(*rest) runs, and after.

    A process that died there would leave just this: what Python has not written yet is lost.
    """
    found, before = [], sys.gettrace()

    def trace(frame, event, value):
        if frame.f_code.co_filename != checkpoints.__file__:
            return None
        if event == "line":
            found.append(look())
        return trace

    sys.settrace(trace)
    try:
        function(*rest)
    finally:
        sys.settrace(before)
    return [*found, look()]


def test_a_kill_at_any_line_of_a_save_loses_no_checkpoint(warm_start, tmp_path):
    """A third checkpoint where two are kept.

    Wherever it dies, one or both of the newest are whole, and the next save clears up.
    """
    run, args = run_of(warm_start, tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    for run.iteration in (1, 2):
        whole = checkpoints.save_checkpoint(run, args)
    assert loads(whole)
    expected, run.iteration = sizes(whole), 3

    def look():
        found = checkpoints.checkpoints(tmp_path)
        left = any(tmp_path.glob("*.tmp"))
        return (*found, left), all(sizes(path) == expected for path in found.values())

    seen = at_every_line(look, checkpoints.save_checkpoint, run, args)
    assert all(is_whole and 2 in names for names, is_whole in seen), seen
    assert loads(newest_checkpoint(tmp_path)) and len(seen) > 40
    names = {names for names, _ in seen}
    assert {seen[0][0], seen[-1][0]} == {(1, 2, False), (2, 3, False)}
    assert {(1, 2, True), (1, 2, 3, False)} <= names, names
    for left in ("checkpoint-000003.tmp", "checkpoint-000001.tmp"):
        (tmp_path / left).mkdir()
    run.iteration = 4
    checkpoints.save_checkpoint(run, args)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-000003", "checkpoint-000004"]


def test_a_kill_at_any_line_of_resuming_leaves_a_run_that_can_be_resumed(warm_start, tmp_path):
    """Two checkpoints, the newer one torn, and a log that went on.

    Wherever it dies, the older one has its line in metrics.jsonl, and the next try goes on.
    """
    run, args = run_of(warm_start, tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    for run.iteration in (1, 2):
        newest = checkpoints.save_checkpoint(run, args)
    (newest / "critic" / "model.safetensors").write_bytes(b"torn")
    lines = "".join(f'{{"iteration": {number}}}\n' for number in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(lines)

    def look():
        newer = [path.name for path in tmp_path.glob("checkpoint-000002*")]
        log_file = (tmp_path / "metrics.jsonl").read_text()
        return sizes(tmp_path / "checkpoint-000001"), log_file, newer

    seen = at_every_line(look, checkpoints.resume, run, args)
    older, _, _ = seen[0]
    one = lines.splitlines(keepends=True)[0]
    assert all(same == older and text in (lines, one) for same, text, _ in seen), seen
    assert all(len(newer) == 1 for _, _, newer in seen) and len(seen) > 40
    assert seen[-1][1:] == (one, ["checkpoint-000002.broken"])
    checkpoints.resume(run, args)
    assert run.iteration == 1


def test_a_full_disk_loses_no_earlier_checkpoint(warm_start, tmp_path, capsys, monkeypatch):
    """No file may grow beyond 30 kB from the second save on.

    The run ends with a line, and the first checkpoint stands and is whole.
    """
    save, limits = checkpoints.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(run, args):
        if run.iteration > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        return save(run, args)

    monkeypatch.setattr(checkpoints, "save_checkpoint", save_on_a_full_disk)
    shutil.copytree(warm_start, tmp_path / "warm_start")
    argv = [*SMALL, *ONCE, *f"--output-dir {tmp_path} --save-steps 1 --eval-samples 4".split()]
    try:
        refused(capsys, argv, "--output-dir", "checkpoint-000002", "arge")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000001"]
    assert loads(tmp_path / "checkpoint-000001")


def kept(folder):
    """All files of a folder with what stands in them."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", ["policy", "tokenizer", "critic", "disk"])
def test_what_cannot_be_saved_ends_the_run_before_it_starts(
    part, finished, tmp_path, capsys, monkeypatch
):
    """And before the earlier run in its folder is moved aside."""
    some_of(finished, tmp_path, "checkpoint-000024", "args.json", "metrics.jsonl", "warm_start")
    before, limits = kept(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(reports, "evaluate", lambda run, args: pytest.fail("it starts"))

    def build_unsavable(args):
        run = build(args)
        if part == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        else:
            getattr(run, part).save_pretrained = lambda folder: {}["no such setting"]
        return run

    monkeypatch.setattr(train, "build", build_unsavable)
    try:
        found = "arge" if part == "disk" else "no such setting"
        refused(capsys, [*SMALL, "--output-dir", str(tmp_path)], "cannot save checkpoint", found)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept(tmp_path) == before and not list(tmp_path.glob("*.tmp"))


def test_a_try_to_save_changes_nothing(warm_start, tmp_path):
    run, args = run_of(warm_start, tmp_path)
    before, states = kept(tmp_path), draws()
    checkpoints.write_checkpoint(run, tmp_path / "checkpoint")
    checkpoints.restore(run, tmp_path / "checkpoint")
    states = draws()
    checkpoints.restore(run, tmp_path / "checkpoint")
    checkpoints.try_saving(run, args)
    assert draws() == states
    shutil.rmtree(tmp_path / "checkpoint")
    assert kept(tmp_path) == before and run.policy.training


def test_scores_that_cannot_be_flipped_end_the_run_before_an_earlier_one_is_moved(
    model_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "half", raising=False)
    Path("half.py").write_text("def half(prompts, **columns): return [0.5] * len(prompts)\n")
    write_rows(tmp_path / "data.jsonl", rows_of())
    own = f"--model-name-or-path {model_folder} --dataset-name data.jsonl --output-dir run".split()
    assert train.main([*MODEL, *own, "--reward", "half:half"]) == 0
    before = kept(tmp_path / "run")
    for flag in ("--reward-noise-fp", "--reward-noise-fn"):
        argv = [*MODEL, *own, "--reward", "half:half", flag, "0.1"]
        refused(capsys, argv, "--reward-noise-fp or -fn: expected 0/1 scores, found 0.5")
    assert kept(tmp_path / "run") == before


def draws():
    return random.random(), numpy.random.rand(), torch.rand(1).item()


def test_random_states_come_back(warm_start, tmp_path):
    """Python's, numpy's, torch's and the noise's generators, through a file without pickles."""
    run, _ = run_of(warm_start, tmp_path)
    checkpoints.write_checkpoint(run, tmp_path / "checkpoint")
    first = draws(), torch.rand(1, generator=run.noise)
    checkpoints.restore(run, tmp_path / "checkpoint")
    assert (draws(), torch.rand(1, generator=run.noise)) == first


# A clean process with all imported, from which others start at once.
FORK = multiprocessing.get_context("forkserver")


FORK.set_forkserver_preload(["common"])


KILLED = "--save-steps 1 --response-length 6".split()


def started(argv, out=os.devnull):
    process = FORK.Process(target=train_and_exit, args=(argv, str(out)))
    # The server looks for what it imports in the working folder and here, and else goes without.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        process.start()
    return process


@pytest.fixture(scope="module")
def to_kill(request, model_folder, tmp_path_factory):
    """(flags, finished folder): a run whose reward draws from python's and numpy's generators."""
    folder = tmp_path_factory.mktemp("kill")
    data = write_rows(folder / "data.jsonl", rows_of())
    own = f"--model-name-or-path {model_folder} --dataset-name {data} --reward common:dice"
    argv = [*MODEL, *KILLED, *own.split(), "--total-episodes", str(8 * request.param)]
    process = started([*argv, "--output-dir", str(folder / "whole")])
    process.join()
    assert process.exitcode == 0
    return argv, folder / "whole"


def same_run(a, b):
    assert log(a) == log(b) and torch.equal(weights(a), weights(b))
    results = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
    assert all(row.pop("seconds") > 0 for row in results) and results[0] == results[1]
    assert results[0].keys() == {"before", "after", "interval", "examples"}


def num_lines(path):
    with contextlib.suppress(FileNotFoundError):  # the run may move it aside meanwhile
        return len(path.read_bytes().splitlines())
    return 0


def asides(folder):
    """Saves that are under way, or were when the run died."""
    # By inode, as a name comes again; scandir has it, where stat() may find the save just ended.
    with os.scandir(folder) if folder.exists() else contextlib.nullcontext([]) as found:
        return {entry.inode() for entry in found if entry.name.endswith(".tmp")}


def wait_for(kind, folder, process, rng):
    """Until the moment to kill: inside a save, while it starts, or an iteration or three later."""
    before, newest = asides(folder), max(checkpoints.checkpoints(folder), default=0)
    start, lines = time.time() + rng.uniform(0, 0.6), newest + rng.randint(0, 2)
    moments = {
        "save": lambda: asides(folder) - before,
        "start": lambda: time.time() > start,
        "later": lambda: num_lines(folder / "metrics.jsonl") > lines,
    }
    while not moments[kind]():
        assert process.is_alive(), kind
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.005))


@pytest.mark.parametrize(
    "to_kill,count", [(12, 3), pytest.param(48, 20, marks=pytest.mark.slow)], indirect=["to_kill"]
)
def test_kills_change_nothing(count, to_kill, tmp_path):
    """SIGKILL of each kind in turn: the finished run is the uninterrupted one, bit for bit."""
    argv, whole = to_kill
    rng, saves, folder = random.Random(0), 0, tmp_path / "run"
    kinds = itertools.islice(itertools.cycle(["save", "start", "later"]), count)
    for kind in [*kinds, None]:
        found, before = checkpoints.checkpoints(folder), asides(folder)
        process = started([*argv, *(["--resume"] if found else []), "--output-dir", str(folder)])
        if kind is not None:
            wait_for(kind, folder, process, rng)
            process.kill()
        process.join()
        saves += bool(asides(folder) - before)
        assert process.exitcode == (0 if kind is None else -signal.SIGKILL), kind
    assert saves >= count // 5, saves
    same_run(folder, whole)


@pytest.mark.parametrize("to_kill", [12], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, to_kill, tmp_path):
    argv, whole = to_kill
    folder = tmp_path / "run"
    process = started([*argv, "--save-steps", "0", "--output-dir", str(folder)], tmp_path / "out")
    while not num_lines(folder / "metrics.jsonl"):
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number and len(list(folder.glob("checkpoint-*"))) == 1
    out, name = (tmp_path / "out").read_text(), signal.Signals(number).name
    where = rf"stopped by {name} after iteration \d+ of 12: --resume {folder} goes on"
    assert re.search(where, out), out
    assert train.main(["--resume", str(folder)]) == 0
    same_run(folder, whole)


@pytest.mark.parametrize("to_kill", [12], indirect=True)
def test_a_run_whose_output_is_closed_goes_on(to_kill, tmp_path):
    """As behind `| head -1`."""
    argv, whole = to_kill
    folder, root = tmp_path / "run", Path(train.__file__).parent
    command = [sys.executable, root / "train.py", *argv, "--output-dir", folder]
    env = os.environ | {"PYTHONPATH": str(root / "tests")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, **pipes) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)
    same_run(folder, whole)


def test_a_run_in_another_thread_is_left_without_handlers():
    found = []

    def run():
        with checkpoints.stopping_on_signals() as received:
            found.append((received, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [([], before)]


def test_a_second_signal_ends_at_once_and_other_code_gets_its_handlers_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), checkpoints.stopping_on_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def status_of(pid, seconds=20):
    """The exit status of a child, -SIGNAL where that ended it; None where it goes on."""
    end = time.time() + seconds
    while time.time() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def forked(function):
    """The pid of a child that runs a function and exits with what it gives."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = function()
        finally:
            os._exit(status)
    return pid


def wait():
    time.sleep(10)
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_forked_child_has_the_signals_that_it_would_have_without_us(number):
    """As of a reward that runs code in a process: also one that is ended as soon as it began."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with checkpoints.stopping_on_signals() as received:
            for _ in range(20):
                pid = forked(wait)
                os.kill(pid, number)
                assert status_of(pid, seconds=2) == -number
            child = multiprocessing.get_context("fork").Process(target=wait)
            child.start()
            child.terminate()
            child.join(2)
            assert child.exitcode == -signal.SIGTERM and received == []
            os.kill(os.getpid(), number)
            assert received == [number]  # the run's own is what it was
        assert signal.getsignal(number) is signal.SIG_DFL
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) and not checkpoints.MASKS
    finally:
        signal.signal(number, before)


def test_a_forked_child_has_the_mask_that_its_parent_chose():
    """Workers that shall not hear of Ctrl-C are forked while it is blocked."""
    blocked = {signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        with checkpoints.stopping_on_signals():
            pid = forked(lambda: int(signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked))
            assert status_of(pid) == 1 and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_child_forked_in_a_thread_ends_on_a_signal():
    with checkpoints.stopping_on_signals() as received:
        pids = []
        thread = threading.Thread(target=lambda: pids.append(forked(wait)))
        thread.start()
        thread.join()
        os.kill(pids[0], signal.SIGTERM)
        assert status_of(pids[0], seconds=2) == -signal.SIGTERM and received == []


def enters(folder):
    """0 where a run may begin in a folder, 1 where another is there."""
    try:
        with checkpoints.alone_in(folder):
            return 0
    except InputError as error:
        assert str(error) == f"--output-dir: expected no other run in {folder}, found one"
        return 1


def test_two_runs_never_write_into_one_folder(tmp_path):
    with checkpoints.alone_in(tmp_path / "run"):
        assert status_of(forked(lambda: enters(tmp_path / "run"))) == 1
        assert status_of(forked(lambda: enters(tmp_path / "other"))) == 0
        # A try takes nothing away.
        assert status_of(forked(lambda: enters(tmp_path / "run"))) == 1
    assert status_of(forked(lambda: enters(tmp_path / "run"))) == 0
    assert enters(tmp_path / "run") == enters(tmp_path / "run") == 0
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("flag", ["--output-dir", "--resume"])
def test_a_second_run_is_one_line_and_changes_nothing(flag, finished, tmp_path, capsys):
    some_of(finished, tmp_path, "checkpoint-000024", "args.json", "metrics.jsonl", "warm_start")
    before = kept(tmp_path)
    read, write = os.pipe()

    def hold():
        with checkpoints.alone_in(tmp_path):
            os.write(write, b"x")
            return wait()

    pid = forked(hold)
    assert os.read(read, 1) == b"x"
    refused(capsys, [flag, str(tmp_path)], "--output-dir: expected no other run in", str(tmp_path))
    assert kept(tmp_path) == before
    os.kill(pid, signal.SIGKILL)
    assert status_of(pid) == -signal.SIGKILL
    assert enters(tmp_path) == 0  # a crash leaves nothing behind


def test_a_child_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    read, write = os.pipe()

    def hold():
        with checkpoints.alone_in(tmp_path):
            child = forked(wait)
            os.write(write, str(child).encode())
            return wait()

    pid = forked(hold)
    child = int(os.read(read, 20))
    os.kill(pid, signal.SIGKILL)
    assert status_of(pid) == -signal.SIGKILL
    os.kill(child, 0)  # it lives
    assert enters(tmp_path) == 0
    os.kill(child, signal.SIGKILL)


def test_an_output_folder_that_is_a_file_is_one_line_with_the_flag(tmp_path, capsys):
    (tmp_path / "file").write_text("precious\n")
    for name in ("file", "file/below"):
        found = ("--output-dir: expected a folder", str(tmp_path / name))
        refused(capsys, ["--output-dir", str(tmp_path / name)], *found)
    assert (tmp_path / "file").read_text() == "precious\n"


def test_where_there_are_no_locks_a_run_goes_on_without(tmp_path, monkeypatch):
    def refuse(*rest):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with checkpoints.alone_in(tmp_path):
        assert enters(tmp_path) == 0


@pytest.mark.soak
def test_half_an_hour_leaks_nothing(warm_start, tmp_path):
    """python -m pytest -m soak: from the fifth minute on, memory within 2 % and the same files."""
    minutes, seen = float(os.environ.get("SOAK_MINUTES", 30)), []
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGINT))

    def look():
        while timer.is_alive():
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((pages, len(os.listdir("/proc/self/fd"))))
            time.sleep(minutes)

    timer.start()
    threading.Thread(target=look, daemon=True).start()
    flags = "--total-episodes 10000000 --save-steps 50 --eval-steps 50"
    assert train_in(tmp_path, warm_start, *flags.split()) == 128 + signal.SIGINT
    memory, files = zip(*seen[len(seen) // 6 : -1])
    quarter = len(memory) // 4
    early, late = sum(memory[:quarter]) / quarter, sum(memory[-quarter:]) / quarter
    print(f"{early:.0f} -> {late:.0f} pages, {min(files)} to {max(files)} open files")
    assert abs(late / early - 1) < 0.02 and files[-1] <= files[0] + 2


def test_only_what_a_killed_run_left_is_cleared(warm_start, tmp_path):
    run, args = run_of(warm_start, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    for name in ("checkpoint-best.tmp", "checkpoint-000003.tmp", "checkpoint-000002.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5.tmp").write_text("a note")
    checkpoints.save_checkpoint(run, args)
    names = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert names == {"checkpoint-best.tmp", "checkpoint-5.tmp", "checkpoint-000000"}

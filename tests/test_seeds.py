"""experiments/seeds.py, with runs that take no time."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import train
from experiments import scripts, seeds
from harness.flags import parse_args


@pytest.fixture
def seeds_of(tmp_path, monkeypatch, capsys):
    """seeds.py in an empty house, with runs that take no time -> (status, what it said, runs)."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(scripts, "ROOT", tmp_path)
    monkeypatch.setattr(seeds, "RESULTS", tmp_path / "results")
    done = []

    def trained(what, flags):
        args, done_before = parse_args(flags), len(done)
        folder = Path(args.output_dir)
        folder.mkdir(parents=True)
        scores = {"before": {"score": 0.25}, "after": {"score": 0.5 + done_before / 8}}
        (folder / "args.json").write_text(json.dumps({"flags": vars(args)}))
        (folder / "results.json").write_text(json.dumps(scores))
        (folder / "metrics.jsonl").write_text('{"iteration": 1, "objective/kl": 0, "lr": 1}\n')
        done.append((args.algo, args.seed))

    def run(*flags):
        monkeypatch.setattr(scripts, "train_quietly", trained)
        monkeypatch.setattr(sys, "argv", ["seeds.py", "--seeds", "2", *flags])
        try:
            seeds.main()
            status = 0
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return status, said.out + said.err, done

    return run


def test_seeds_run_once_each_and_are_one_table(seeds_of):
    runs = [("ppo", 0), ("grpo", 0), ("ppo", 1), ("grpo", 1)]
    for _ in range(2):  # the second time everything is there
        status, said, done = seeds_of("--algos", "ppo", "grpo", "ppo")
        assert status == 0 and done == runs
        # ppo 0.5 and 0.75, grpo 0.625 and 0.875; Student's t of two is 12.71.
        cells = "score 0.250 ±0.000 0.625 ±1.589 0.750 ±1.589 -0.125 ±0.000"
        assert cells in " ".join(said.split())


def test_finished_rows_stay_as_they_are_and_others_are_added(seeds_of, tmp_path, monkeypatch):
    """Of fewer seeds or algorithms, too; what was run at one commit is not of another."""
    assert seeds_of("--algos", "ppo")[0] == 0
    rows = (tmp_path / "results" / "default.jsonl").read_text()
    monkeypatch.setattr(scripts, "current_commit", lambda: "another")
    status, _, done = seeds_of("--algos", "grpo")
    assert status == 0 and done[2:] == [("grpo", 0), ("grpo", 1)]
    found = (tmp_path / "results" / "default.jsonl").read_text()
    assert found.startswith(rows) and found.count("another") == 2
    assert seeds_of("--algos", "ppo")[0] == 0
    assert (tmp_path / "results" / "default.jsonl").read_text() == found


def test_seeds_of_a_run_that_was_resumed_or_moved_are_read(seeds_of, tmp_path):
    assert seeds_of("--algos", "ppo")[0] == 0
    (tmp_path / "results" / "default.jsonl").unlink()
    path = tmp_path / "runs" / "default-ppo-seed1" / "args.json"
    saved = json.loads(path.read_text())
    saved["flags"] |= {"output_dir": "runs/default-ppo-seed1", "of old": 1}
    path.write_text(json.dumps(saved))
    assert seeds_of("--algos", "ppo")[0] == 0


@pytest.mark.parametrize(
    ("status", "ended", "expected"),
    [(1, 2, "error: ppo, seed 0: train.py: error: a disk is full"), (130, 130, "stopped")],
)
def test_a_run_that_fails_or_is_stopped_ends_seeds_in_one_line(
    tmp_path, monkeypatch, capsys, status, ended, expected
):
    def main(flags):
        print("train.py: error: a disk is full", file=sys.stderr)
        return status

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(scripts, "ROOT", tmp_path)
    monkeypatch.setattr(seeds, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["seeds.py", "--seeds", "2", "--algos", "ppo"])
    with pytest.raises(SystemExit) as found:
        seeds.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert (found.value.code, said) == (ended, f"seeds.py: {expected}")


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("--algos ppo grpo -- --lam 0.5", "--name: expected one for a run with further flags"),
        (
            "--name a --algos ppo -- --lam 0.5",
            "flags as now or a new --name, found other lam",
        ),
        ("--name noise --algos ppo", "noise.jsonl, line 1: expected a JSON object with seed"),
        ("--algos a2c", "invalid choice: 'a2c'"),
        ("--name new --algos ppo -- --seed 3", "found one that is set here"),
        ("--name new --algos ppo -- --algo grpo", "found one that is set here"),
        ("--name noise-x --algos ppo", "--name: no path, noise-* or setting-* expected, fou"),
        ("--name ../x --algos ppo", "--name: no path, noise-* or"),
        ("--seeds 1", "--seeds: expected a whole number in [2, inf), found '1'"),
    ],
)
def test_seeds_leave_other_runs_and_results_alone(seeds_of, tmp_path, flags, found):
    for name in ("a", "moved"):
        assert seeds_of("--name", name, "--algos", "ppo")[0] == 0
    for folder in (tmp_path / "runs").glob("moved-*"):
        shutil.rmtree(folder)
    (tmp_path / "results" / "noise.jsonl").write_text('{"method": "ppo", "seed": 0}\n')
    before = {path: path.read_text() for path in (tmp_path / "results").iterdir()}
    status, said, done = seeds_of(*flags.split())
    assert status == 2 and found in said and len(said.splitlines()) == 1 and len(done) == 4
    assert {path: path.read_text() for path in (tmp_path / "results").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "damaged", "found"),
    [
        ("results.json", "{", "seed1: expected a finished run: Expecting"),
        ("results.json", "[]", "seed1: expected a finished run: 'list' object is not"),
        ("results.json", '{"before": {"score": 0.5}}', "seed1: expected a finished run: 'after'"),
        ("results.json", '{"before": {"score": 0.5}, "after": {"score": "x"}}', "another after"),
        ("results.json", '{"before": {"score": 0.5}, "after": null}', "another after, found None"),
        ("results.json", '{"before": {}, "after": {"score": 0.5}}', "seed 1: expected 'score'"),
        ("results.json", '{"before": {"score": 0.5}, "after": {}}', "seed 1: expected 'score'"),
        ("args.json", '{"flags": 3}', "seed1: expected a finished run: 'int' object is not"),
        ("args.json", "{}", "seed1: expected a finished run: 'flags'"),
        ("metrics.jsonl", "torn", "metrics.jsonl, line 1: expected a JSON object"),
    ],
)
def test_a_damaged_run_folder_is_one_line(seeds_of, tmp_path, name, damaged, found):
    assert seeds_of("--algos", "ppo")[0] == 0
    (tmp_path / "results" / "default.jsonl").unlink()
    (tmp_path / "runs" / "default-ppo-seed1" / name).write_text(damaged)
    status, said, done = seeds_of("--algos", "ppo")
    *bar, said = said.splitlines()  # of progress
    assert status == 2 and said.startswith("seeds.py: error: ") and found in said, said
    assert all(line.startswith("runs: ") for line in bar if line), bar

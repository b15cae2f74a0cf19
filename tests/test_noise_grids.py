"""experiments/noise.py: warm starts that processes share, grids, runs and tables."""

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from common import DAMAGED, refused_by, script, write_rows

from experiments import noise
from experiments.tables import read_rows
from harness.flags import parse_args
from tasks import InputError, as_messages


def test_a_new_warm_start_is_made_once_by_processes_that_begin_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    making = []

    def make(task, seed, folder):
        if not (folder / "settings.json").exists():
            making.append((task, seed))
            folder.mkdir()
            time.sleep(0.2)  # the others come
            (folder / "settings.json").write_text("whole")

    def found(number):
        with noise.run_folder(3) as folder:
            return folder, (folder / "warm_start" / "settings.json").read_text()

    monkeypatch.setattr(noise, "warm_start", make)
    with ThreadPoolExecutor(3) as pool:  # each opens the lock for itself
        folders, texts = zip(*pool.map(found, range(3)))
    assert making == [("dialogue", 3)] and texts == ("whole",) * 3
    assert len({*folders}) == 3 and not any(folder.exists() for folder in folders)
    assert (tmp_path / "runs" / "warm-dialogue-seed3" / "settings.json").exists()


def test_strata_by_hand():
    prompts = []
    for said in ("food thai", "day monday day sunday", "food thai day friday"):
        words = said.split()
        messages = [turn for at in range(0, len(words), 2) for turn in turns_of(words[at : at + 2])]
        prompts.append(messages + as_messages("book"))
    strata = noise.by_stratum(prompts, torch.tensor([1.0, 0.0, 1.0]))
    turns, changes = {"1 turns": [1, 1], "2 turns": [1, 2]}, {"0 changes": [2, 2]}
    assert strata == turns | changes | {"1 changes": [0, 1]}
    # 2/3 in all; 1 of one and 1/2 of two: (1/9 + 2/36) / 3 = 1/18.
    assert noise.unevenness(strata, "turns") == pytest.approx(18**-0.5)
    assert noise.unevenness(strata, "changes") == pytest.approx((2 / 9) ** 0.5)


def turns_of(words):
    return as_messages(" ".join(words)) + as_messages("ok", "assistant")


@pytest.mark.slow
def test_the_laboratory_runs_skips_what_is_finished_and_prints_paired_differences(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in (["--seeds", "1"], []):
        monkeypatch.setattr(sys, "argv", ["noise.py", "--grid", "quick", "--jobs", "2", *words])
        noise.main()
        said = capsys.readouterr()
        assert "2/2" in said.err
    assert len(read_rows(tmp_path / "noise-quick.jsonl")) == 4
    rows = [line for line in said.out.splitlines() if line.startswith("none")]
    assert len(rows) == 2 and "0.000 ±0.000" in rows[0]
    # As a process of its own, on the rows that the repository holds.
    done = script("experiments/noise.py", "--table", "--seeds", "2")
    assert done.returncode == 0 and "averaged" in done.stdout and not done.stderr


@pytest.mark.slow
def test_a_failing_run_is_one_line_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    monkeypatch.setitem(noise.NOISES, "odd", "--reward-noise-fp 7")  # argparse exits
    small = "--total-episodes 16 --batch-size 16 --critic-warmup-steps 1 --eval-samples 8"
    monkeypatch.setattr(noise, "QUICK", small)
    grid = ({"ppo": "--algo ppo"}, ("odd", "none"), range(1))
    monkeypatch.setitem(noise.GRIDS, "quick", grid)
    monkeypatch.setattr(sys, "argv", ["experiments/noise.py"])
    assert noise.run_grid("quick", 1, [0]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "expected" in line]
    assert len(said) == 1 and said[0].startswith("noise.py: ") and "--reward-noise-fp" in said[0]
    assert "expected a number in [0, 1], found '7'" in said[0]
    (row,) = read_rows(tmp_path / "noise-quick.jsonl")
    assert row["noise"] == "none" and row["seed"] == 0
    # The strata are of the policy that the run ended with, and of its greedy answers.
    turns = [own for name, own in row["strata after"].items() if "turns" in name]
    right, count = map(sum, zip(*turns))
    splits = [row["after"][name] for name in noise.SPLITS]
    assert count == 16 and right / count == pytest.approx(sum(splits) / 2)


@pytest.mark.parametrize(
    "flags,found",
    [
        (["--jobs", "0"], "--jobs: expected a whole number in [1, inf), found '0'"),
        (["--grid", "rain"], "--grid: invalid choice: 'rain'"),
        (["--table", "--reference", "rain"], "--reference: expected one of 'ppo', 'dvpo', "),
    ],
)
def test_the_laboratorys_bad_flags_are_one_line(flags, found, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["noise.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        noise.main()
    (said,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and found in said


def test_windows_by_hand():
    assert noise.windows([1, 2, 3, 4, 5, None, 7, 8, 9, 10, 11]) == [3, 8.5]
    assert noise.windows([None] * 5) == [None]


def table_rows():
    """DVPO and PPO share seeds 0 and 1; others had one run, another budget, or trial seeds."""
    runs = [
        ("ppo", 0, 0.25),
        ("ppo", 1, 0.75),
        ("dvpo", 0, 0.5),
        ("dvpo", 1, 0.75),
        ("dvpo", 2, 0.0),
        ("robust", 0, 1.0),
        ("grpo", 100, 0.5),
    ]
    rows = []
    for method, seed, score in runs:
        outside = 0.3 + 0.1 * (method == "dvpo")
        after = {"in domain, greedy": score, "out of domain, greedy": outside}
        after |= {"in domain, sampled": 0.0, "out of domain, sampled": 0.1}
        before = {"in domain, greedy": seed, "out of domain, greedy": 0}
        before["in domain, sampled"] = len(rows)
        row = {"flags": noise.flags_of("main", method, "none"), "seed": seed, "before": before}
        rows.append({**row, "after": after, "ev": [0.0, 0.25]})
    other = rows[-1]["flags"].replace("7680", "12800")
    return rows + [{**row, "flags": other} for row in rows[:2]]


def test_tables_pair_seeds_and_leave_out_runs_of_other_flags(tmp_path, monkeypatch):
    """In domain 0.5 - 0.25 and 0.75 - 0.75, out of domain 0.1 more for DVPO."""
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    rows = table_rows()
    for number, part in enumerate((rows[:3], rows[3:])):  # whichever grid made them
        write_rows(tmp_path / f"noise-{number}.jsonl", part)
    ppo, dvpo = noise.summarise(noise.current("main"), "ppo")
    assert (ppo[:3], dvpo[:3]) == (("none", "ppo", [0, 1]), ("none", "dvpo", [0, 1]))
    assert dvpo[3]["in domain, greedy"][0] == 0.625
    assert ppo[3]["in domain, greedy"][2:] == (0, 0)
    assert dvpo[3]["in domain, greedy"][2:] == pytest.approx((0.125, 12.71 / 8))
    assert dvpo[3]["out of domain, greedy"][2:] == pytest.approx((0.1, 0), abs=1e-9)
    assert dvpo[3]["all four"][0] == pytest.approx((0.625 + 0.4 + 0.1) / 4)
    assert ppo[4] == dvpo[4] == 0.25
    # Minus DVPO, and over its seeds.
    turned, _ = noise.summarise(noise.current("main"), "dvpo")
    assert turned[3]["in domain, greedy"][2] == pytest.approx(-0.125)
    rows[0]["before"]["out of domain, greedy"] = 7
    write_rows(tmp_path / "noise-0.jsonl", rows[:3])
    with pytest.raises(InputError, match="results: none, ppo: expected the warm start of dvpo"):
        noise.summarise(noise.current("main"), "dvpo")
    with pytest.raises(
        InputError, match="results: none, dvpo: expected the warm start of ppo, fou"
    ):
        noise.summarise(noise.current("main"), "ppo")
    (tmp_path / "noise-1.jsonl").write_text('{"torn": ')
    with pytest.raises(InputError, match="noise-1.jsonl, line 1: expected a JSON object"):
        noise.current("main")


@pytest.mark.parametrize("damage", DAMAGED, ids=str)
def test_a_damaged_run_ends_the_table_in_one_line(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    rows = table_rows()
    write_rows(tmp_path / "noise-a.jsonl", [*rows[:3], rows[3] | damage])
    (key,) = damage
    expected = f"noise.py: error: {tmp_path / 'noise-a.jsonl'}, row 4: expected another {key}, foun"
    assert refused_by(noise, capsys, monkeypatch, "--table").startswith(expected)


def test_a_run_that_lacks_a_score_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    for gone in ("in domain, greedy", "out of domain, greedy"):
        rows = table_rows()
        del rows[3]["after"][gone]
        write_rows(tmp_path / "noise-a.jsonl", rows)
        found = refused_by(noise, capsys, monkeypatch, "--table")
        assert f"none, dvpo, seed 1: expected '{gone}', found none" in found


def test_a_table_says_where_it_looked_and_takes_so_many_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    assert str(tmp_path / "noise-*.jsonl") in refused_by(noise, capsys, monkeypatch, "--table")
    rows = table_rows()
    for row in rows:
        row["seed"] += 20
    rows += [rows[0] | {"seed": 22, "before": rows[4]["before"]}]
    write_rows(tmp_path / "noise-a.jsonl", rows)
    for words, counts in (([], ["3", "3"]), (["--seeds", "2"], ["2", "2"])):
        monkeypatch.setattr(sys, "argv", ["noise.py", "--table", *words])
        noise.main()
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [row[2] for row in table if row[:1] == ["none"]] == counts
    assert "found fewer" in refused_by(noise, capsys, monkeypatch, "--table", "--seeds", "1")


@pytest.mark.parametrize("grid", noise.GRIDS)
def test_every_grid_has_flags_that_train_py_takes_and_a_table(grid, capsys):
    """Of the runs that results/ holds: none yet of the second edition."""
    methods, noises, _ = noise.GRIDS[grid]
    for method, kind in itertools.product(methods, noises):
        args = parse_args(noise.flags_of(grid, method, kind).split())
        assert args.critic_warmup_steps < args.total_episodes / args.batch_size
    reference = next(iter(methods))
    table = noise.summarise(noise.current(grid), reference)
    assert {row[:2] for row in table} <= set(itertools.product(noises, methods))
    noise.print_table(table, reference)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.count("±") > 1]
    assert len({line.index("±") for line in lines}) <= 1


def test_the_learning_rates_are_those_that_tuning_found(monkeypatch):
    """Recomputed from the results that the repository holds; a later file's runs count."""
    files = ("first-noise-tuning", "noise-form", "noise-tune", "noise-tuning")
    rows = [row for name in files for row in read_rows(noise.RESULTS / f"{name}.jsonl")]
    for row in rows:
        # As today's form was called when it was chosen.
        row["flags"] = row["flags"].replace("tanh-sd", "spread")
    monkeypatch.setattr(noise, "finished_runs", lambda: rows)
    found, mean = noise.current("tuning"), {}
    for method in noise.TRIED:
        kinds = noise.GRIDS["tuning"][1]
        runs = [run for kind in kinds for run in found[kind, method].values()]
        assert len(runs) == 4
        splits = ("in domain, greedy", "in domain, sampled")
        mean[method] = sum(run["after"][split] for run in runs for split in splits)
    for name, flags in noise.ALL.items():
        rates = {mean[f"{name}, lr {rate}"]: rate for rate in noise.LEARNING_RATES}
        assert f"--learning-rate {rates[max(rates)]}" in flags


def test_the_average_over_noises_is_of_the_seeds_that_all_have():
    def run(score, **more):
        return {"before": {"a": 0.25}, "after": {"a": score, **more}, "ev": [0.0]}

    found = {
        ("x", "ppo"): {0: run(0.5), 1: run(1.0), 2: run(0.0)},
        ("y", "ppo"): {0: run(0.25, b=1.0), 1: run(0.0)},
        ("x", "dvpo"): {1: run(0.75)},
        ("y", "dvpo"): {1: run(0.25)},
    }
    own = noise.averaged(found)
    means = {seed: row["after"] for seed, row in own["averaged", "ppo"].items()}
    assert means == {0: {"a": 0.375}, 1: {"a": 0.5}}
    assert own["averaged", "ppo"][0]["before"] == {"a": 0.25}
    assert own["averaged", "dvpo"] == {1: {"before": {"a": 0.25}, "after": {"a": 0.5}}}


def test_a_grids_critics_have_200_quantiles_and_a_folder_may_have_a_space(tmp_path):
    flags = noise.flags_of("main", "dvpo", "none")
    args = parse_args(noise.seeded(flags, 7, tmp_path / "a b"))
    assert (args.num_quantiles, args.seed, args.reward_noise_seed) == (200, 7, 7)
    assert args.output_dir == str(tmp_path / "a b")
    # Else they would have a built-in model's.
    assert parse_args(flags.split()).num_quantiles == 50

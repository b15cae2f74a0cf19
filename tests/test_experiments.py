"""experiments/: the scripts run, at sizes of seconds."""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import MODEL, write_rows
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from experiments import (
    evaluate,
    noise,
    seeds,
    settings,
    tables,
)
from experiments.tables import read_rows
from harness.flags import parse_args
from tasks import InputError
from tasks.booking import SLOTS

ROOT = Path(__file__).parent.parent


def script(*words):
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


# ---- seeds.py


@pytest.fixture
def seeds_of(tmp_path, monkeypatch, capsys):
    """seeds.py in an empty house, with runs that take no time -> (status, what it said, runs)."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(seeds, "ROOT", tmp_path)
    monkeypatch.setattr(seeds, "RESULTS", tmp_path / "results")
    done = []

    def trained(flags):
        args, done_before = parse_args(flags), len(done)
        folder = Path(args.output_dir)
        folder.mkdir(parents=True)
        scores = {"before": {"score": 0.25}, "after": {"score": 0.5 + done_before / 8}}
        (folder / "args.json").write_text(json.dumps({"flags": vars(args)}))
        (folder / "results.json").write_text(json.dumps(scores))
        (folder / "metrics.jsonl").write_text('{"iteration": 1, "objective/kl": 0, "lr": 1}\n')
        done.append((args.algo, args.seed))

    def run(*flags):
        monkeypatch.setattr(seeds, "train_quietly", trained)
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


def test_seeds_of_a_run_that_was_resumed_or_moved_are_read(seeds_of, tmp_path):
    assert seeds_of("--algos", "ppo")[0] == 0
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

    monkeypatch.setattr(seeds.train, "main", main)
    monkeypatch.setattr(seeds, "ROOT", tmp_path)
    monkeypatch.setattr(seeds, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["seeds.py", "--seeds", "2", "--algos", "ppo"])
    with pytest.raises(SystemExit) as found:
        seeds.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert (found.value.code, said) == (ended, f"seeds.py: {expected}")


def test_nothing_stands_behind_two_dashes_where_no_flags_are_passed_on(monkeypatch, capsys):
    words = ["evaluate.py", "x", "--set", "y", "math", "--", "--lam", "0.5"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2
    assert "expected nothing behind --, found --lam" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("--algos ppo grpo -- --lam 0.5", "and a --name for a run with further flags"),
        (
            "--name a --algos ppo -- --lam 0.5",
            "flags as now or a new --name, found other lam",
        ),
        ("--name a --algos grpo", "--name: expected a new one, found other runs in"),
        ("--name noise --algos ppo", "noise.jsonl, line 1: expected a JSON object with seed"),
        ("--algos a2c", "invalid choice: 'a2c'"),
        ("--name new --algos ppo -- --seed 3", "found one that is set here"),
        ("--name new --algos ppo -- --algo grpo", "found one that is set here"),
        ("--name noise-x --algos ppo", "--name: no path, noise-* or setting-* expected, fou"),
        ("--name ../x --algos ppo", "--name: no path, noise-* or"),
        ("--seeds 1", "expected at least 2 --seeds"),
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
    assert status == 2 and found in said.splitlines()[-1] and len(done) == 4
    assert {path: path.read_text() for path in (tmp_path / "results").iterdir()} == before


# ---- noise.py's warm starts, which processes share


@pytest.mark.parametrize("other_is_first", [False, True])
def test_a_new_warm_start_is_there_whole_and_once(tmp_path, monkeypatch, other_is_first):
    monkeypatch.chdir(tmp_path)
    kept, copytree = tmp_path / "runs" / "warm-dialogue-seed3", shutil.copytree

    def copied_while_another_process_ends(source, target, **options):
        copytree(source, target, **options)
        assert not kept.exists()
        if other_is_first:
            copytree(source, kept)
            (kept / "settings.json").write_text("other")

    with noise.run_folder(3) as folder:
        (folder / "warm_start").mkdir()
        (folder / "warm_start" / "settings.json").write_text("own")
        monkeypatch.setattr(shutil, "copytree", copied_while_another_process_ends)
    monkeypatch.setattr(shutil, "copytree", copytree)
    assert [*kept.parent.iterdir()] == [kept]
    found = "other" if other_is_first else "own"
    assert (kept / "settings.json").read_text() == found
    with noise.run_folder(3) as folder:
        assert (folder / "warm_start" / "settings.json").read_text() == found


# ---- the noise laboratory


@pytest.mark.slow
def test_the_laboratory_runs_skips_what_is_finished_and_prints_paired_differences():
    shutil.rmtree(ROOT / "runs" / "noise-quick", ignore_errors=True)
    quick = ("experiments/noise.py", "--grid", "quick", "--jobs", "2")
    done = script(*quick, "--seeds", "1")
    assert done.returncode == 0 and "2/2" in done.stderr, done.stderr[-2000:]
    done = script(*quick)
    assert done.returncode == 0 and "2/2" in done.stderr, done.stderr[-2000:]
    assert len(read_rows(ROOT / "runs" / "noise-quick" / "noise-quick.jsonl")) == 4
    rows = [line for line in done.stdout.splitlines() if line.startswith("none")]
    assert len(rows) == 2 and "0.000 ±0.000" in rows[0]


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


def test_rows_are_read_past_blank_lines_and_end_where_json_ends_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n{"b": 2}\n\n')
    assert read_rows(path) == [{"a": "x\u2028y"}, {"b": 2}]
    path.write_bytes(b'{"a": 1}\n\n\xff\n')
    with pytest.raises(InputError, match="line 3: expected a JSON object, found"):
        read_rows(path)
    path.write_text('{"a": 1, "b": 2}\n{"a": 1}\n')
    assert len(read_rows(path, "a")) == 2
    with pytest.raises(InputError, match="line 2: expected a JSON object with a, b, found '.\"a"):
        read_rows(path, "a", "b")


@pytest.mark.parametrize(
    "rows,found",
    [
        (['{"seed": NaN}'], "row 1: expected another seed, found nan"),
        (['{"seed": "20"}'], "row 1: expected another seed, found '20'"),
        (['{"seed": 20.5}'], "row 1: expected another seed, found 20.5"),
        (['{"seed": -1}'], "row 1: expected another seed, found -1"),
        (['{"after": {"a": NaN}}'], "row 1: expected another after, found {'a': nan}"),
        (['{"after": {"a": 1e400}}'], "row 1: expected another after, found {'a': inf}"),
        (['{"seed": 1, "ev": [1]}', '{"seed": 1, "ev": [2]}'], "row 2: .* found row 1 again"),
        (["[" * 100_000], "line 1: expected a JSON object"),
    ],
)
def test_a_run_that_is_damaged_or_twice_is_one_line(rows, found, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(InputError, match=found):
        tables.read_results(path)


def test_runs_get_the_mean_of_all_four_accuracies_and_a_byte_order_mark_is_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    three = {"in domain, greedy": 1, "in domain, sampled": 0, "out of domain, greedy": 0}
    four = three | {"out of domain, sampled": 1, "foreseen": 7}
    lines = [json.dumps({"seed": seed, "after": own}) for seed, own in enumerate((four, three))]
    path.write_text("\n".join(lines), "utf-8-sig")
    rows = tables.read_results(path, "seed")
    assert rows[0]["after"]["all four"] == 0.5
    # Fewer have no such mean, under no name.
    assert rows[1]["after"] == three


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_row_is_added_on_a_line_of_its_own(tmp_path, end):
    path = tmp_path / "rows.jsonl"
    tables.add_row(path, {"a": 1})
    path.write_text(path.read_text().rstrip() + end)
    tables.add_row(path, {"b": 2})
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'


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
    assert stopped.value.code == 2 and found in capsys.readouterr().err.splitlines()[-1]


def test_windows_by_hand():
    assert noise.windows([1, 2, 3, 4, 5, None, 7, 8, 9, 10, 11]) == [3, 8.5]
    assert noise.windows([None] * 5) == [None]


def test_the_interval_is_students():
    """1, 2, 3: standard error 1 / sqrt(3), t(2) = 4.30."""
    assert tables.interval([1.0, 2.0, 3.0]) == (2, pytest.approx(4.30 / 3**0.5))


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


def refused(script, capsys, monkeypatch, *words):
    """The line with which a script ends, status 2."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__.split('.')[-1]}.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2, said
    return said[-1]


DAMAGED = [
    *({when: value} for when in ("before", "after") for value in (None, 3, [1], {"a": "x"})),
    *({"after": {"in domain, greedy": value}} for value in (None, True, [0.5])),
    {"seed": "0"},
    {"seed": None},
    {"flags": 7},
    {"method": 7},
    {"noise": ["none"]},
    {"ev": ["x"]},
    {"ev": 7},
    {"ev": {}},
]


@pytest.mark.parametrize("damage", DAMAGED, ids=str)
def test_a_damaged_run_ends_its_table_in_one_line(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    monkeypatch.setattr(settings, "RESULTS", tmp_path)
    rows = table_rows()
    write_rows(tmp_path / "noise-a.jsonl", [*rows[:3], rows[3] | damage])
    (key,) = damage
    expected = f"noise.py: error: {tmp_path / 'noise-a.jsonl'}, row 4: expected another {key}, foun"
    assert refused(noise, capsys, monkeypatch, "--table").startswith(expected)
    start, *rows = setting_rows()
    write_rows(tmp_path / "setting-a.jsonl", [start, *rows, rows[0] | damage])
    expected = (
        f"setting-a.jsonl, row {len(rows) + 2}: expected another {key}, found {damage[key]!r}"
    )
    assert expected in refused(settings, capsys, monkeypatch, "a", "--table")


def test_a_run_that_lacks_a_score_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    monkeypatch.setattr(settings, "RESULTS", tmp_path)
    for gone in ("in domain, greedy", "out of domain, greedy"):
        rows = table_rows()
        del rows[3]["after"][gone]
        write_rows(tmp_path / "noise-a.jsonl", rows)
        found = refused(noise, capsys, monkeypatch, "--table")
        assert f"none, dvpo, seed 1: expected '{gone}', found none" in found
    rows = setting_rows()
    rows[-1]["after"] = {}
    write_rows(tmp_path / "setting-a.jsonl", rows)
    found = refused(settings, capsys, monkeypatch, "a", "--table")
    assert "verifier, grpo, seed 1: expected 'greedy', found none" in found
    for damage in ({"method": "a2c"}, {"noise": "rain"}):
        write_rows(tmp_path / "setting-a.jsonl", [*setting_rows(), rows[1] | damage])
        found = refused(settings, capsys, monkeypatch, "a", "--table")
        assert f"row 7: expected another {[*damage][0]}, found {[*damage.values()][0]!r}" in found


def test_a_table_says_where_it_looked_and_takes_the_seeds_that_it_is_given(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    monkeypatch.setattr(settings, "RESULTS", tmp_path)
    assert str(tmp_path / "noise-*.jsonl") in refused(noise, capsys, monkeypatch, "--table")
    rows = table_rows()
    for row in rows:
        row["seed"] += 20
    rows += [rows[0] | {"seed": 22, "before": rows[4]["before"]}]
    write_rows(tmp_path / "noise-a.jsonl", rows)
    write_rows(tmp_path / "setting-a.jsonl", setting_rows())
    for words, counts in (([], ["3", "3"]), (["--seeds", "2"], ["2", "2"])):
        monkeypatch.setattr(sys, "argv", ["noise.py", "--table", *words])
        noise.main()
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [row[2] for row in table if row[:1] == ["none"]] == counts
    assert "found fewer" in refused(noise, capsys, monkeypatch, "--table", "--seeds", "1")
    words = ["settings.py", "a", "--table", "--seeds", "1", "2", "--methods", "ppo"]
    monkeypatch.setattr(sys, "argv", words)
    settings.main()
    *_, ppo = capsys.readouterr().out.splitlines()
    assert ppo.split()[:4] == ["verifier", "ppo", "2", "0.750"]


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
        row["flags"] = row["flags"].replace("--readout tanh-sd", noise.BOUND)
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


# ---- settings.py

OTHER = settings.TRUE["other"]


@pytest.mark.slow
def test_a_setting_is_run_skipped_when_finished_and_printed(model_folder, tmp_path, capsys):
    rows = [{"prompt": f"area {value}", "answer": value} for value in SLOTS["area"]]
    for name in ("train", "held", "other"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    own = argparse.Namespace(data=tmp_path, model=model_folder, kinds=["none"], seeds=[0], jobs=1)
    own.flags, own.methods = [*MODEL, "--reward", "exact"], ["ppo"]
    target = tmp_path / "setting.jsonl"
    names = ["held out, greedy", "held out, sampled"]
    for _ in range(2):
        assert settings.run_grid(own, target) == 0
        start, ppo = read_rows(target)
        assert start["method"] == "start" and [*start["after"]] == [*settings.TRUE.values()]
        assert [*ppo["before"]] == names and [*ppo["after"]] == [*names, OTHER]
        assert len(ppo["true"]) == 1 and ppo["commit"]
    config = AutoConfig.from_pretrained(model_folder, num_labels=2, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "judge")
    own.kinds = ["judge"]
    assert settings.run_grid(own, target) == 0
    judged = read_rows(target)[-1]
    # Paid by the judge, a probability; measured by the reward of the flags.
    names = [f"judge, {name}" for name in names]
    assert judged["flags"][-1] == f"model:{tmp_path / 'judge'}"
    assert [*judged["before"]] == names and [*judged["after"]] == [*names, *start["after"]]
    assert all(0 < judged["after"][name] < 1 for name in names)
    for rows in ([start, ppo, judged, judged | {"seed": 1}], [start, judged, judged | {"seed": 1}]):
        settings.print_table(rows)
        table = capsys.readouterr().out.splitlines()
        assert table[-1].startswith("judge     ppo           2 ") and len(table) == 3
    own.flags += ["--gamma", "0.5"]
    with pytest.raises(InputError, match="start, none, seed 0: expected flags as now, found --mod"):
        settings.run_grid(own, target)
    with pytest.raises(InputError, match="expected a start and finished runs, found others"):
        settings.print_table([start])


def test_true_scores_are_of_the_files_that_they_are_named_after(monkeypatch):
    def scored(name, rewards, args):
        return [{"score": len(file)} for file, _ in args.set]

    monkeypatch.setattr(settings.evaluate, "evaluate", scored)
    flags = ["--reward", "exact", "--eval-samples", "8"]
    own = argparse.Namespace(data=Path("d"), model="m", flags=flags)
    both = {"held out, greedy, fp32": len("d/held.jsonl"), OTHER: len("d/other.jsonl")}
    assert settings.true_scores("m", own, settings.TRUE) == both
    assert settings.true_scores("m", own, ["other"]) == {OTHER: len("d/other.jsonl")}


def setting_rows():
    before = {"greedy": 0.25}
    rows = [{"noise": "none", "method": "start", "seed": 0, "after": {OTHER: 0.125}, "flags": []}]
    for method, scores in {"ppo": (0.5, 0.6, 0.9), "grpo": (0.5, 0.8)}.items():
        for seed, score in enumerate(scores):
            row = {"noise": "verifier", "method": method, "seed": seed, "before": before}
            rows.append({**row, "after": {"greedy": score, OTHER: 0.0}, "flags": ["--lam", "1"]})
    return rows


def test_a_settings_table_pairs_seeds_with_ppos(capsys):
    settings.print_table(setting_rows())
    head, start, ppo, grpo = (line.split() for line in capsys.readouterr().out.splitlines())
    assert start == ["start", "0.250", "0.125"]
    assert ppo[:6] == ["verifier", "ppo", "3", "0.667", "±0.517", "+0.000"]
    # Seeds 0 and 1: 0.65 and 0.1, and 12.71 standard errors: 0.15, 0.1.
    assert grpo[:7] == ["verifier", "grpo", "2", "0.650", "±1.907", "+0.100", "±1.271"]


@pytest.mark.parametrize(
    "flags,found",
    [
        (["--kinds", "rain"], "argument --kinds: invalid choice: 'rain'"),
        ([], "expected --model and train.py's flags behind --, or --table"),
        (["--model", "nowhere", "--", "--reward", "exact"], "expected a file"),
        (["--model", "m", "--kinds", "judge", "--", "--reward", "exact"], "expected a file"),
        (["--model", "m", "--kinds", "judge", "--", "--lam", "0.5"], "--reward: expected one with"),
        # A value may be called as a flag is.
        (["--model", "m", "--", "--reward", "exact", "--prompt-column", "user"], "expected a file"),
        (["--methods", "a2c"], "argument --methods: invalid choice: 'a2c'"),
        (["--model", "nowhere", "--", "--algo=grpo"], "--algo=grpo: expected another flag"),
        (
            ["--model", "m", "--", "--reward_noise-outlier", "1", "3"],
            "noise-outlier: expected anot",
        ),
        (
            ["--model", "m", "--", "--pseudo-label-noise=1"],
            "--pseudo-label-noise=1: expected anoth",
        ),
        (["--model", "nowhere", "--", "--lerning-rate", "1"], "--lerning-rate"),
        (["--seeds", "-1"], "--seeds: expected a whole number in [0, 2e9], found '-1'"),
        (["--table"], "No such file"),
    ],
)
def test_a_settings_bad_flags_are_one_line(flags, found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["settings.py", str(tmp_path / "none"), *flags])
    with pytest.raises(SystemExit) as stopped:
        settings.main()
    assert stopped.value.code == 2 and found in capsys.readouterr().err.splitlines()[-1]


def test_a_grids_critics_have_200_quantiles_and_a_folder_may_have_a_space(tmp_path):
    flags = noise.flags_of("main", "dvpo", "none")
    args = parse_args(noise.seeded(flags, 7, tmp_path / "a b"))
    assert (args.num_quantiles, args.seed, args.reward_noise_seed) == (200, 7, 7)
    assert args.output_dir == str(tmp_path / "a b")
    # Else they would have a built-in model's.
    assert parse_args(flags.split()).num_quantiles == 50

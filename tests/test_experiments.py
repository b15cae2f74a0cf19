"""experiments/: the scripts run, at sizes of seconds."""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import MODEL, write_rows
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
)

from experiments import (
    dialogue,
    evaluate,
    figures,
    memory,
    noise,
    on_gpu,
    pseudo_labels,
    reward_model,
    seeds,
    settings,
    tables,
)
from experiments.tables import read_rows
from harness.flags import RISK_TERMS, parse_args
from tasks import InputError
from tasks.booking import SLOTS
from tasks.rewards import load_reward

ROOT = Path(__file__).parent.parent


def script(*words):
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_bench_prints_a_row_per_value_with_its_phases():
    flags = "--shape tiny --ragged --batch 4 --response 12 --iterations 1 --vary algo=dvpo,ppo"
    done = script("experiments/bench.py", *flags.split(), "--", "--num-quantiles", "8")
    assert done.returncode == 0, done.stderr[-2000:]
    header, *rows = done.stdout.splitlines()[-3:]
    assert [row.split()[:2] for row in rows] == [["algo", "dvpo"], ["algo", "ppo"]]
    columns = dict(zip(header.replace("peak MiB", "MiB").split(), rows[0].split()[2:]))
    phases = ("rollout", "scoring", "values", "policy", "critic", "rest", "tokens/s", "MiB")
    assert all(float(columns[name]) > 0 for name in phases)


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


# ---- on_gpu.py, on a CPU


def run_on_gpu(monkeypatch, output, *flags):
    """-> exit status, {part: its row}."""
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--small", "--output", str(output), *flags])
    with pytest.raises(SystemExit) as ended:
        on_gpu.main()
    return ended.value.code, {row["part"]: row for row in read_rows(output)}


@pytest.mark.slow
def test_every_part_of_on_gpu_answers(tmp_path, monkeypatch, warm_start, capsys):
    shutil.copytree(warm_start, tmp_path / "on" / "task" / "warm_start")
    status, rows = run_on_gpu(monkeypatch, tmp_path / "on.jsonl")
    assert status == 0 and [*rows] == ["CPU and GPU", "bf16", "tiny", "built-in task"]
    # Of the CPU with itself: replayed samples and minibatches are the recorded ones.
    assert rows["CPU and GPU"]["difference, third"] == 0
    assert rows["bf16"]["|ratio - 1|"] < 1e-6 and 0 < rows["bf16"]["sampling off by, most"] < 0.1
    shares = [rows["tiny"][f"decoding, {name}"] for name in on_gpu.DECODINGS]
    shares += [rows["tiny"][f"update, compiled, {tokens}"] for tokens in on_gpu.MICRO_BATCHES]
    assert all(share > 0 for share in shares)
    assert rows["tiny"]["time, DVPO / PPO"] > 0 and rows["built-in task"]["seconds"] > 0
    out = capsys.readouterr().out
    assert {*on_gpu.AIMS} <= {key for row in rows.values() for key in row}
    assert all(aim in out for aim in on_gpu.AIMS.values())


def test_on_gpu_skips_what_has_no_time_and_goes_on_behind_what_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "agreement", lambda args: {}["a part that fails"])
    monkeypatch.setattr(on_gpu, "half_precision", lambda args: {"number": 0.25})
    status, rows = run_on_gpu(monkeypatch, tmp_path / "on.jsonl", "--minutes", "0.4")
    assert status == 1 and rows["CPU and GPU"]["failed"] == "'a part that fails'"
    assert rows["bf16"]["number"] == 0.25
    assert rows["tiny"]["skipped"] == "30 s wanted, 24 s left"
    assert rows["built-in task"]["skipped"] == "60 s wanted, 24 s left"
    assert "bf16            number                      0.25" in capsys.readouterr().out


def test_update_share_by_hand():
    """6 (tokens (policy's body + critic) + responses x output layer) / seconds / rate."""
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    policy = AutoModelForCausalLM.from_config(config)
    # Attention 4 x 16, MLP 3 x 32, three norms of 4: 172. A head of 2: 4 x 2 + 2 = 10.
    critic = SimpleNamespace(heads=torch.nn.Linear(4, 2))
    run = SimpleNamespace(policy=policy, critic=critic, data=[{"_prompt_ids": [1, 2, 3]}])
    own = SimpleNamespace(num_ppo_epochs=2, batch_size=5, response_length=7)
    flops = 6 * 2 * (5 * 10 * (172 + 172 + 10) + 5 * 7 * 40)
    assert on_gpu.update_share(run, own, 2.0, 1e6) == pytest.approx(flops / 2e6)


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


# ---- pseudo-labels and reward models


def test_final_answers_and_votes():
    """Equal numbers vote together however written; no answer counts in the share, not the vote."""
    texts = ("so 1,234.", "\\boxed{\\frac{1}{2}}", "0.5", "\\boxed{x + 1}", "none")
    found = [pseudo_labels.final_answer(text) for text in texts]
    assert found == ["1234", "1/2", "1/2", None, None]
    assert pseudo_labels.final_answer("The answer is B.", ["a", "b"]) == "B"
    assert pseudo_labels.majority(["2", "1", None, "1"]) == ("1", 0.5)
    assert pseudo_labels.majority(["2", "1"]) == ("2", 0.5)
    assert pseudo_labels.majority([None]) == (None, 0.0)


def test_pseudo_labels_are_written_resumed_and_compared_with_the_truth(
    model_folder, tmp_path, monkeypatch, capsys
):
    """7, 7, 8 -> 7; nothing -> left out; 5, 6, 6 -> 6 (wrong); a torn last line is made again."""
    rows = [{"prompt": "book a table", "answer": answer} for answer in ("7", "1", "5")]
    data, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    texts = iter([["7", "it is 7", "8"], ["no", "", "idea"], ["5", "6", "6.0"]])
    monkeypatch.setattr(pseudo_labels.rollout, "completion_texts", lambda *_: next(texts))
    flags = ["--samples", "3", "--response-length", "2"]
    monkeypatch.setattr(sys, "argv", ["", model_folder, data, str(out), *flags])
    pseudo_labels.main()
    written, seen = out.read_text(), []
    for row in read_rows(out):
        seen.append((row["row"], row["answer"], row["true_answer"], round(row["agreement"], 2)))
    assert seen == [(0, "7", "7", 0.67), (2, "6", "5", 0.67)]
    said = capsys.readouterr().out
    assert "2 of 3 problems" in said and "right: 0.500" in said
    out.write_text(written[:-5])
    texts = iter([["no", "", "idea"], ["5", "6", "6.0"]])
    pseudo_labels.main()
    assert out.read_text() == written
    capsys.readouterr()
    others = ['{"a": 1}', '{"a": 1}\n', "text\n", '{"prompt": "a"}\n{"prompt": "b"}']
    others += [written + '{"row": 9}\n{"row": 10}', '{"row": 1, "answer": "2"}\n{"row": 2}']
    others += [written.replace('"prompt": "', '"prompt": "of other data '), written + "{}\n"]
    for other in others:
        out.write_text(other)
        with pytest.raises(SystemExit) as ended:
            pseudo_labels.main()
        assert ended.value.code == 2 and out.read_text() == other
        assert "expected rows of an earlier call" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["row", "agreement", "true_answer"])
def test_pseudo_labels_take_the_place_of_no_column(
    name, model_folder, tmp_path, monkeypatch, capsys
):
    data, out = write_rows(tmp_path / "in.jsonl", [{"prompt": "a", name: 1}]), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["", model_folder, data, str(out), "--response-length", "2"])
    with pytest.raises(SystemExit) as ended:
        pseudo_labels.main()
    assert ended.value.code == 2 and not out.exists()
    assert f"data: expected no column {name!r}" in capsys.readouterr().err.splitlines()[-1]


def test_reward_models_data_pairs_references_and_holds_out_dialogues(tmp_path):
    """Each reference is good once; once one of another dialogue stands in its place."""
    rows = []
    for i in range(12):
        rows.append({"prompt": f"p{i}", "reference": f"r{i % 4}", "dialogue_id": str(i // 2)})
    judged = reward_model.read(write_rows(tmp_path / "d.jsonl", rows))
    references = {row["reference"] for row in rows}
    for row, good, bad in zip(rows, judged[::2], judged[1::2]):
        assert good[:3] == (row["prompt"], row["reference"], 1)
        assert bad[0] == row["prompt"] and bad[2] == 0 and good[3] == bad[3]
        assert bad[1] != row["reference"] and bad[1] in references
    train, held_out = reward_model.split(judged, 0.34)
    assert len({row[3] for row in held_out}) == 2 and len(train) == 16
    assert not {row[3] for row in train} & {row[3] for row in held_out}


def test_auc_by_hand():
    """Pairs good-bad: 0.9 beats 0.5 and 0.2, 0.5 ties 0.5 and beats 0.2: 3.5 of 4."""
    assert reward_model.auc([0.9, 0.5, 0.5, 0.2], [1, 1, 0, 0]) == 0.875
    assert reward_model.auc([0.1, 0.2], [1, 1]) is None


@pytest.mark.parametrize(
    "line,found",
    [
        ("nonsense", "line 2: expected a JSON object"),
        ('{"prompt": "a"}', "row 2: expected prompt"),
        ('{"prompt": "a", "completion": "b", "reward": 2}', "row 2: expected prompt"),
        ('{"prompt": "a", "reference": "b", "completion": "c", "reward": 0.7}', "row 2: expected"),
        ('{"prompt": "a", "reference": "b", "reward": null}', "row 2: expected prompt"),
        ('{"prompt": 3, "completion": "b", "reward": 1}', "row 2: expected texts or"),
        ('{"prompt": "a", "completion": null, "reward": 1}', "row 2: expected texts or"),
        ('{"prompt": "a", "completion": {}, "reward": 1}', "row 2: expected texts or"),
        ('{"prompt": [{"role": "user"}], "reference": "b"}', "row 2: expected texts or"),
        ('{"prompt": ["a"], "reference": "b"}', "row 2: expected texts or"),
        ('{"prompt": "a", "reference": [{"role": "user", "content": null}]}', "row 2: expected t"),
        ('{"prompt": "a", "completion": "b", "reward": 1, "reference": null}', "row 2: expected"),
    ],
)
def test_reward_models_bad_rows_are_one_line(tmp_path, line, found):
    good = '{"prompt": "a", "completion": "b", "reward": 1}'
    (tmp_path / "d.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=found):
        reward_model.read(tmp_path / "d.jsonl")


def test_a_trained_reward_model_is_what_train_py_reads(model_folder, tmp_path, monkeypatch, capsys):
    """Good responses end in one word, bad ones in another: learned, and scored alike."""
    vocabulary = sorted(AutoTokenizer.from_pretrained(model_folder).get_vocab())
    words, rows = [word for word in vocabulary if word.isalpha()][:2], []
    for i in range(200):
        row = {"prompt": words[i // 2 % 2], "completion": words[i % 2], "reward": i % 2}
        rows.append({**row, "dialogue_id": str(i)})
    data, out = write_rows(tmp_path / "d.jsonl", rows), tmp_path / "rm"
    flags = "--epochs 4 --learning-rate 3e-3".split()
    monkeypatch.setattr(sys, "argv", ["", model_folder, data, str(out), *flags])
    reward_model.main()
    report = json.loads((out / "report.json").read_text())
    # 180 rows at most, of which 16 make a step.
    assert report["accuracy"] > 0.9 and report["steps"] == 4 * 12
    assert "AUC 1.000" in capsys.readouterr().out
    reward = load_reward(f"model:{out}")
    good, bad = reward(prompts=[words[0]] * 2, completions=[words[1], words[0]])
    assert good > 0.5 > bad


# ---- evaluation and the dialogue experiment

SAID = {
    "reference": "Shall I book Luigi's for two at 7 pm?",
    "acts": ["CONFIRM"],
    "values": ["Luigi's", "two", "7 pm"],
}


@pytest.mark.parametrize(
    "text,other,expected",
    [
        (SAID["reference"], {}, 1.0),
        ("LUIGI'S, two?", {}, 1.0),  # 7 pm is nothing that the dialogue has named
        ("Luigi's it is.", {}, (1 / 2 + 0) / 2),
        ("Which place?", {}, (0 + 1) / 2),
        ("Sorry?", {"values": []}, 1.0),
        ("Sorry.", {"values": []}, 0.0),
        ("Bye.", {"values": [], "acts": ["GOODBYE"]}, 1.0),
        (" ", {"values": [], "acts": ["GOODBYE"]}, 0.0),  # silence is no answer
        # A number within another is not it.
        ("For 12?", {"values": ["two", "1"], "reference": "1 for two?"}, (0 + 1) / 2),
        ("8 pm?", {"values": ["8 pm"]}, 1.0),  # nor what the reference does not say
    ],
)
def test_success_by_hand(text, other, expected):
    prompt = [{"role": "user", "content": "A table for Two at Luigi's"}]
    columns = {name: [value] for name, value in {**SAID, **other}.items()}
    completion = [{"role": "assistant", "content": text}]
    assert dialogue.success([prompt], [completion], **columns) == [expected]


def test_the_dialogues_parts_share_no_dialogue_and_the_policys_is_short(
    model_folder, tmp_path, monkeypatch, capsys
):
    rows, parts = [], {}
    for i in range(60):
        row = {"prompt": "area " * (1 + i % 4), "reference": "north", "acts": [], "values": []}
        rows.append({**row, "dialogue_id": i // 2})
    data, out = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "parts"
    words = ["dialogue.py", model_folder, data, str(out), "--max-tokens", "4"]
    monkeypatch.setattr("sys.argv", words)
    dialogue.main()
    for name in dialogue.PARTS:
        parts[name] = read_rows(out / f"{name}.jsonl")
    ids = [{row["dialogue_id"] for row in part} for part in parts.values()]
    assert all(ids) and not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    lengths = [{len(row["prompt"].split()) for row in part} for part in parts.values()]
    assert lengths[0] <= {1, 2} and lengths[1] == {1, 2, 3, 4}
    assert len(parts["judge"]) + len(parts["strict"]) < 60
    assert parts["judge"][0].keys() == rows[0].keys()
    write_rows(tmp_path / "data.jsonl", [{"prompt": "area"}])
    with pytest.raises(SystemExit):
        dialogue.main()
    assert "found no acts, dialogue_id, reference, values" in capsys.readouterr().err


def test_evaluation_of_a_model_and_of_a_run(model_folder, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"area {value}", "answer": value} for value in SLOTS["area"]]
    write_rows(tmp_path / "data.jsonl", rows)
    code = "def longer(prompts, **columns):\n    return [float(len(p)) for p in prompts]\n"
    (tmp_path / "ours.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run" / "checkpoint-000001"
    shutil.copytree(model_folder, run / "policy")
    (run / "state.pt").touch()
    (tmp_path / "run" / "args.json").write_text('{"flags": {}}')
    sets = "--set data.jsonl exact --set data.jsonl ours:longer --rows 3".split()
    sets += "--response-length 4".split()
    words = ["evaluate.py", model_folder, "run", *sets, "--output", "out.jsonl"]
    monkeypatch.setattr("sys.argv", words)
    evaluate.main()
    found = read_rows(tmp_path / "out.jsonl")
    assert [row["policy"] for row in found] == [model_folder] * 2 + ["run"] * 2
    assert [row["reward"] for row in found] == ["exact", "ours:longer"] * 2
    assert found[1]["score"] == pytest.approx((10 + 10 + 9) / 3)
    assert all(row["rows"] == 3 for row in found)
    assert {**found[0], "policy": ""} == {**found[2], "policy": ""}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[5].startswith("data.jsonl, ours:longer: ")
    assert lines[5].endswith("run 9.667")
    words = ["evaluate.py", model_folder, *sets, "--set", "data.jsonl", "math"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "expected a number" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "nowhere", *sets])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "cannot load 'nowhere'" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["evaluate.py", "run", *sets])
    shutil.rmtree(run)
    with pytest.raises(SystemExit):
        evaluate.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "evaluate.py: error: policy: expected a checkpoint in 'run', found none"
    for damaged in ("{", "[]", '{"flags": 1}', "{}", '"'):
        (tmp_path / "run" / "args.json").write_text(damaged)
        with pytest.raises(SystemExit) as ended:
            evaluate.main()
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and "policy: run/args.json: expected a run's" in said[-1]


def test_what_is_evaluated_twice_counts_once_and_no_data_is_added_to(tmp_path, monkeypatch, capsys):
    asked = []

    def evaluated(policy, rewards, args):
        asked.append((policy, [*args.set]))
        found = {"policy": policy, "set": "d", "reward": "math", "rows": 1, "words": 1.0}
        return [found | {"score": 0.5}]

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    out, data = tmp_path / "out.jsonl", tmp_path / "d.jsonl"
    words = ["evaluate.py", "a", "a", "--set", "d", "math", "--set", "d", "math", "--output"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*words, str(out)])
        evaluate.main()
        assert capsys.readouterr().out.splitlines()[-1] == "d, math: a 0.500"
    assert asked == [("a", [("d", "math")])] * 2 and len(read_rows(out)) == 2
    written = data.write_text('{"prompt": "1 + 1 =", "answer": 2}\n') and data.read_text()
    monkeypatch.setattr(sys, "argv", [*words, str(data)])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2 and data.read_text() == written and len(asked) == 2
    found = f"{data}, line 1: expected a JSON object with policy, found"
    assert found in capsys.readouterr().err.splitlines()[-1]


def test_evaluations_of_seeds_are_one_mean(capsys):
    results = []
    for i in range(3):
        result = {"policy": f"runs/a-seed{i}", "set": "x", "reward": "y", "score": float(i)}
        results.append(result)
    results += [result | {"set": "z/x"}, result | {"policy": "other/a-seed2"}]
    evaluate.print_means(results)
    said = ["x, y: runs/a 1.000 ±2.483, other/a 2.000", "z/x, y: runs/a 2.000"]
    assert capsys.readouterr().out.splitlines() == said


# ---- the memory formula


def llama(**sizes):
    return LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)


def test_the_memory_formula_by_hand():
    config = llama(vocab_size=100, hidden_size=8, intermediate_size=20, num_hidden_layers=3)
    trunk = 100 * 8 + 3 * (2 * 8 * 8 + 2 * 4 * 8 + 3 * 20 * 8 + 2 * 8) + 8
    params, critic = trunk + 100 * 8, trunk + 4 * 200 * 9
    flags = "--model-name-or-path x --response-length 10 --batch-size 4 --micro-batch-size 2"
    found = memory.needs(config, config, parse_args(flags.split()), prompt=6)
    held = ("policy", "critic", "reference", "sampler")
    expected = [16 * params, 16 * critic, 4 * params, 2 * params]
    assert [found[name] for name in held] == expected
    assert found["casts"] == 2 * max(params, critic)
    layer = 16 * 8 + 2 * (3 * 8 + 4 * 4 + 4 * 20)
    assert found["activations"] == 2 * 16 * 3 * layer and found["logits"] == 2 * 10 * 4 * 100
    assert found["KV cache"] == 4 * 16 * 3 * 4 * 4
    update = found["casts"] + found["activations"] + found["logits"]
    assert found["peak"] == 22 * params + 16 * critic + max(found["KV cache"], update)
    flags += " --algo grpo --kl-coef 0 --gradient-checkpointing --batch-size 8"
    lean = memory.needs(config, config, parse_args(flags.split()), 6)
    assert lean["critic"] == lean["reference"] == 0
    assert lean["activations"] == 2 * 16 * (3 * 4 * 8 + layer)


def test_the_memory_formula_counts_what_a_model_keeps_for_backward():
    """Every tensor that autograd saves in a Llama's forward but its parameters: within a tenth."""
    config = llama(vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=6)
    model, kept = AutoModelForCausalLM.from_config(config), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention = torch.ones_like(ids)
        output = model.base_model(ids, attention_mask=attention).last_hidden_state
    flags = "--model-name-or-path x --response-length 60 --micro-batch-size 4 --dtype float32"
    found = memory.needs(config, config, parse_args(flags.split()), prompt=4)["activations"]
    assert output.requires_grad and found == pytest.approx(sum(kept.values()), rel=0.1)


def test_memory_takes_train_pys_flags_behind_two_dashes(tmp_path, monkeypatch, capsys):
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 20}
    llama(num_hidden_layers=3, **sizes).save_pretrained(tmp_path)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')

    def show(*words):
        monkeypatch.setattr("sys.argv", ["memory.py", *words])
        memory.main()
        return capsys.readouterr().out

    folder = str(tmp_path)
    assert "reference         0.00 GiB" in show(folder, "--prompt", "7", "--", "--kl-coef", "0")
    assert show(folder) != show(folder, "--", "--response-length", "20000")
    # What a run has saved is a model, too, wherever that run would write by default.
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "runs" / "dialogue-dvpo-seed0" / "checkpoint-000001" / "policy"
    llama(num_hidden_layers=3, **sizes).save_pretrained(saved)
    assert show(str(saved)) == show(folder)
    for words, found in (
        ([str(tmp_path / "t5")], "model:"),
        ([folder, "--prompt", "0"], "--prompt"),
        (["nowhere"], "cannot read the config of 'nowhere'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            show(*words)
        assert stopped.value.code == 2 and found in capsys.readouterr().err


# ---- the figures


def data_of(figure):
    return json.loads((figures.RESULTS / f"figure-{figure}.json").read_text())


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_redrawn_from_its_data_alone(name, tmp_path, monkeypatch, capsys):
    shutil.copy(figures.RESULTS / f"figure-{name}.json", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setitem(figures.FIGURES, name, (None, *figures.FIGURES[name][1:]))
    monkeypatch.setattr("sys.argv", ["figures.py", name, "--redraw"])
    figures.main()
    (target,) = tmp_path.glob("*.png")
    assert 30_000 < target.stat().st_size < 250_000 and target.name in capsys.readouterr().out


def test_the_figure_of_terms_says_what_its_data_say():
    for fits in data_of("terms")["fits"].values():
        core, full = fits["core"], fits["all"]
        assert full["mean"] - full["worst"] < core["mean"] - core["worst"]
        assert full["best"] - full["mean"] > core["best"] - core["mean"]
        moved = [abs(fit["mean"] - core["mean"]) for fit in (full, fits["+ shape"])]
        assert moved[0] < 0.02 < moved[1]
        assert fits.keys() == {"core", *(f"+ {term}" for term in RISK_TERMS), "all"}


def test_the_figures_data_are_computed(monkeypatch):
    """The curves as stored; the fits in small; of the domains the calmest and the wildest."""
    found = figures.terms_data(steps=2, m=3)["fits"]
    assert {len(fit["quantiles"]) for fits in found.values() for fit in fits.values()} == {3}
    domains = {name: {"std": std} for name, std in {"a": 2.0, "b": 1.0, "c": 3.0}.items()}
    monkeypatch.setattr(figures, "beliefs", lambda *rest: domains)
    found = json.loads(json.dumps(figures.first_data()))
    stored = data_of("first")
    assert found["bands"] == stored["bands"] and found["seeds"] == stored["seeds"] == 10
    assert [*found["fits"]] == ["b", "c"]


@pytest.mark.slow
def test_what_a_critic_believes_is_read_of_a_run_that_has_ended(tmp_path, warm_start, monkeypatch):
    small = "--total-episodes 32 --batch-size 16 --eval-samples 8"
    monkeypatch.setattr(noise, "BUDGET", small)
    monkeypatch.setitem(noise.GRIDS, "long", noise.GRIDS["main"])  # which is short
    monkeypatch.setattr(figures, "NUM_BELIEFS", 64)
    shutil.copytree(warm_start, tmp_path / "warm_start")
    found = figures.beliefs("dvpo, spread", 0, tmp_path)
    assert found.keys() == SLOTS.keys()
    for fit in found.values():
        assert len(fit["scores"]) == len(fit["believed"]) == 200 and fit["std"] > 0
        assert fit["scores"] == sorted(fit["scores"])
        assert fit["believed"] == sorted(fit["believed"])


def test_the_results_of_figures_whose_code_is_gone_say_what_they_did():
    """Their pages quote them; each names its commit."""
    kappa, levels = data_of("kappa"), data_of("levels")["fits"]
    stds = dict(zip(kappa["kappas"], kappa["stds"]))
    assert stds[1.0] == pytest.approx(0.288, abs=0.002)
    assert stds[0.01] == pytest.approx(0.5, abs=0.01)
    assert levels["right"]["mean"] == pytest.approx(0.23, abs=0.005)
    assert levels["midpoint"]["mean"] == pytest.approx(0, abs=0.001)
    data = data_of("calibration")
    excess = {}
    for domain in ("in domain", "out of domain"):
        means = [mean[domain] for mean in data["mean"].values()]
        excess[domain] = [predicted - sampled for sampled, predicted in means]
    assert max(map(abs, excess["in domain"])) < 0.05 < 0.08 < min(excess["out of domain"])
    assert all(data_of(name)["commit"] for name in ("kappa", "levels", "calibration"))


def test_an_unknown_figure_and_missing_data_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    bad = (["tails"], "invalid choice: 'tails'"), (["terms", "--redraw"], "figure-terms.json")
    for words, found in bad:
        monkeypatch.setattr("sys.argv", ["figures.py", *words])
        with pytest.raises(SystemExit) as stopped:
            figures.main()
        assert stopped.value.code == 2 and found in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        figures.main()
    said = "figures.py: error: it needs matplotlib: see requirements-dev.txt\n"
    assert capsys.readouterr().err == said and not list(tmp_path.iterdir())


def test_a_grids_critics_have_200_quantiles_and_a_folder_may_have_a_space(tmp_path):
    flags = noise.flags_of("main", "dvpo", "none")
    args = parse_args(noise.seeded(flags, 7, tmp_path / "a b"))
    assert (args.num_quantiles, args.seed, args.reward_noise_seed) == (200, 7, 7)
    assert args.output_dir == str(tmp_path / "a b")
    # Else they would have a built-in model's.
    assert parse_args(flags.split()).num_quantiles == 50

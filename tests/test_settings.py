"""experiments/settings.py: a setting in small, its table, and what it refuses."""

import argparse
import sys
from pathlib import Path

import pytest
from common import DAMAGED, MODEL, refused_by, write_rows
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from experiments import settings
from experiments.tables import read_rows
from tasks import InputError
from tasks.builtin import SLOTS

OTHER = settings.TRUE["other"]


@pytest.mark.slow
def test_a_setting_is_run_skipped_when_finished_and_printed(model_folder, tmp_path, capsys):
    rows = [{"prompt": f"area {value}", "answer": value} for value in SLOTS["area"]]
    for name in ("train", "held", "other"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    own = argparse.Namespace(data=tmp_path, model=model_folder, kinds=["none"], seeds=[0], jobs=1)
    own.flags, own.methods, own.rows = [*MODEL, "--reward", "exact"], ["ppo"], None
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
    for others in ([ppo], []):
        settings.print_table([start, *others, judged, judged | {"seed": 1}])
        _, _, *table = capsys.readouterr().out.splitlines()
        assert table.pop().startswith("judge     ppo           2 ")
        assert [line[:25] for line in table] == ["none      ppo           1"] * len(others)
    others = "start, none, seed 0: expected flags as now, found --rows None, --model"
    own.flags += ["--gamma", "0.5"]
    with pytest.raises(InputError, match=others):
        settings.run_grid(own, target)
    del own.flags[-2:]
    own.rows = 2
    with pytest.raises(InputError, match=others):
        settings.run_grid(own, target)
    with pytest.raises(InputError, match="expected a start and finished runs, found others"):
        settings.print_table([start])


def test_true_scores_are_of_the_files_that_they_are_named_after(monkeypatch):
    def scored(name, rewards, args):
        asked.append((args.rows, args.response_length))
        return [{"score": len(file)} for file, _ in args.set]

    asked = []
    monkeypatch.setattr(settings.evaluate, "evaluate", scored)
    flags = ["--reward", "exact", "--eval-samples", "8", "--response-length", "5"]
    own = argparse.Namespace(data=Path("d"), model="m", flags=flags, rows=None)
    both = {"held out, greedy, fp32": len("d/held.jsonl"), OTHER: len("d/other.jsonl")}
    assert settings.true_scores("m", own, settings.TRUE) == both
    own.rows = 70
    assert settings.true_scores("m", own, ["other"]) == {OTHER: len("d/other.jsonl")}
    assert asked == [(8, 5), (70, 5)]


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


def test_a_single_seed_is_shown_without_an_interval(capsys):
    rows = [row for row in setting_rows() if row["method"] != "grpo" or row["seed"] == 1]
    settings.print_table(rows)
    *_, grpo = capsys.readouterr().out.splitlines()
    # 0.8, and PPO has 0.6.
    assert grpo.split() == ["verifier", "grpo", "1", "0.800", "+0.200", "0.000", "+0.000"]
    assert grpo.index("+0.200") == 30 + len("0.800 ±0.000  ")


@pytest.mark.parametrize("damage", DAMAGED, ids=str)
def test_a_damaged_run_ends_the_table_in_one_line(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "RESULTS", tmp_path)
    start, *rows = setting_rows()
    write_rows(tmp_path / "setting-a.jsonl", [start, *rows, rows[0] | damage])
    (key,) = damage
    expected = (
        f"setting-a.jsonl, row {len(rows) + 2}: expected another {key}, found {damage[key]!r}"
    )
    assert expected in refused_by(settings, capsys, monkeypatch, "a", "--table")


def test_a_run_that_lacks_a_score_or_has_an_unknown_name_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "RESULTS", tmp_path)
    rows = setting_rows()
    rows[-1]["after"] = {}
    write_rows(tmp_path / "setting-a.jsonl", rows)
    found = refused_by(settings, capsys, monkeypatch, "a", "--table")
    assert "verifier, grpo, seed 1: expected 'greedy', found none" in found
    for damage in ({"method": "a2c"}, {"noise": "rain"}):
        write_rows(tmp_path / "setting-a.jsonl", [*setting_rows(), rows[1] | damage])
        found = refused_by(settings, capsys, monkeypatch, "a", "--table")
        assert f"row 7: expected another {[*damage][0]}, found {[*damage.values()][0]!r}" in found


def test_a_table_takes_the_seeds_that_it_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "RESULTS", tmp_path)
    write_rows(tmp_path / "setting-a.jsonl", setting_rows())
    words = ["settings.py", "a", "--table", "--seeds", "1", "2", "--methods", "ppo"]
    monkeypatch.setattr(sys, "argv", words)
    settings.main()
    *_, ppo = capsys.readouterr().out.splitlines()
    assert ppo.split()[:4] == ["verifier", "ppo", "2", "0.750"]


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
        (["--table"], "DATA: expected finished runs in "),
    ],
)
def test_a_settings_bad_flags_are_one_line(flags, found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["settings.py", str(tmp_path / "none"), *flags])
    with pytest.raises(SystemExit) as stopped:
        settings.main()
    (said,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and found in said

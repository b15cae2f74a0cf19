"""experiments/: the scripts run, at sizes of seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import rollout
from experiments import noise, pseudo_labels, reward_model

ROOT = Path(__file__).parent.parent


def test_bench_prints_a_row_per_value_with_its_phases():
    command = [sys.executable, "experiments/bench.py", "--shape", "tiny", "--ragged", "--batch", "4", "--response", "12", "--iterations", "1",
               "--vary", "algo=dvpo,ppo", "--", "--num-quantiles", "8"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    header, *rows = done.stdout.splitlines()[-3:]
    assert [row.split()[:2] for row in rows] == [["algo", "dvpo"], ["algo", "ppo"]]
    columns = dict(zip(header.replace(" %", "%").replace("peak MiB", "MiB").split(), rows[0].split()[2:]))
    assert all(float(columns[name]) > 0 for name in ("rollout", "scoring", "values", "policy", "critic", "rest", "tokens/s", "MiB"))


def test_the_noise_laboratory_runs_skips_what_is_finished_and_prints_paired_differences():
    (ROOT / "runs" / "noise-quick.jsonl").unlink(missing_ok=True)
    command = [sys.executable, "experiments/noise.py", "--quick", "--jobs", "2"]
    for todo in ("12/12", "0it"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and todo in done.stderr, done.stderr[-2000:]
    assert len((ROOT / "runs" / "noise-quick.jsonl").read_text().splitlines()) == 12
    rows = [line for line in done.stdout.splitlines() if line.startswith(("none", "offset"))]
    assert len(rows) == 6 and "0.000 [0.000, 0.000]" in rows[0] and (ROOT / "runs" / "noise-quick-dots.png").exists()


def test_windows_and_steps_to_by_hand():
    assert noise.windows([1, 2, 3, 4, 5, None, 7]) == [3, 7] and noise.windows([None] * 5) == [None]
    rows = [{"true": [0.1, 0.5, 0.9]}, {"true": [0.3, 0.5, 0.7]}]  # means 0.2, 0.5, 0.8 at the end of iterations 5, 10, 15
    assert [noise.steps_to(rows, target) for target in (0.2, 0.5, 0.51, 0.81)] == [5, 10, 15, None]


def test_bootstrap_interval_is_that_of_the_mean():
    """A hundred values of sd 1/2: the mean has a standard error of 0.05, so 95 % lie within 0.098."""
    mean, low, high = noise.bootstrap([0.0, 1.0] * 50)
    assert mean == 0.5 and low == pytest.approx(0.402, abs=0.015) and high == pytest.approx(0.598, abs=0.015)
    assert noise.bootstrap([2.0, 2.0]) == (2, 2, 2)


def test_tables_pair_seeds_and_leave_out_runs_of_other_flags(tmp_path, monkeypatch):
    """Seeds 0 and 1 have both methods: 0.5 - 0.25 and 0.75 - 0.75. Seed 2 has one, and one run of grpo had another budget."""
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    flags = lambda method, budget="--few": f"{budget} {noise.GRIDS['main'][0][method]} {noise.NOISES['none']}"
    runs = [("ppo", 0, 0.25), ("ppo", 1, 0.75), ("dvpo", 0, 0.5), ("dvpo", 1, 0.75), ("dvpo", 2, 0.0)]
    rows = [{"flags": flags(method), "seed": seed, "after": dict.fromkeys(noise.SPLITS, score), "true": [score]} for method, seed, score in runs]
    rows += [{**rows[0], "flags": flags("grpo", "--many")}, {**rows[1], "flags": flags("grpo", "--many")}]
    for number, part in enumerate((rows[:2], rows[2:])):  # whichever grid made them
        (tmp_path / f"noise-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    ppo, dvpo = noise.summarise(noise.current("main", "--few"), "ppo")
    assert (ppo[:3], dvpo[:3]) == (("none", "ppo", 2), ("none", "dvpo", 2))
    assert dvpo[3]["in domain, greedy"][0] == 0.625 and dvpo[3]["in domain, greedy, difference"] == (0.125, 0.0, 0.25)
    assert ppo[4] == 5 and ppo[3]["in domain, greedy, difference"] == (0, 0, 0)


def test_the_learning_rates_are_those_that_tuning_found():
    """Recomputed from the results that the repository holds."""
    found = noise.current("tuning", noise.BUDGET)
    mean = {}
    for method in noise.TRIED:
        runs = [run for noise_kind in noise.GRIDS["tuning"][1] for run in found[noise_kind, method].values()]
        assert len(runs) == 4
        mean[method] = sum(run["after"][split] for run in runs for split in ("in domain, greedy", "in domain, sampled"))
    best = {name: max(noise.LEARNING_RATES, key=lambda lr: mean[f"{name}, lr {lr}"]) for name in noise.METHODS}
    assert best == noise.TUNED


def test_final_answers_and_votes():
    """Equal numbers vote together however they are written; no answer counts in the share and not in the vote."""
    texts = ("so 1,234.", "\\boxed{\\frac{1}{2}}", "0.5", "\\boxed{x + 1}", "none")
    assert [pseudo_labels.final_answer(text) for text in texts] == ["1234", "1/2", "1/2", "x+1", None]
    assert pseudo_labels.final_answer("The answer is B.", ["a", "b"]) == "B"
    assert pseudo_labels.majority(["2", "1", None, "1"]) == ("1", 0.5)
    assert pseudo_labels.majority(["2", "1"]) == ("2", 0.5) and pseudo_labels.majority([None]) == (None, 0.0)


def test_pseudo_labels_are_written_resumed_and_compared_with_the_truth(model_folder, tmp_path, monkeypatch, capsys):
    """Per problem 3 votes: 7, 7, 8 -> 7; nothing -> left out; 5, 6, 6 -> 6 (wrong); and a torn last line is made again."""
    rows = [{"prompt": "book a table", "answer": answer} for answer in ("7", "1", "5")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = iter([["7", "it is 7", "8"], ["no", "", "idea"], ["5", "6", "6.0"], ["5", "6", "6.0"]])
    monkeypatch.setattr(pseudo_labels.rollout, "completion_texts", lambda *_: next(texts))
    monkeypatch.setattr(sys, "argv", ["", model_folder, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--samples", "3", "--batch-size", "3",
                                      "--response-length", "2"])  # fmt: skip
    pseudo_labels.main()
    written = (tmp_path / "out.jsonl").read_text()
    seen = [(row["row"], row["answer"], row["true_answer"], round(row["agreement"], 2)) for row in map(json.loads, written.splitlines())]
    assert seen == [(0, "7", "7", 0.67), (2, "6", "5", 0.67)]
    assert "2 of 3 problems" in (said := capsys.readouterr().out) and "right: 0.500" in said
    (tmp_path / "out.jsonl").write_text(written[:-5])
    texts = iter([["no", "", "idea"], ["5", "6", "6.0"]])
    pseudo_labels.main()
    assert (tmp_path / "out.jsonl").read_text() == written


def test_reward_models_data_pairs_references_and_holds_out_dialogues(tmp_path):
    """Each reference is good once, and once stands a different one of another dialogue in its place."""
    rows = [{"prompt": f"p{i}", "reference": f"r{i % 4}", "dialogue_id": str(i // 2)} for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = reward_model.read(tmp_path / "d.jsonl")
    for row, good, bad in zip(rows, judged[::2], judged[1::2]):
        assert good[:3] == (row["prompt"], row["reference"], 1) and bad[0] == row["prompt"] and bad[2] == 0 and good[3] == bad[3]
        assert bad[1] != row["reference"] and bad[1] in {other["reference"] for other in rows}
    train, held_out = reward_model.split(judged, 0.34, 0)
    assert len({row[3] for row in held_out}) == 2 and not {row[3] for row in train} & {row[3] for row in held_out} and len(train) == 16


def test_auc_by_hand():
    """Pairs good-bad: 0.9 beats 0.5 and 0.2, 0.5 ties 0.5 and beats 0.2: 3.5 of 4."""
    assert reward_model.auc([0.9, 0.5, 0.5, 0.2], [1, 1, 0, 0]) == 0.875 and reward_model.auc([0.1, 0.2], [1, 1]) is None


@pytest.mark.parametrize("line,found", [("nonsense", "line 2: expected a JSON object"), ('{"prompt": "a"}', "line 2: expected prompt"),
                                        ('{"prompt": "a", "completion": "b", "reward": 2}', "line 2: expected prompt")])  # fmt: skip
def test_reward_models_bad_rows_are_one_line(tmp_path, line, found):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b", "reward": 1}\n' + line + "\n")
    with pytest.raises(rollout.InputError, match=found):
        reward_model.read(tmp_path / "d.jsonl")


def test_a_trained_reward_model_is_what_train_py_reads(model_folder, tmp_path, monkeypatch, capsys):
    """Good responses end in one word, bad ones in another: learned, stopped early where asked, and scored alike through --reward model:."""
    words = [word for word in sorted(AutoTokenizer.from_pretrained(model_folder).get_vocab()) if word.isalpha()][:2]
    rows = [{"prompt": words[i // 2 % 2], "completion": words[i % 2], "reward": i % 2, "dialogue_id": str(i)} for i in range(200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--epochs", "8", "--learning-rate", "3e-3", "--stop-at", "1", "--eval-steps", "5"]
    monkeypatch.setattr(sys, "argv", ["", model_folder, str(tmp_path / "d.jsonl"), str(tmp_path / "rm"), *flags])
    reward_model.main()
    report = json.loads((tmp_path / "rm" / "report.json").read_text())
    assert report["accuracy"] > 0.9 and report["steps"] < 96 and report["curve"][-1]["accuracy"] == 1 and "AUC 1.000" in capsys.readouterr().out
    good, bad = rollout.load_reward(f"model:{tmp_path / 'rm'}")(prompts=[words[0]] * 2, completions=[words[1], words[0]])
    assert good > 0.5 > bad

"""experiments/: the scripts run, at sizes of seconds."""

import argparse
import html.parser
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import rollout
import train
from critic import QuantileCritic
from experiments import dialogue, evaluate, figures, inspect_tokens, memory, mutants, noise, pseudo_labels, reward_model, sft, warm_start

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


def laboratory(*flags):
    return subprocess.run([sys.executable, "experiments/noise.py", "--quick", *flags], cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_noise_laboratory_runs_skips_what_is_finished_and_prints_paired_differences():
    shutil.rmtree(ROOT / "runs" / "noise-quick", ignore_errors=True)
    done = laboratory("--jobs", "2", "--noises", "none", "--methods", "grpo", "--seeds", "1")
    assert done.returncode == 0 and "2/2" in done.stderr, done.stderr[-2000:]  # PPO beside
    done = laboratory("--jobs", "2")
    assert done.returncode == 0 and "10/10" in done.stderr, done.stderr[-2000:]
    assert len((ROOT / "runs" / "noise-quick" / "noise-quick.jsonl").read_text().splitlines()) == 12
    rows = [line for line in done.stdout.splitlines() if line.startswith(("none", "offset"))]
    assert len(rows) == 6 and "0.000 [0.000, 0.000]" in rows[0] and (ROOT / "runs" / "noise-quick" / "noise-quick-dots.png").exists()


def test_a_failing_run_is_one_line_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    monkeypatch.setitem(noise.NOISES, "odd", "--reward-noise-fp 7")  # argparse exits
    monkeypatch.setattr(noise, "QUICK", "--total-episodes 16 --batch-size 16 --critic-warmup-steps 1 --eval-samples 8")
    monkeypatch.setitem(noise.GRIDS, "quick", ({"ppo": "--algo ppo"}, ("odd", "none"), range(1)))
    assert noise.run_grid("quick", 1, ["ppo"], ["odd", "none"], [0]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "noise.py:" in line]
    assert len(said) == 1 and "--reward-noise-fp" in said[0] and "expected a number in [0, 1], found '7'" in said[0]
    (row,) = [json.loads(line) for line in (tmp_path / "noise-quick.jsonl").read_text().splitlines()]
    assert row["noise"] == "none" and row["seed"] == 0 and row["after"]


@pytest.mark.parametrize("flags,found", [(["--jobs", "0"], "--jobs: expected at least 1"), (["--methods", "sac"], "--methods: expected some of ppo")])
def test_the_laboratorys_bad_flags_are_one_line(flags, found):
    done = laboratory(*flags)
    assert done.returncode == 2 and found in done.stderr.splitlines()[-1]


def test_windows_and_steps_to_by_hand():
    assert noise.windows([1, 2, 3, 4, 5, None, 7, 8, 9, 10, 11]) == [3, 8.5] and noise.windows([None] * 5) == [None]
    rows = [{"true": [0.1, 0.5, 0.9]}, {"true": [0.3, 0.5, 0.7]}]  # means 0.2, 0.5, 0.8 at the end of iterations 5, 10, 15
    assert [noise.steps_to(rows, target) for target in (0.2, 0.5, 0.51, 0.81)] == [5, 10, 15, None]


def test_the_interval_is_students():
    """1, 2, 3: standard error 1 / sqrt(3), t(2) = 4.30."""
    mean, low, high = noise.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - 2 == pytest.approx(4.30 / 3**0.5) == 2 - low


def test_tables_pair_seeds_and_leave_out_runs_of_other_flags(tmp_path, monkeypatch):
    """DVPO and PPO share seeds 0 and 1, DVPO and its floor the reference at one only; one run each of GRPO had another budget, or trial seeds.

    In domain 0.5 - 0.25 and 0.75 - 0.75, out of domain 0.1 more for DVPO. PPO ends its clean training at (0.6 + 1) / 2, 90 % of that
    is 0.72: PPO is there in its second window, DVPO never.
    """
    monkeypatch.setattr(noise, "RESULTS", tmp_path)
    runs = [("ppo", 0, 0.25, [0.0, 0.6]), ("ppo", 1, 0.75, [0.5, 1.0]), ("dvpo", 0, 0.5, [0.5, 0.6]), ("dvpo", 1, 0.75, [0.3, 0.8]),
            ("dvpo", 2, 0.0, [1.0, 1.0]), ("dvpo, critic floor", 0, 1.0, [1.0, 1.0]), ("grpo", 100, 0.5, [1.0, 1.0])]  # fmt: skip
    rows = []
    for method, seed, score, true in runs:
        after = {"in domain, greedy": score, "out of domain, greedy": 0.3 + 0.1 * (method == "dvpo")}
        before = {"in domain, greedy": seed, "out of domain, greedy": 0, "in domain, sampled": len(rows)}
        rows.append({"flags": noise.flags_of("main", method, "none"), "seed": seed, "before": before, "after": after, "true": true, "ev": [0.0, 0.25]})
    rows += [{**row, "flags": rows[-1]["flags"].replace("7680", "12800")} for row in rows[:2]]
    for number, part in enumerate((rows[:3], rows[3:])):  # whichever grid made them
        (tmp_path / f"noise-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    ppo, dvpo = noise.summarise(noise.current("main"), "ppo")
    assert (ppo[:3], dvpo[:3]) == (("none", "ppo", [0, 1]), ("none", "dvpo", [0, 1]))
    assert dvpo[3]["in domain, greedy"][0] == 0.625 and ppo[3]["in domain, greedy, difference"] == (0, 0, 0)
    assert dvpo[3]["in domain, greedy, difference"] == pytest.approx((0.125, 0.125 - 12.71 / 8, 0.125 + 12.71 / 8))
    assert dvpo[3]["out of domain, greedy, difference"] == pytest.approx((0.1, 0.1, 0.1))
    assert (ppo[4:], dvpo[4:]) == ((0.25, 10), (0.25, "never"))
    rows[0]["before"]["out of domain, greedy"] = 7
    (tmp_path / "noise-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    with pytest.raises(AssertionError, match="another warm start"):
        noise.summarise(noise.current("main"), "ppo")
    (tmp_path / "noise-1.jsonl").write_text('{"torn": ')
    with pytest.raises(SystemExit, match="noise-1.jsonl, line 1: expected a run as JSON"):
        noise.current("main")


@pytest.mark.parametrize("grid", noise.GRIDS)
def test_every_grid_has_flags_that_train_py_takes_and_committed_runs_that_can_be_compared(grid, capsys):
    methods, noises, seeds = noise.GRIDS[grid]
    for method, kind in itertools.product(methods, noises):
        args = train.parse_args(noise.flags_of(grid, method, kind).split())
        assert args.critic_warmup_steps < args.total_episodes / args.batch_size
    table = noise.summarise(noise.current(grid), next(iter(methods)))
    assert grid in ("quick", "tuning", "main") or len(table) == len(methods) * len(noises)
    noise.print_table(table, next(iter(methods)))
    lines = [line for line in capsys.readouterr().out.splitlines() if "[" in line and "mean" not in line]
    assert len({line.index("[") for line in lines}) <= 1


def test_what_the_sweeps_leave_out_is_train_pys_default():
    args = train.parse_args([])
    assert (args.num_quantiles, args.lam, args.score_floor_level) == (200, 0.95, 0.3)


def test_the_learning_rates_are_those_that_tuning_found():
    """Recomputed from the results that the repository holds."""
    found = noise.current("tuning")
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


# ---- supervised fine-tuning


def test_both_losses_are_cross_entropy_on_the_policys_tokens(model):
    tokenizer = rollout.task_tokenizer("booking")
    row = rollout.task_rows("booking", "train", 1, 5)[0]
    talk = sft.example(rollout.encode_prompts([row["prompt"]], tokenizer)[0], row["completion"], tokenizer, 1)
    batch = [talk, (torch.tensor([5, 6, 7, 8]), torch.tensor([-100, -100, 7, 8]))]
    total, count = 0.0, 0
    for ids, labels in batch:
        logprobs = model(ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
        for t in range(1, len(ids)):
            if labels[t] != -100:
                total, count = total - logprobs[t - 1, ids[t]], count + 1
    assert count == sum(len(m["content"].split()) + 1 for m in row["completion"] if m["role"] == "assistant") + 2
    for loss in (sft.whole_loss, sft.response_loss):
        assert loss(model, batch).item() == pytest.approx(total.item() / count, rel=1e-5)


def test_examples_label_what_the_policy_says_and_nothing_else():
    tokenizer = rollout.task_tokenizer("booking")
    said = [{"role": "assistant", "content": "area"}, {"role": "user", "content": "area north"}, {"role": "assistant", "content": "book"}]
    ids, labels = sft.example(tokenizer("<user> book area <assistant>")["input_ids"], said, tokenizer, 1)
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == "<user> book area <assistant> area <eos> <user> area north <assistant> book <eos>".split()
    assert [word for word, label in zip(words, labels) if label != -100] == "area <eos> book <eos>".split()
    assert [label for label in labels.tolist() if label != -100] == [ids[i] for i in (4, 5, 10, 11)]


def test_fine_tuning_ends_turns_as_the_template_does_and_sees_what_a_conversation_will_show():
    """Three kinds of template: the mark is EOS, is another stop token, or stands behind a newline and is none at all."""
    said = [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "go on"}, {"role": "assistant", "content": "done"}]
    words = ["<pad>", "</s>", "<end>", "<user>", "<bot>", "ok", "go", "on", "done", "\\n", ":"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    turn = "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else 'user' }}> {{ m.content }} MARK {% endfor %}<bot>"
    for template, stop_ids, expected in (
        (turn.replace("MARK", "</s>"), [1], "ok </s> <user> go on </s> <bot> done </s>"),
        (turn.replace("MARK", "<end>"), [1, 2], "ok <end> <user> go on <end> <bot> done <end>"),
        ("{% for m in messages %}{{ m.content }} : {% endfor %}<bot>", [1], "ok </s> : go on : <bot> done </s>"),
    ):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
        tokenizer.chat_template = template
        ids, labels = sft.example([4], said, tokenizer, sft.end_of_turn(tokenizer, stop_ids))
        assert " ".join(tokenizer.convert_ids_to_tokens(ids[1:])) == expected
        assert [label for label in labels.tolist() if label != -100] == [ids[i] for i in (1, 2, -2, -1)]
        assert tokenizer.convert_ids_to_tokens(rollout.continuation(1, "go on", tokenizer))[0] in ("<user>", "<end>", ":")
        assert "</s>" not in tokenizer.convert_ids_to_tokens(rollout.continuation(1, "go on", tokenizer))[:1]


def test_a_second_warm_start_in_a_folder_leaves_nothing_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "fine_tune", lambda *args, **flags: None)
    warm_start.warm_start("dialogue", 0, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    warm_start.warm_start("sums", 0, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None


def test_fine_tuning_teaches_and_keeps_the_first_layers(model_folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"area {value}", "answer": value, "other": 1} for value in rollout.SLOTS["area"]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows + [{"prompt": "area " * 30, "answer": "north", "other": 1}]))
    flags = [model_folder, str(data), str(tmp_path / "out"), *"--layers 1 --epochs 100 --batch-size 4 --max-length 20 --learning-rate 3e-3".split()]
    monkeypatch.setattr("sys.argv", ["sft.py", *flags])
    sft.main()
    assert "4 rows (1 too long), 100 steps" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == len(model.base_model.h) == 1
    found = rollout.sample(model, rollout.encode_prompts([row["prompt"] for row in rows], tokenizer), 0, [1], 4, 0.0)
    assert rollout.completion_texts(found, tokenizer, [1]) == rollout.SLOTS["area"]


@pytest.mark.parametrize("said,found", [(None, "found 'None'"), ([], "found '[]'"), ([{"role": "user", "content": "x"}], "row 1: expected a text, or messages"),
                                        ([{"role": "assistant"}], "row 1: expected a text")])  # fmt: skip
def test_rows_with_nothing_to_say_are_one_line(said, found, model_folder, tmp_path, monkeypatch, capsys):
    talk = [{"role": "assistant", "content": "north"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": "area", "completion": text}) + "\n" for text in (talk, said)))
    monkeypatch.setattr("sys.argv", ["sft.py", model_folder, str(tmp_path / "data.jsonl"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        sft.main()
    assert stopped.value.code == 2 and found in capsys.readouterr().err


@pytest.mark.parametrize("flags,words", [(["--layers", "9"], "--layers: expected 1 to 2"), (["--max-length", "2"], "--max-length: expected rows"),
                                         (["--batch-size", "0"], "--batch-size"), (["--learning-rate", "-1"], "--learning-rate")])  # fmt: skip
def test_fine_tunings_bad_flags_are_one_line(flags, words, model_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text('{"prompt": "area", "answer": "north"}\n')
    monkeypatch.setattr("sys.argv", ["sft.py", model_folder, str(tmp_path / "data.jsonl"), str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as stopped:
        sft.main()
    assert stopped.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- evaluation and the dialogue experiment


def test_success_by_hand():
    prompt = [{"role": "user", "content": "A table for Two at Luigi's"}]
    row = {"reference": "Shall I book Luigi's for two at 7 pm?", "acts": ["CONFIRM"], "values": ["Luigi's", "two", "7 pm"]}
    judge = lambda text, **other: dialogue.success([prompt], [[{"role": "assistant", "content": text}]], **{k: [v] for k, v in {**row, **other}.items()})[0]
    assert judge(row["reference"]) == judge("LUIGI'S, two?") == 1.0  # 7 pm is nothing that the dialogue has named
    assert judge("Luigi's it is.") == (1 / 2 + 0) / 2 and judge("Which place?") == (0 + 1) / 2
    assert judge("Sorry?", values=[]) == 1.0 and judge("Sorry.", values=[]) == 0.0 and judge("Bye.", values=[], acts=["GOODBYE"]) == 1.0
    assert judge(" ", values=[], acts=["GOODBYE"]) == 0.0  # silence is no answer
    assert judge("For 12?", values=["two", "1"], reference="1 for two?") == (0 + 1) / 2  # a number within another is not it
    assert judge("8 pm?", values=["8 pm"]) == 1.0  # nor what the reference does not say


def test_the_dialogues_parts_share_no_dialogue_and_the_policys_is_short(model_folder, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "area " * (1 + i % 4), "reference": "north", "acts": [], "values": [], "dialogue_id": i // 2} for i in range(60)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["dialogue.py", model_folder, str(data), str(tmp_path / "parts"), "--max-tokens", "4"])
    dialogue.main()
    parts = {name: [json.loads(line) for line in (tmp_path / "parts" / f"{name}.jsonl").read_text().splitlines()] for name in dialogue.PARTS}
    ids = [{row["dialogue_id"] for row in part} for part in parts.values()]
    assert all(ids) and not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    assert {len(row["prompt"].split()) for row in parts["policy"]} <= {1, 2} and {len(row["prompt"].split()) for row in parts["judge"]} == {1, 2, 3, 4}
    assert len(parts["judge"]) + len(parts["strict"]) < 60 and parts["judge"][0].keys() == rows[0].keys()
    data.write_text('{"prompt": "area"}\n')
    with pytest.raises(SystemExit):
        dialogue.main()
    assert "found no acts, dialogue_id, reference, values" in capsys.readouterr().err


def test_evaluation_of_a_model_and_of_a_run(model_folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"area {value}", "answer": value}) + "\n" for value in rollout.SLOTS["area"]))
    (tmp_path / "rewards.py").write_text("def longer(prompts, completions, **columns):\n    return [float(len(p)) for p in prompts]\n")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run" / "checkpoint-000001"
    shutil.copytree(model_folder, run / "policy")
    (run / "state.pt").touch()
    (tmp_path / "run" / "args.json").write_text("{}")
    sets = ["--set", "data.jsonl", "exact", "--set", "data.jsonl", "rewards:longer", "--rows", "3", "--response-length", "4", "--batch-size", "2"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", model_folder, "run", *sets, "--output", "out.jsonl"])
    evaluate.main()
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in found] == [model_folder] * 2 + ["run"] * 2 and [row["reward"] for row in found] == ["exact", "rewards:longer"] * 2
    assert found[1]["score"] == pytest.approx((10 + 10 + 9) / 3) and all(row["rows"] == 3 for row in found)
    assert {**found[0], "policy": ""} == {**found[2], "policy": ""}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[5].startswith("data.jsonl, rewards:longer: ") and lines[5].endswith("run 9.667")
    seeds = [{"policy": f"runs/a-seed{i}", "set": "x", "reward": "y", "score": float(i)} for i in range(3)]
    evaluate.print_means(seeds)
    assert capsys.readouterr().out == "x, y: a 1.000 ±2.483\n"
    monkeypatch.setattr("sys.argv", ["evaluate.py", "nowhere", *sets])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "cannot load 'nowhere'" in capsys.readouterr().err


# ---- the memory formula


def test_the_memory_formula_by_hand(tmp_path):
    config = LlamaConfig(vocab_size=100, hidden_size=8, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    trunk = 100 * 8 + 3 * (2 * 8 * 8 + 2 * 4 * 8 + 3 * 20 * 8 + 2 * 8) + 8
    params, critic = trunk + 100 * 8, trunk + 4 * 200 * 9
    flags = ["--model-name-or-path", "x", "--response-length", "10", "--batch-size", "4", "--micro-batch-size", "2"]
    found = memory.needs(config, config, train.parse_args(flags), prompt=6)
    assert (found["policy"], found["critic"], found["reference"], found["sampler"]) == (16 * params, 16 * critic, 4 * params, 2 * params)
    assert found["casts"] == 2 * max(params, critic)
    assert found["activations"] == 2 * 16 * 3 * (16 * 8 + 2 * (3 * 8 + 4 * 4 + 4 * 20)) and found["logits"] == 2 * 10 * 4 * 100
    assert found["KV cache"] == 4 * 16 * 3 * 4 * 4
    assert found["peak"] == 22 * params + 16 * critic + max(found["KV cache"], found["casts"] + found["activations"] + found["logits"])
    lean = memory.needs(config, config, train.parse_args([*flags, "--algo", "grpo", "--kl-coef", "0", "--gradient-checkpointing", "--batch-size", "8"]), 6)
    assert lean["critic"] == lean["reference"] == 0 and lean["activations"] == 2 * 16 * (3 * 4 * 8 + found["activations"] // (2 * 16 * 3))


def test_the_memory_formula_counts_what_a_model_keeps_for_backward():
    """Every tensor that autograd saves in a Llama's forward, parameters aside, against the formula: within a tenth."""
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
    model, kept = AutoModelForCausalLM.from_config(config), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    flags = ["--model-name-or-path", "x", "--response-length", "60", "--micro-batch-size", "4", "--dtype", "float32"]
    found = memory.needs(config, config, train.parse_args(flags), prompt=4)["activations"]
    assert output.requires_grad and found == pytest.approx(sum(kept.values()), rel=0.1)


def test_memory_takes_train_pys_flags_behind_two_dashes(model_folder, tmp_path, monkeypatch, capsys):
    config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    show = lambda *words: monkeypatch.setattr("sys.argv", ["memory.py", *words]) or memory.main() or capsys.readouterr().out
    assert "reference         0.00 GiB" in show(str(tmp_path), "--prompt", "7", "--", "--kl-coef", "0")
    assert show(str(tmp_path)) != show(str(tmp_path), "--", "--response-length", "20000")
    bad = ([str(tmp_path / "t5")], "model:"), ([str(tmp_path), "--prompt", "0"], "--prompt"), (["nowhere"], "cannot read the config of 'nowhere'")
    for words, found in bad:
        with pytest.raises(SystemExit) as stopped:
            show(*words)
        assert stopped.value.code == 2 and found in capsys.readouterr().err


# ---- the figures


def data_of(figure):
    return json.loads((ROOT / "experiments" / "results" / f"figure-{figure}.json").read_text())


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_redrawn_from_its_data_alone(name, tmp_path, monkeypatch, capsys):
    shutil.copy(figures.RESULTS / f"figure-{name}.json", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setitem(figures.FIGURES, name, (None, *figures.FIGURES[name][1:]))
    figures.main([name, "--redraw"])
    assert 30_000 < (tmp_path / f"figure-{name}.png").stat().st_size < 250_000 and f"figure-{name}.png" in capsys.readouterr().out


def test_the_figures_titles_are_what_their_data_say():
    for fits in data_of("terms")["fits"].values():
        core, full = fits["core"], fits["all"]
        assert full["mean"] - full["worst"] < core["mean"] - core["worst"] and full["best"] - full["mean"] > core["best"] - core["mean"]
        assert abs(full["mean"] - core["mean"]) < 0.02 < abs(fits["+ shape"]["mean"] - core["mean"])
        assert fits.keys() == {"core", *(f"+ {term}" for term in train.RISK_TERMS), "all"}
    kappa = data_of("kappa")
    stds = dict(zip(kappa["kappas"], kappa["stds"]))
    assert stds[1.0] == pytest.approx(0.288, abs=0.002) and stds[0.01] == pytest.approx(0.5, abs=0.01) and kappa["stds"] == sorted(kappa["stds"])[::-1]
    assert kappa["quantiles"]["1.0"] == pytest.approx(kappa["levels"], abs=0.01)  # a straight line
    levels = data_of("levels")["fits"]
    assert levels["right"]["mean"] == pytest.approx(0.23, abs=0.005) and levels["midpoint"]["mean"] == pytest.approx(0, abs=0.001)
    assert levels["right"]["mean"] == pytest.approx(levels["right"]["quantiles"][-1] / 16, abs=0.001)  # it is all the top one
    assert set(levels["right"]["top"]) == {6.0} and levels["midpoint"]["top"][-1] == pytest.approx(levels["midpoint"]["quantiles"][-1], abs=0.01)
    curves = data_of("curves")
    assert curves["seeds"] == 5 and sum(figures.holding_zero(curves)) == 19 and len(figures.holding_zero(curves)) == 20
    last = {measure: (bands["difference"]["mean"][-1], bands["difference"]["half"][-1]) for measure, bands in curves["bands"].items()}
    assert {measure: abs(mean) < half for measure, (mean, half) in last.items()} == {"in domain, sampled": True, "out of domain, sampled": False}


def test_the_critic_is_calibrated_in_domain_and_optimistic_out_of_it():
    data = data_of("calibration")
    plain, inside, outside = data["curves"]
    assert figures.largest_gap(data, inside) < 0.12 < figures.largest_gap(data, outside) < 0.4 < figures.largest_gap(data, plain)
    assert all(share > tau - 0.03 for curve in data["curves"][outside].values() for share, tau in zip(curve, data["taus"]))  # returns are lower
    excess = {domain: [mean[domain][1] - mean[domain][0] for mean in data["mean"].values()] for domain in ("in domain", "out of domain")}
    assert max(map(abs, excess["in domain"])) < 0.05 < 0.08 < min(excess["out of domain"]) and max(excess["out of domain"]) < 0.17


def test_the_answers_count_what_their_data_hold():
    assert figures.below_zero([[-1, -1, 0, 2], [5, -1, -3, 1]], 1) == (3, 6)
    data, text = data_of("questions"), " ".join((ROOT / "README.md").read_text().split())
    for rate, curves in data["kl"].items():
        assert "{} of {} at".format(*figures.below_zero(curves, data["warm-up"] + 1)) in text.replace("none of", "0 of").replace("iterations ", ""), rate
    assert "below 0 in {} of {} iterations".format(*figures.below_zero(data["ev"], 1)) in text
    assert all(abs(value - 0.2 - 0.6 * true) < 0.05 for value, true in zip(data["scores"], data["true"]))
    drawn = Figure()
    figures.draw_questions(drawn, data)
    assert list(drawn.axes[2].lines[2].get_ydata()) == pytest.approx([0.2 + 0.6 * true for true in data["true"]])


def test_coverage_by_hand():
    """F(0) = 1/2 for a coin: off by a hair, all zeros lie below every quantile and all ones above; with ties broken the shares are tau."""
    returns, taus = torch.tensor([0.0, 1.0]).repeat(5000), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    hair = torch.tensor([0.01, 0.01, 0.99, 0.99]).expand(10000, 4)
    assert figures.coverage(returns, hair, taus, 0.0).tolist() == [0.5, 0.5, 0.5]
    assert figures.coverage(returns, hair, taus, 0.25).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
    assert figures.coverage(returns, hair.round(), taus, 0.0).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
    assert figures.coverage(returns, hair + 0.5, taus, 0.25).tolist() == [0.5, 1.0, 1.0]  # ones lie in the middle, zeros below all


def test_the_figures_data_are_computed(model_folder, tmp_path):
    """Two kappas as stored; the others in small."""
    found, kept = figures.kappa_data(kappas=(0.01, 1.0)), data_of("kappa")
    assert found["stds"] == pytest.approx([kept["stds"][kept["kappas"].index(kappa)] for kappa in (0.01, 1.0)], abs=1e-3)
    assert {len(fit["quantiles"]) for fits in figures.terms_data(steps=2, m=3)["fits"].values() for fit in fits.values()} == {3}
    assert figures.levels_data(m=2, count=8, steps=20)["fits"]["right"]["levels"] == [0.5, 1.0]
    for name, compute in (("curves", figures.curves_data), ("questions", figures.questions_data)):
        assert json.loads(json.dumps(compute())) == {key: value for key, value in data_of(name).items() if key not in ("commit", "torch")}
    flags = f"--model-name-or-path {model_folder} --total-episodes 8 --batch-size 8 --eval-samples 8 --response-length 4 --num-quantiles 4"
    data = figures.calibration_data(flags, tmp_path / "run", rounds=1)
    assert [list(curves) for curves in data["curves"].values()] == [["1"]] * 3 and len(data["mean"]["1"]["in domain"]) == 2


def test_an_unknown_figure_and_missing_data_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    for words, found in ((["tails"], "invalid choice: 'tails'"), (["terms", "--redraw"], "expected data in figure-terms.json, found none")):
        with pytest.raises(SystemExit) as stopped:
            figures.main(words)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and found in said and said.count("\n") == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        figures.main(["kappa"])
    assert capsys.readouterr().err == "figures.py: error: it needs matplotlib, which is in requirements-dev.txt\n" and not list(tmp_path.iterdir())


# ---- mutants


def test_mutants_are_single_changes_of_code_alone():
    """Nothing in the docstring or the message changes."""
    source = 'def f(x):\n    """1 + 1"""\n    assert x < 3, f"{x + 1}"\n    return -x.detach() if not x else max(0, True)\n'
    found = [(source[:start] + new + source[end:]).splitlines() for start, end, new in mutants.changes(source)]
    assert [line.strip() for lines in found for line, old in zip(lines, source.splitlines()) if line != old] == [
        'x < 3, f"{x + 1}"', 'assert x <= 3, f"{x + 1}"', 'assert x < 4, f"{x + 1}"',
        "return x.detach() if not x else max(0, True)", "return -x if not x else max(0, True)", "return -x.detach() if x else max(0, True)",
        "return -x.detach() if not x else min(0, True)", "return -x.detach() if not x else max(1, True)", "return -x.detach() if not x else max(0, False)",
    ]  # fmt: skip


def test_a_mutant_is_killed_by_a_test_or_accepted_for_a_reason():
    """zero times a sum: times one, over zero and two wrong dims are killed; zero times a mean lives, and ACCEPTED says why."""
    number = next(n for n, line in enumerate((ROOT / "risk.py").read_text().splitlines(), 1) if line.endswith("q.sum(dim=-1) * 0"))
    done = subprocess.run([sys.executable, "experiments/mutants.py", f"risk.py:{number}-{number}"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "risk.py: 5 mutants, 4 killed, 1 survivors accepted, 0 not" in done.stdout, done.stderr[-2000:]
    assert mutants.part("risk.py:7-9") == ("risk.py", 7, 9) and mutants.part("risk.py") == ("risk.py",)
    for wrong in ("risk.py:7", "README.md", "setup.py"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a file with a test module"):
            mutants.part(wrong)


# ---- token by token


def length_reward(prompts, completions, answer, **columns):
    return [len(completion[-1]["content"].split()) / 4 for completion in completions]


def hungry(messages, **columns):
    return "food thai" if sum(message["content"] == "food thai" for message in messages) < 2 else None


def two_runs(folder, model_folder, *more):
    """Runs of one iteration, with DVPO and with PPO, alike in all else; steps large enough that the KL is not 0."""
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollout.task_rows("dialogue", "train", 16, 0)))
    flags = f"""--model-name-or-path {model_folder} --dataset-name {folder / "d.jsonl"} --reward test_experiments:length_reward --total-episodes 8
        --batch-size 8 --stop-token thai --response-length 6 --num-quantiles 30 --critic-warmup-steps 0 --eval-samples 8 --learning-rate 1e-2
        --critic-learning-rate 1e-2 --gamma 0.9 --lam 0.8 --kl-coef 0.3 --temperature 1.5
        --missing-eos-penalty 0.5 --bootstrap-truncated --reward-noise-outlier 1 5""".split()
    for algo in ("dvpo", "ppo"):
        assert train.main([*flags, *more, "--algo", algo, "--output-dir", str(folder / algo)]) == 0
    return folder


@pytest.fixture(scope="module")
def pair(model_folder, tmp_path_factory):
    return two_runs(tmp_path_factory.mktemp("pair"), model_folder)


@pytest.fixture(scope="module")
def talks(model_folder, tmp_path_factory):
    return two_runs(tmp_path_factory.mktemp("talks"), model_folder, "--user", "test_experiments:hungry")


def by_hand(folder, model_folder, row, algo):
    """Sorted quantiles, advantages, rewards and returns of one response: a forward pass of one row, and loops over floats."""
    run, tokenizer = train.find_checkpoint(folder / "dvpo"), AutoTokenizer.from_pretrained(model_folder)
    prompt, own = tokenizer(row["prompt"])["input_ids"], []
    tokens = [*prompt]
    for token in row["tokens"]:
        tokens += tokenizer(token["before"])["input_ids"] + [token["id"]]
        own.append(len(tokens) - 1)
    ids, tokens = [token["id"] for token in row["tokens"]], torch.tensor([tokens])
    logprobs = []
    for name in (run / "policy", model_folder):
        logits = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()(tokens).logits[0].double() / 1.5
        logprobs.append([logits.log_softmax(-1)[own[t] - 1, ids[t]].item() for t in range(len(ids))])
    rewards = [-0.3 * (new - old) for new, old in zip(*logprobs)]
    rewards[-1] += row["score"] - 0.5 * row["truncated"]
    critic = QuantileCritic.from_pretrained(train.find_checkpoint(folder / algo) / "critic").eval()
    heads = critic(tokens, torch.ones_like(tokens), torch.arange(tokens.shape[1])[None])[0].mean(dim=1).double().sort(dim=-1).values
    quantiles, after = heads[[at - 1 for at in own]], heads[-1].mean().item() * row["truncated"]
    values, advantages, returns = [*quantiles.mean(dim=-1).tolist(), after], [0.0], [0.0]
    for t in reversed(range(len(ids))):
        advantages.insert(0, rewards[t] + 0.9 * values[t + 1] - values[t] + 0.9 * 0.8 * advantages[0])
        returns.insert(0, rewards[t] + 0.9 * returns[0])
    return quantiles, advantages[:-1], rewards, returns[:-1]


@pytest.mark.parametrize("runs", ["pair", "talks"])
def test_what_is_shown_of_a_token_is_what_single_rows_give_by_hand(runs, request, model_folder, monkeypatch, capsys):
    folder = request.getfixturevalue(runs)
    monkeypatch.setattr(inspect_tokens, "print_rows", lambda shown, colour: rows.extend(shown))
    monkeypatch.setattr(sys, "argv", ["", str(folder / "dvpo"), "--scalar", str(folder / "ppo"), "--rows", "8"])
    rows = []
    inspect_tokens.main()
    assert len(rows) == 8 and {row["truncated"] for row in rows} == {True, False} and len({len(row["tokens"]) for row in rows}) > 1
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    said = [token["before"] for row in rows for token in row["tokens"] if token["before"]]
    assert set(said) == ({"<user> food thai <assistant>"} if runs == "talks" else set())
    for row in rows:
        row["score"] += 0.5 * row["truncated"]  # what the reward gave
        last = max([0, *(t for t, token in enumerate(row["tokens"]) if token["before"])])
        ids = [token["id"] for token in row["tokens"][last:]]
        assert row["score"] == pytest.approx(len(tokenizer.decode(ids, skip_special_tokens=True).split()) / 4)
        quantiles, advantages, rewards, returns = by_hand(folder, model_folder, row, "dvpo")
        values, scalar_advantages, *_ = by_hand(folder, model_folder, row, "ppo")
        for t, token in enumerate(row["tokens"]):
            assert token["text"] == tokenizer.decode([token["id"]])
            q = quantiles[t]
            expected = {"shown": [q[math.ceil(p * 30 - 1e-6) - 1].item() for p in (0.05, 0.25, 0.5, 0.75, 0.95)], "quantiles": q.tolist(),
                        "mean": q.mean().item(), "std": q.std(unbiased=False).item(), "scalar": values[t].item(), "advantage": advantages[t],
                        "scalar_advantage": scalar_advantages[t], "reward": rewards[t], "return": returns[t]}  # fmt: skip
            for name, value in expected.items():
                assert token[name] == pytest.approx(value, abs=2e-5), name


def test_a_scalar_critic_is_fitted_where_none_is_given_and_colours_are_for_terminals(pair, monkeypatch, capsys):
    texts = set()
    for env, coloured in (({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)):
        for name in ("FORCE_COLOR", "NO_COLOR"):
            monkeypatch.setenv(name, env.get(name, ""))
        monkeypatch.setattr(sys, "argv", ["", str(pair / "dvpo"), "--samples", "11", "--rows", "1"])
        inspect_tokens.main()
        said = capsys.readouterr()
        assert "fitted here, as --algo ppo does it, on 10 responses" in said.out and "2/2" in said.err
        assert ("\x1b[" in said.out) == coloured and ("\n   distribution " in said.out, "\n   response " in said.out) == (coloured, not coloured)
        texts.add(re.sub(r"\x1b\[[0-9;]*m|\n   (distribution|scalar|response) .*| Blue: .*", "", said.out))
    assert len(texts) == 1 and "token " in min(texts)


def test_a_prompt_without_an_answer_has_values_and_no_advantage(pair, monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["--scalar", str(pair / "ppo"), "--greedy", "--prompt", "area north", "--html", str(page)]
    monkeypatch.setattr(sys, "argv", ["", str(pair / "dvpo"), *words])
    inspect_tokens.main()
    assert "no advantage: the reward needs columns" in (said := capsys.readouterr().out) and "NaN" not in page.read_text() and "note:" not in said
    sys.argv[-3] = "area elsewhere"
    inspect_tokens.main()
    assert "note: --prompt: the tokenizer does not know 1 of the prompts' 4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("flags,found", [
    (["{}/ppo"], "expected a run with --algo dvpo, whose critic predicts a distribution, found ppo"),
    (["{}/none"], "run: expected a whole checkpoint in '{}/none', found no such folder"),
    (["{}/dvpo", "--scalar", "{}/dvpo"], "--scalar: {}/dvpo: expected a run with --algo ppo, found dvpo"),
    (["{}/dvpo", "--prompt", "area " * 70], "--prompt: expected at most 58 tokens"),
    (["{}/dvpo", "--samples", "0"], "--samples: expected a whole number in [1, inf)"),
])  # fmt: skip
def test_what_cannot_be_inspected_is_one_line(pair, monkeypatch, capsys, flags, found):
    monkeypatch.setattr(sys, "argv", ["", *(flag.format(pair) for flag in flags)])
    with pytest.raises(SystemExit) as stopped:
        inspect_tokens.main()
    assert stopped.value.code == 2 and found.format(pair) in capsys.readouterr().err.splitlines()[-1]


def test_a_conversations_other_turns_stand_between_the_tokens(talks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["", str(talks / "dvpo"), "--scalar", str(talks / "ppo"), "--rows", "8", "--html", str(tmp_path / "page.html")])
    inspect_tokens.main()
    said, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert "|(<user> food thai <assistant>)|" in said and "\n(<user> food thai <assistant>)\n" in said
    assert page.count('<span class="user">&lt;user&gt; food thai &lt;assistant&gt;</span><button') == said.count("\n(<user> food") > 0


def test_runs_of_another_seed_or_unit_are_refused(pair, tmp_path):
    for changed, flag, algo, found in (
        ({"whiten_rewards": True}, "run", "dvpo", "--whiten-rewards"),
        ({"seed": 1}, "--scalar", "ppo", "expected --seed 0, as in the other run, found 1"),
        ({"user": "x:y"}, "--scalar", "ppo", "expected --user None, as in the other run, found x:y"),
        ({"user": "x:y", "max_turns": 7}, "--scalar", "ppo", "--user"),
        ({"max_turns": 7}, "--scalar", "ppo", "expected --max-turns 6"),
    ):
        shutil.copytree(pair / algo, tmp_path / algo, dirs_exist_ok=True)
        flags = json.loads((pair / algo / "args.json").read_text())
        (tmp_path / algo / "args.json").write_text(json.dumps({**flags, "flags": flags["flags"] | changed}))
        with pytest.raises(rollout.InputError, match=found):
            if flag == "run":
                inspect_tokens.flags_of(tmp_path / algo, flag, algo)
            else:
                inspect_tokens.scalar_critic(None, inspect_tokens.flags_of(pair / "dvpo", "run", "dvpo"), tmp_path / algo, 1)


def test_prompts_are_refused_where_the_user_needs_more_of_a_row():
    state = argparse.Namespace(user=rollout.scripted_user, evals={})
    with pytest.raises(rollout.InputError, match="--prompt: expected none, as the run's user needs the data's column 'replies'; found 'book area'"):
        inspect_tokens.prompts_of(state, None, ["book area"], 1)


HOSTILE = ["</script><script>document.title = 1</script>", "<!--NUMBERS-->", "\" onmouseover=\"x", "&lt;\n", "\x1b[31m\u202e"]


def hostile_page():
    """A page of five tokens whose numbers are 0.1, 0.2, ... and their tenths."""
    quantiles = lambda i, steps: [i / 10 + j / 100 for j in steps]
    turn = {2: "long " * 60 + "x" * 300}
    tokens = [{"text": inspect_tokens.visible(text), "before": turn.get(i, ""), "id": i, "quantiles": quantiles(i, range(10)),
               "shown": quantiles(i, (0, 2, 4, 7, 9)), "std": 0.03, "mean": i / 10 + 0.045, "advantage": 0.2 - i / 10,
               "scalar": i / 7, "scalar_advantage": -0.1, "reward": 0.0, "return": 0.5}
              for i, text in enumerate(HOSTILE)]  # fmt: skip
    return inspect_tokens.page([{"prompt": HOSTILE[0], "score": 1.0, "truncated": False, "tokens": tokens}], "<b>said</b>")


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_models_say():
    class Reader(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.seen, self.texts = [], [], []

        def handle_starttag(self, tag, attributes):
            self.seen.append((tag, dict(attributes)))
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.texts.append(data)

    page, reader = hostile_page(), Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open and [tag for tag, _ in reader.seen].count("script") == 2 and not any("onmouseover" in attributes for _, attributes in reader.seen)
    assert all(word not in page for word in ("http://", "https://", "src=", "@import", "url(", "\x1b", "\u202e"))
    visible = [*HOSTILE[:3], "&lt;↵", "·[31m·"]
    assert all(reader.texts.count(text) >= 2 for text in visible) and "<b>said</b>" in reader.texts


def find_browser(playwright):
    """Chromium's file: the variable CHROMIUM names it, or it is on the PATH, or Playwright has its own; else the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
    if not Path(found).is_file():
        pytest.skip("no browser: expected Chromium in the variable CHROMIUM, on the PATH, or by `playwright install chromium`")
    return found


def test_pointing_at_a_token_in_a_browser_shows_its_distribution(tmp_path):
    """And so do the keyboard and a click; no script of a token runs, and nothing is asked of a network."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, see requirements-browser.txt")
    (tmp_path / "page.html").write_text(hostile_page(), encoding="utf-8")
    wrong, asked = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(playwright), args=["--no-sandbox"])  # containers run as root
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        token, detail = page.locator(".token"), page.locator(".detail")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth") and page.locator(".user").count() == 1
        assert token.count() == 5 and "95 %: 0.090" in detail.inner_text()  # to begin with, the first: the largest advantage
        token.nth(3).hover()
        said = detail.text_content()
        assert all(text in said for text in ("before “&lt;↵”", "5 %: 0.300", "50 %: 0.340", "95 %: 0.390", "scalar critic's value0.429", "advantage-0.100"))
        marks = [float(circle.get_attribute("cx")) for circle in detail.locator("circle").all()]
        assert len(marks) == 5 and marks == sorted(marks) and len(set(marks)) == 5 and detail.locator("path.curve").count() == 1
        token.nth(1).focus()
        assert "before “<!--NUMBERS-->”" in detail.text_content()
        page.keyboard.press("ArrowLeft")
        assert "before “</script><script>" in detail.text_content() and page.locator(".token.on").count() == 1
        token.nth(4).click()
        assert "5 %: 0.400" in detail.text_content() and page.title() == "Which tokens carry the advantage"
        for scheme, dark in (("light", False), ("dark", True)):
            page.emulate_media(color_scheme=scheme)
            colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
            text, ground = (sum(map(int, re.findall("[0-9]+", colour)[:3])) for colour in colours)
            assert (text > ground + 300) == dark and (ground > text + 300) != dark
            page.screenshot(path=tmp_path / f"{scheme}.png")
        browser.close()
    assert not wrong and asked == [(tmp_path / "page.html").as_uri()]
    assert all((tmp_path / f"{scheme}.png").read_bytes()[:4] == b"\x89PNG" for scheme in ("light", "dark"))


# ---- what the READMEs name


READMES = [ROOT / "README.md", ROOT / "experiments" / "README.md"]


@pytest.mark.parametrize("readme", READMES, ids=["README", "experiments/README"])
def test_a_readmes_links_lead_somewhere(readme):
    anchors = {}
    for path in READMES:
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
        anchors[path] = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", readme.read_text()) if not link.startswith("https://")]
    assert len(links) > 10
    for link in links:
        name, _, anchor = link.partition("#")
        path = (readme.parent / name).resolve() if name else readme
        assert path.exists() and (not anchor or anchor in anchors[path]), link


@pytest.mark.parametrize("readme", READMES, ids=["README", "experiments/README"])
def test_a_readmes_flags_and_scripts_exist(readme):
    text, scripts = readme.read_text(), [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")]
    code = "\n".join(path.read_text() for path in scripts)  # a flag of any script will do
    flags = {f"--{name}" for group in train.FLAGS.values() for name, *_ in group} | set(re.findall(r'"(--[a-z][\w-]+)"', code)) | {"--help", "--cov"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) <= flags
    for script in re.findall(r"python ((?:experiments/)?\w+\.py)", text):
        assert (ROOT / script).exists(), script


def test_the_readmes_word_list_and_reading_order_name_code_that_exists():
    text = (ROOT / "README.md").read_text()
    rows = [line.split("|") for title in ("### Words", "## Reading order") for line in text.split(f"\n{title}\n")[1].split("\n#")[0].splitlines()]
    named = [(row[2], name) for row in rows if len(row) > 4 for name in re.findall(r"`([A-Za-z]\w+)`", row[3])]
    assert len(named) > 25
    for where, name in named:
        files = re.findall(r"\((\w+\.py)\)", where) or [path.name for path in ROOT.glob("*.py")]
        assert re.search(rf"^(?:def|class) {name}\b", "\n".join((ROOT / file).read_text() for file in files), re.M), (where, name)

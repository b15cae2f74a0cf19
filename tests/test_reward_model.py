"""experiments/reward_model.py: pairs, what is held out, and a model that train.py reads."""

import json
import shutil
import sys

import pytest
import torch
from common import bos_tokenizer, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from experiments import reward_model
from tasks import InputError
from tasks.rewards import load_reward

PLAIN = bos_tokenizer()


def test_reward_models_data_pairs_references_and_holds_out_dialogues(tmp_path):
    """Each reference is good once; once one of another dialogue stands in its place."""
    rows = []
    for i in range(12):
        rows.append({"prompt": f"p{i}", "reference": f"r{i % 4}", "dialogue_id": str(i // 2)})
    judged = reward_model.read(write_rows(tmp_path / "d.jsonl", rows), PLAIN)
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
        reward_model.read(tmp_path / "d.jsonl", PLAIN)


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


def test_what_a_chat_template_refuses_is_one_line(tmp_path):
    strict = "{% if messages[0].role == 'user' %}{{ raise_exception('it begins') }}{% endif %}"
    row = {"prompt": "a", "completion": "b", "reward": 1}
    data = write_rows(tmp_path / "d.jsonl", [row])
    with pytest.raises(InputError, match="row 1: expected texts .*: it begins"):
        reward_model.read(data, bos_tokenizer(strict))


def test_an_encoder_in_half_precision_is_trained_in_fp32(model_folder, tmp_path):
    """In bf16 an Adam step of 5e-5 is less than most weights' last digit."""
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    model, _ = reward_model.load_both(tmp_path, 64)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_rows_longer_than_the_encoder_reads_are_cut(model_folder, tmp_path, monkeypatch, capsys):
    """To its 64 positions, of which --max-length asks for more; and without padding: one line."""
    rows = [{"prompt": "area " * 200, "completion": "x", "reward": i % 2} for i in range(20)]
    data, out = write_rows(tmp_path / "d.jsonl", rows), str(tmp_path / "rm")
    monkeypatch.setattr(sys, "argv", ["", model_folder, data, out, "--epochs", "1"])
    reward_model.main()
    assert "held-out rows" in capsys.readouterr().out
    bare = shutil.copytree(model_folder, tmp_path / "bare")
    PLAIN.save_pretrained(bare)
    monkeypatch.setattr(sys, "argv", ["", str(bare), data, out])
    with pytest.raises(SystemExit) as ended:
        reward_model.main()
    found = "encoder: expected a tokenizer with a padding or an end token, found none"
    assert ended.value.code == 2 and found in capsys.readouterr().err.splitlines()[-1]

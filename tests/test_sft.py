"""experiments/sft.py: a model learns what should be said, and only that."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import rollout
from experiments import sft
from tasks import warm_start
from tasks.builtin import SLOTS, task_rows, task_tokenizer
from tasks.conversations import continuation
from tasks.prompts import encode_prompts


def assistant(content):
    return {"role": "assistant", "content": content}


def user(content):
    return {"role": "user", "content": content}


def labelled(labels):
    return [label for label in labels.tolist() if label != -100]


def test_both_losses_are_cross_entropy_on_the_policys_tokens(model):
    tokenizer = task_tokenizer("booking")
    row = task_rows("booking", "train", 1, 5)[0]
    prompt = encode_prompts([row["prompt"]], tokenizer)[0]
    talk = warm_start.example(prompt, row["completion"], tokenizer, 1)
    batch = [talk, (torch.tensor([5, 6, 7, 8]), torch.tensor([-100, -100, 7, 8]))]
    total, count = 0.0, 0
    for ids, labels in batch:
        logprobs = model(ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
        for t in range(1, len(ids)):
            if labels[t] != -100:
                total, count = total - logprobs[t - 1, ids[t]], count + 1
    said = [m["content"].split() for m in row["completion"] if m["role"] == "assistant"]
    assert count == sum(len(words) + 1 for words in said) + 2
    for loss in (warm_start.whole_loss, sft.response_loss):
        assert loss(model, batch).item() == pytest.approx(total.item() / count, rel=1e-5)


TURN = (
    "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else 'user' }}> "
    "{{ m.content }} MARK {% endfor %}<bot>"
)


@pytest.mark.parametrize(
    "template,stop_ids,expected",
    [
        (TURN.replace("MARK", "</s>"), [1], "ok </s> <user> go on </s> <bot> done </s>"),
        (TURN.replace("MARK", "<end>"), [1, 2], "ok <end> <user> go on <end> <bot> done <end>"),
        (
            "{% for m in messages %}{{ m.content }} : {% endfor %}<bot>",
            [1],
            "ok </s> : go on : <bot> done </s>",
        ),
    ],
    ids=["EOS", "another stop token", "no mark"],
)
def test_fine_tuning_ends_turns_as_the_template_does(template, stop_ids, expected):
    """And sees what a conversation will show."""
    words = ["<pad>", "</s>", "<end>", "<user>", "<bot>", "ok", "go", "on", "done", "\\n", ":"]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = template
    said = [assistant("ok"), user("go on"), assistant("done")]
    end_id = sft.end_of_turn(tokenizer, stop_ids)
    ids, labels = warm_start.example([4], said, tokenizer, end_id)
    assert " ".join(tokenizer.convert_ids_to_tokens(ids[1:])) == expected
    assert labelled(labels) == [ids[i] for i in (1, 2, -2, -1)]
    first = tokenizer.convert_ids_to_tokens(continuation(1, "go on", tokenizer))[0]
    assert first in ("<user>", "<end>", ":")


@pytest.fixture
def tune(model_folder, tmp_path, monkeypatch):
    """sft.py on rows, as a function (rows, *flags); its output is in tmp_path / "out"."""

    def run(rows, *flags):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["sft.py", model_folder, str(data), str(tmp_path / "out"), *flags]
        monkeypatch.setattr("sys.argv", words)
        sft.main()

    return run


def test_fine_tuning_teaches_and_keeps_the_first_layers(tune, tmp_path, capsys):
    rows = [{"prompt": f"area {value}", "answer": value, "other": 1} for value in SLOTS["area"]]
    overlong = {"prompt": "area " * 30, "answer": "north", "other": 1}
    flags = "--layers 1 --epochs 100 --batch-size 4 --max-length 20 --learning-rate 3e-3"
    tune([*rows, overlong], *flags.split())
    assert "4 rows (1 too long), 100 steps" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == len(model.base_model.h) == 1
    prompts = encode_prompts([row["prompt"] for row in rows], tokenizer)
    found = rollout.sample(model, prompts, 0, [1], 4, 0.0)
    assert rollout.completion_texts(found, tokenizer, [1]) == SLOTS["area"]


@pytest.mark.parametrize(
    "said,found",
    [
        (None, "found 'None'"),
        ([], "found '[]'"),
        ([user("x")], "row 1: expected a text, or messages"),
        ([{"role": "assistant"}], "row 1: expected a text"),
    ],
)
def test_rows_with_nothing_to_say_are_one_line(said, found, tune, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune([{"prompt": "area", "completion": text} for text in ([assistant("north")], said)])
    assert stopped.value.code == 2 and found in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--layers", "9"], "--layers: expected 1 to 2"),
        (["--max-length", "2"], "--max-length: expected rows"),
        (["--batch-size", "0"], "--batch-size"),
        (["--learning-rate", "-1"], "--learning-rate"),
    ],
)
def test_fine_tunings_bad_flags_are_one_line(flags, words, tune, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune([{"prompt": "area", "answer": "north"}], *flags)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_one_line_and_nothing_is_saved(tune, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune([{"prompt": "area", "answer": "north"}] * 64, "--learning-rate", "1e30")
    assert stopped.value.code == 2 and not [*(tmp_path / "out").iterdir()]
    found = "sft.py: error: --learning-rate: expected a finite loss, found nan"
    assert capsys.readouterr().err.splitlines()[-1] == found


def test_a_folder_that_is_a_file_ends_it_before_training(tune, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("kept")
    monkeypatch.setattr(sft, "fine_tune", lambda *rest: pytest.fail("it trained"))
    with pytest.raises(SystemExit) as stopped:
        tune([{"prompt": "area", "answer": "north"}])
    assert stopped.value.code == 2 and str(tmp_path / "out") in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "kept"

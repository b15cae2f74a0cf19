"""tasks/warm_start.py: examples and their labels, and a folder that is made once."""

import pytest
import torch
from common import few_rows, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout import sample
from tasks import warm_start as module
from tasks.builtin import task_rows, task_tokenizer
from tasks.prompts import encode_prompts
from tasks.verifiers import exact_reward
from tasks.warm_start import example, fine_tune, whole_loss
from tasks.warm_start import warm_start as make


def test_an_example_teaches_the_policys_tokens_only():
    tokenizer = task_tokenizer("booking")
    (row,) = task_rows("booking", "warm", 1, 3)
    (prompt,) = encode_prompts([row["prompt"]], tokenizer)
    ids, labels = example(prompt, row["completion"], tokenizer, tokenizer.eos_token_id)
    assert ids[: len(prompt)].tolist() == prompt and (labels[: len(prompt)] == -100).all()
    own = [turn["content"] for turn in row["completion"] if turn["role"] == "assistant"]
    taught = tokenizer.convert_ids_to_tokens(ids[labels != -100])
    assert taught == " <eos> ".join(own).split() + ["<eos>"]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    # The policy will see just these ids before its next turn.
    whole = encode_prompts([row["prompt"] + row["completion"]], tokenizer)[0]
    assert ids.tolist() == whole[: len(ids)]


def test_an_example_of_a_text_is_its_tokens_and_the_end():
    tokenizer = task_tokenizer("sums")
    ids, labels = example([9, 8], "19#19", tokenizer, 1)
    assert ids.tolist() == [9, 8, *tokenizer("19#19")["input_ids"], 1]
    assert labels.tolist() == [-100, -100, *ids[2:].tolist()]


def test_the_loss_of_a_batch_is_that_of_its_rows_whatever_the_padding():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    ids = [torch.randint(2, 40, (length,)) for length in (4, 9)]
    batch = [(row, torch.where(torch.arange(len(row)) < 2, -100, row)) for row in ids]
    with torch.no_grad():
        alone = torch.stack([whole_loss(model, [pair]) for pair in batch])
        together = whole_loss(model, batch)
    counts = torch.tensor([2.0, 7.0])
    torch.testing.assert_close(together, (alone * counts).sum() / counts.sum())


def test_fine_tuning_warms_up_and_decays_to_nothing():
    """Steps of a constant gradient under AdamW's decay are as long as the learning rate is."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.device = torch.device("cpu")
    weights = []

    def loss_of(model, rows):
        weights.append(model.weight.item())
        return model.weight.sum()

    losses = fine_tune(model, [0], loss_of, [[0]] * 40, 40, learning_rate=1e-3)
    assert losses == pytest.approx(weights)
    steps = -torch.tensor(weights).diff()
    expected = [1e-3 * min(1, (step + 1) / 20) * (1 - step / 40) for step in range(39)]
    torch.testing.assert_close(steps, torch.tensor(expected), rtol=0.05, atol=1e-6)


def test_the_built_in_model_can_do_the_task_and_has_room_to_learn(warm_start):
    model = AutoModelForCausalLM.from_pretrained(warm_start)
    tokenizer = AutoTokenizer.from_pretrained(warm_start)
    rows = task_rows("dialogue", "warm", 64, 5)
    prompt_ids = encode_prompts([row["prompt"] for row in rows], tokenizer)
    found = sample(model, prompt_ids, 0, [tokenizer.eos_token_id], 16, 0.0)
    ids = [row[mask].tolist() for row, mask in zip(found.response_ids, found.mask)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    right = sum(exact_reward(None, texts, [row["answer"] for row in rows]))
    assert 32 < right < 64


def test_a_folder_of_the_same_task_and_seed_stays_as_it_is(warm_start, monkeypatch):
    made = (warm_start / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(module, "fine_tune", None)
    make("dialogue", 0, warm_start)
    assert (warm_start / "model.safetensors").stat().st_mtime_ns == made


def test_a_second_warm_start_in_a_folder_leaves_nothing_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fine_tune", lambda *args, **flags: None)
    monkeypatch.setattr(module, "task_rows", few_rows)
    make("dialogue", 0, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    make("sums", 0, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None

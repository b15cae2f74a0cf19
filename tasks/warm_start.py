"""The model that is trained when none is given: a tiny Llama, briefly taught a built-in task."""

import json
import os

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from rollout import padded
from tasks import InputError, as_messages
from tasks.builtin import task_rows, task_tokenizer
from tasks.conversations import continuation
from tasks.prompts import encode_prompts


def example(prompt_ids, said, tokenizer, end_id):
    """A prompt and what should be said (a text, or messages): ids (L,), labels (L,), else -100."""
    ids, labels = [*prompt_ids], [-100] * len(prompt_ids)
    for message in as_messages(said, "assistant"):
        if message["role"] == "assistant":
            turn = tokenizer(message["content"], add_special_tokens=False)["input_ids"] + [end_id]
            labels += turn
        else:
            turn = continuation(end_id, message["content"], tokenizer)
            labels += [-100] * len(turn)
        ids += turn
    return torch.tensor(ids), torch.tensor(labels)


def whole_loss(model, batch):
    """transformers' own loss of a batch of (ids, labels), which computes logits at every token."""
    ids = padded([ids for ids, _ in batch], 0, model.device, side="right")
    labels = padded([labels for _, labels in batch], -100, model.device, side="right")
    attention = padded([torch.ones_like(ids) for ids, _ in batch], 0, model.device, side="right")
    return model(ids, attention_mask=attention, labels=labels).loss


def fine_tune(model, examples, loss_of, batches, num_steps, learning_rate, half=False):
    """num_steps of AdamW on loss_of(model, some examples) -> the losses; half: in bf16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    losses = []
    for step, rows in enumerate(tqdm(batches, desc="warm start", leave=False, disable=None)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (min(1, (step + 1) / 20) * (1 - step / num_steps))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            loss = loss_of(model, [examples[row] for row in rows])
        if not loss.isfinite():
            raise InputError(f"--learning-rate: expected a finite loss, found {loss.item()}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def warm_start(task, seed, folder):
    """Saves the policy and its tokenizer in folder, a Path, unless this seed's are there."""
    if "OMP_NUM_THREADS" not in os.environ:
        # For a model so small, threads wait for each other more than they compute.
        torch.set_num_threads(1)
    settings = json.dumps({"task": task, "seed": seed, "version": 2})
    made = folder / "settings.json"
    if made.exists() and made.read_bytes() == settings.encode():
        return
    torch.manual_seed(seed)
    tokenizer = task_tokenizer(task)
    hidden, num_steps, size, count = {"sums": (96, 450, 128, 16384)}.get(task, (64, 120, 64, 4096))
    sizes = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=True)
    special = dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=2)
    model = LlamaForCausalLM(LlamaConfig(initializer_range=0.05, **sizes, **special))
    held_out = task_rows(task, "test", 512, seed) + task_rows(task, "ood", 512, seed)
    held_out = {str(row["prompt"]) for row in held_out}
    rows = task_rows(task, "warm", count, seed)
    rows = [row for row in rows if str(row["prompt"]) not in held_out]
    prompts = encode_prompts([row["prompt"] for row in rows], tokenizer)
    examples = [example(ids, row["completion"], tokenizer, 1) for ids, row in zip(prompts, rows)]
    batches = [torch.randperm(len(rows))[:size].tolist() for _ in range(num_steps)]
    fine_tune(model, examples, whole_loss, batches, num_steps, learning_rate=3e-3)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # another task's
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made.write_text(settings)

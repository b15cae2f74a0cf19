"""Makes the model that train.py trains when it is given none: a tiny Llama, briefly taught a built-in task by examples.

    python experiments/warm_start.py dialogue FOLDER [SEED]

The examples hold few revised bookings (few long sums), so the model can do the task but not those: what is left for RL to learn.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout


def example(prompt_ids, completion, tokenizer):
    """Token ids of a prompt and what the policy should say (a text, or a conversation), and the labels: -100 but for the policy's tokens."""
    ids, labels = [*prompt_ids], [-100] * len(prompt_ids)
    for message in [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion:
        if message["role"] == "assistant":
            turn = tokenizer(message["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        else:
            turn = rollout.turns_between(message["content"], tokenizer)[1:]  # the stop token stands at the end of the turn before
        ids += turn
        labels += turn if message["role"] == "assistant" else [-100] * len(turn)
    return ids, labels


def warm_start(task, seed, folder):
    """Saves the tiny policy and its tokenizer in folder (a Path), or leaves the ones that a run with the same task and seed made."""
    settings = json.dumps({"task": task, "seed": seed, "version": 2})
    if (folder / "settings.json").exists() and (folder / "settings.json").read_text() == settings:
        return
    torch.manual_seed(seed)
    tokenizer = rollout.task_tokenizer(task)
    hidden, steps, batch_size, num_rows = {"dialogue": (64, 120, 64, 4096), "booking": (64, 120, 64, 4096), "sums": (96, 450, 128, 16384)}[task]
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.05, **special,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    held_out = {str(row["prompt"]) for split in ("test", "ood") for row in rollout.task_rows(task, split, 512, seed)}
    rows = [row for row in rollout.task_rows(task, "warm", num_rows, seed) if str(row["prompt"]) not in held_out]
    prompts = rollout.encode_prompts([row["prompt"] for row in rows], tokenizer)
    examples = [example(prompt, row["completion"], tokenizer) for prompt, row in zip(prompts, rows)]
    ids, labels = ([torch.tensor(part) for part in parts] for parts in zip(*examples))
    for _ in tqdm(range(steps), desc="warm start", leave=False):
        batch = torch.randperm(len(rows))[:batch_size].tolist()
        batch_ids, batch_labels = (pad_sequence([x[i] for i in batch], True, fill) for x, fill in ((ids, 0), (labels, -100)))
        model(batch_ids, attention_mask=torch.ones_like(batch_ids), labels=batch_labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "settings.json").write_text(settings)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in rollout.TASKS:
        sys.exit(__doc__)
    warm_start(sys.argv[1], int(sys.argv[3]) if len(sys.argv) > 3 else 0, Path(sys.argv[2]))

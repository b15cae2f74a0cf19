"""Makes the model that train.py trains when it is given none: a tiny Llama, briefly taught a built-in task by examples.

    python experiments/warm_start.py dialogue FOLDER [SEED]

The examples hold few revised bookings (few long sums), so the model can do the task but not those: what is left for RL to learn.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout
from experiments.sft import example, fine_tune, whole_loss


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
    held_out = {str(row["prompt"]) for split in ("test", "ood") for row in rollout.task_rows(task, split, 512, seed)}
    rows = [row for row in rollout.task_rows(task, "warm", num_rows, seed) if str(row["prompt"]) not in held_out]
    prompts = rollout.encode_prompts([row["prompt"] for row in rows], tokenizer)
    examples = [example(prompt, row["completion"], tokenizer, tokenizer.eos_token_id) for prompt, row in zip(prompts, rows)]
    batches = (torch.randperm(len(rows))[:batch_size].tolist() for _ in range(steps))
    fine_tune(model, examples, whole_loss, batches, steps, learning_rate=3e-3)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # another task's, which this one's tokenizer would not overwrite
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "settings.json").write_text(settings)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in rollout.TASKS:
        sys.exit(__doc__)
    warm_start(sys.argv[1], int(sys.argv[3]) if len(sys.argv) > 3 else 0, Path(sys.argv[2]))

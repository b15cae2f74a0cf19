"""An iteration of this repository beside one of TRL's PPOTrainer, on the same model, in turns.

    pip install trl==1.12.0     # the last release with a PPO trainer; no requirement of ours
    OMP_NUM_THREADS=1 python experiments/bench_trl.py               # and with --ragged
    OMP_NUM_THREADS=1 python experiments/bench_trl.py -- --kl-coef 0    # not of TRL's reference

TRL has its scalar critic, KL in the reward, 2 mini-batches, 2 epochs, a reward model of no size;
ours are dvpo and ppo. TRL's turn includes the metrics that it logs, ours not their writing.
"""

import contextlib
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from transformers import TrainerCallback

from experiments import bench


class Turn(TrainerCallback):
    """One iteration of TRL's loop for each message."""

    def __init__(self, connection, held):
        self.connection, self.held = connection, held

    def on_train_begin(self, *_, **__):
        if not bench.told_to_go_on(self.connection):
            raise KeyboardInterrupt  # its loop knows no other end
        bench.peak_memory()
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        total = time.perf_counter() - self.start
        self.connection.send({"total": total, "peak MiB": bench.peak_memory() - self.held})
        self.on_train_begin()


def trainer_of(args, folder, callback):
    """TRL's trainer of the model in a folder."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_dataset("json", data_files=f"{folder}/prompts.jsonl", split="train")
    ids = [tokenizer(prompt)["input_ids"] for prompt in rows["prompt"]]
    rows = rows.add_column("input_ids", ids).remove_columns("prompt")
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    kind = AutoModelForSequenceClassification
    value_model = kind.from_pretrained(folder, num_labels=1)
    small = dict.fromkeys(("hidden_size", "intermediate_size"), 8)
    small |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    no_size = type(policy.config)(**{**policy.config.to_dict(), **small, "num_labels": 1})
    for model in (policy, reference):
        bench.shape_lengths(model, args.prompt, args.ragged)
    gpu = torch.cuda.is_available()
    options = {"per_device_train_batch_size": args.batch, "gradient_accumulation_steps": 1}
    options |= {"num_mini_batches": 2, "num_ppo_epochs": 2, "total_episodes": 1000 * args.batch}
    options |= {"local_rollout_forward_batch_size": args.batch, "response_length": args.response}
    options |= {"temperature": 1.0, "stop_token": "eos" if args.ragged else None}
    options |= {"num_sample_generations": 0, "save_strategy": "no", "report_to": []}
    options |= {"use_cpu": not gpu, "bf16": gpu, "gradient_checkpointing": False}
    options |= {"learning_rate": 1e-6, "logging_steps": 10**6, "disable_tqdm": True}
    config = PPOConfig(output_dir=folder, **options)
    models = (policy, reference, kind.from_config(no_size))
    return PPOTrainer(config, tokenizer, *models, rows, value_model, callbacks=[callback])


def worker(connection, args, flags):
    """TRL's process, as bench.worker."""
    sys.stdout = sys.stderr  # it prints its metrics
    bench.peak_memory()
    held = bench.peak_memory()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        bench.make_model(args, Path(folder))
        trainer_of(args, folder, Turn(connection, held)).train()


def main():
    args = bench.make_parser().parse_args()
    rows = {"TRL PPO": bench.start(worker, args, [])}
    for algo in ("dvpo", "ppo"):
        rows[algo] = bench.start(bench.worker, args, ["--algo", algo, *args.flags])
    columns, found = ("total", "peak MiB"), bench.measure(rows, args.iterations)
    bench.print_table({name: {c: row[c] for c in columns} for name, row in found.items()})


if __name__ == "__main__":
    main()

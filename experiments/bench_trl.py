"""An iteration of this repository beside one of TRL's trainers, on the same model, in turns.

    pip install trl==1.12.0     # the last release with a PPO trainer; no requirement of ours
    OMP_NUM_THREADS=1 python experiments/bench_trl.py    # with --ragged, or behind -- --kl-coef 0
    pip install trl==1.16.0
    OMP_NUM_THREADS=1 python experiments/bench_trl.py --method grpo     # groups of 8

Both have 2 mini-batches and 2 epochs. TRL's PPO has its scalar critic, KL in the reward (always)
and a reward model of no size; ours are dvpo and ppo. TRL's turn includes the metrics that it logs,
ours not their writing.
"""

import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
import transformers
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import bench


class Turn(transformers.TrainerCallback):
    """One iteration of TRL's loop, so many of its steps, for each message."""

    def __init__(self, connection, held, steps):
        self.connection, self.held, self.steps = connection, held, steps

    def on_train_begin(self, *_, **__):
        self.connection.recv()  # or EOFError: its loop knows no other end
        bench.peak_memory()
        self.start = time.perf_counter()

    def on_step_end(self, _, state, *__, **___):
        if state.global_step % self.steps == 0:
            total = time.perf_counter() - self.start
            self.connection.send({"total": total, "peak MiB": bench.peak_memory() - self.held})
            self.on_train_begin()


def options_of(folder):
    """What the configs of both trainers say."""
    gpu = torch.cuda.is_available()
    options = {"output_dir": folder, "temperature": 1.0, "learning_rate": 1e-6}
    options |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    options |= {"use_cpu": not gpu, "bf16": gpu, "logging_steps": 10**6, "disable_tqdm": True}
    return options | {"save_strategy": "no", "report_to": []}


def ppo_trainer(args, folder, callback):
    """TRL's PPO trainer of the model in a folder."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_dataset("json", data_files=f"{folder}/prompts.jsonl", split="train")
    ids = [tokenizer(prompt)["input_ids"] for prompt in rows["prompt"]]
    rows = rows.add_column("input_ids", ids).remove_columns("prompt")
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    kind = transformers.AutoModelForSequenceClassification
    value_model = kind.from_pretrained(folder, num_labels=1)
    small = dict.fromkeys(("hidden_size", "intermediate_size"), 8)
    small |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    no_size = type(policy.config)(**{**policy.config.to_dict(), **small, "num_labels": 1})
    for model in (policy, reference):
        bench.shape_lengths(model, args.prompt, args.ragged)
    own = {"num_mini_batches": 2, "num_ppo_epochs": 2, "total_episodes": 1000 * args.batch}
    own |= {"local_rollout_forward_batch_size": args.batch, "response_length": args.response}
    own |= {"per_device_train_batch_size": args.batch, "num_sample_generations": 0}
    own |= {"stop_token": "eos" if args.ragged else None}
    models = (policy, reference, kind.from_config(no_size))
    config = PPOConfig(**options_of(folder), **own)
    return PPOTrainer(config, tokenizer, *models, rows, value_model, callbacks=[callback])


def grpo_trainer(args, folder, callback):
    """TRL's GRPO trainer of the model in a folder."""
    from trl import GRPOConfig, GRPOTrainer

    rows = load_dataset("json", data_files=f"{folder}/prompts.jsonl", split="train")
    policy = AutoModelForCausalLM.from_pretrained(folder)
    bench.shape_lengths(policy, args.prompt, args.ragged)
    own = {"num_iterations": 2, "steps_per_generation": 2, "num_generations": 8, "max_steps": 4000}
    own |= {"per_device_train_batch_size": args.batch // 2, "max_completion_length": args.response}
    own |= {"loss_type": "grpo", "beta": 0.0 if "--kl-coef" in args.flags else 0.05}
    config, reward = GRPOConfig(**options_of(folder), **own), bench.lengths_reward
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = {"train_dataset": rows, "processing_class": tokenizer, "callbacks": [callback]}
    return GRPOTrainer(policy, reward, config, **parts)


# TRL's trainer, its steps per iteration, and what of ours stands beside it.
METHODS = {"ppo": (ppo_trainer, 1, ("dvpo", "ppo")), "grpo": (grpo_trainer, 4, ("grpo",))}


def worker(connection, held, args, flags):
    """TRL's run, as bench.worker has ours."""
    sys.stdout = sys.stderr  # it prints its metrics
    trainer_of, steps, _ = METHODS[args.method]
    with tempfile.TemporaryDirectory() as folder:
        bench.make_model(args, Path(folder))
        trainer_of(args, folder, Turn(connection, held, steps)).train()


def main():
    parser = bench.make_parser()
    parser.add_argument("--method", choices=METHODS, default="ppo")
    args = parser.parse_args()
    rows = {f"TRL {args.method}": bench.start(worker, args, [])}
    for algo in METHODS[args.method][2]:
        rows[algo] = bench.start(bench.worker, args, ["--algo", algo, *args.flags])
    columns, found = ("total", "peak MiB"), bench.measure(rows, args.iterations)
    bench.print_table({name: {c: row[c] for c in columns} for name, row in found.items()})


if __name__ == "__main__":
    main()

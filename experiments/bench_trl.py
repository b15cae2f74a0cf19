"""An iteration of this repository beside one of TRL's PPOTrainer, on the same model, prompts, lengths and thread count, turn by turn.

    pip install trl==1.12.0                     # the last release with a PPO trainer; no requirement of this repository
    OMP_NUM_THREADS=1 python experiments/bench_trl.py
    OMP_NUM_THREADS=1 python experiments/bench_trl.py --ragged
    OMP_NUM_THREADS=1 python experiments/bench_trl.py -- --kl-coef 0     # TRL runs its reference model all the same

TRL has its scalar critic, KL in the reward, 2 mini-batches, 2 epochs, a reward model of no size; ours are dvpo and ppo. TRL's turn
includes the metrics that it logs, ours their computation but not the writing.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import bench


def worker(connection, args, flags):
    """TRL's process: one iteration of its loop for each message, as bench.worker."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    sys.stdout = sys.stderr  # it prints its metrics
    held = bench.held_memory()
    with tempfile.TemporaryDirectory() as folder:
        bench.make_model(args, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = load_dataset("json", data_files=f"{folder}/prompts.jsonl", split="train")
        rows = rows.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns="prompt")
        policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
        value_model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    no_size = LlamaConfig(vocab_size=policy.config.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                          num_labels=1, pad_token_id=0, max_position_embeddings=policy.config.max_position_embeddings)  # fmt: skip
    for model in (policy, reference):
        bench.shape_lengths(model, args.prompt, args.ragged)

    class Turn(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.wait()

        def wait(self):
            if not connection.recv():
                raise KeyboardInterrupt  # its loop knows no other end
            bench.peak_memory()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            total = time.perf_counter() - self.start
            connection.send({"total": total, "peak MiB": (bench.peak_memory() - held) / 2**20})
            self.wait()

    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, per_device_train_batch_size=args.batch, gradient_accumulation_steps=1, num_mini_batches=2, num_ppo_epochs=2,
            total_episodes=1000 * args.batch, local_rollout_forward_batch_size=args.batch, response_length=args.response, temperature=1.0,
            stop_token="eos" if args.ragged else None, num_sample_generations=0, save_strategy="no", report_to=[], use_cpu=args.device == "cpu",
            learning_rate=1e-6, logging_steps=10**6, disable_tqdm=True, bf16=args.device != "cpu", gradient_checkpointing=False,
        )  # fmt: skip
        reward_model = AutoModelForSequenceClassification.from_config(no_size)
        trainer = PPOTrainer(config, tokenizer, policy, reference, reward_model, rows, value_model, callbacks=[Turn()])
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()


def main():
    parser = bench.make_parser()
    args = bench.with_lengths(parser.parse_args())
    import torch

    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {"TRL PPO": bench.start(worker, args, [])}
    for algo in ("dvpo", "ppo"):
        rows[algo] = bench.start(bench.worker, argparse.Namespace(**vars(args)), ["--algo", algo, *args.flags])
    table = {name: {column: row[column] for column in ("total", "peak MiB")} for name, row in bench.measure(rows, args.iterations).items()}
    bench.print_table(" ".join(["bench_trl.py", *sys.argv[1:]]), table)


if __name__ == "__main__":
    main()

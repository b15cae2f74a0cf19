"""Supervised fine-tuning on prompts and what should be said: a warm start for a model that earns no reward yet.

    python experiments/sft.py FOLDER_OR_HUB_NAME dialogues.jsonl OUTPUT_FOLDER               # rows with prompt and completion, reference or answer
    python experiments/sft.py FOLDER_OR_HUB_NAME data.jsonl,more.jsonl OUTPUT_FOLDER --layers 6      # only the model's first 6 layers: for a CPU

The loss counts the policy's tokens only. Prompts are encoded as train.py does it. Rows beyond --max-length tokens are left out.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout
from dvpo import masked_mean

SAID = ("completion", "reference", "answer")  # columns with what should be said; the first that a row has


def end_of_turn(tokenizer, stop_ids):
    """The stop token that the chat template writes behind an assistant's turn, else the tokenizer's EOS."""
    if tokenizer.chat_template:
        first = next((token for token in rollout.turns_between("x", tokenizer) if tokenizer.decode([token]).strip()), None)
        if first in stop_ids:
            return first
    return tokenizer.eos_token_id


def example(prompt_ids, said, tokenizer, end_id):
    """Token ids of a prompt and what the policy should say (a text, or a conversation), and the labels: -100 but for the policy's tokens."""
    ids, labels = [*prompt_ids], [-100] * len(prompt_ids)
    for message in [{"role": "assistant", "content": said}] if isinstance(said, str) else said:
        if message["role"] == "assistant":
            turn = [*tokenizer(message["content"], add_special_tokens=False)["input_ids"], end_id]
        else:
            turn = rollout.continuation(end_id, message["content"], tokenizer)
        ids += turn
        labels += turn if message["role"] == "assistant" else [-100] * len(turn)
    return torch.tensor(ids), torch.tensor(labels)


def whole_loss(model, batch):
    """transformers' own loss of a batch of (ids, labels), which computes logits at every token."""
    ids, labels = zip(*batch)
    padded = lambda rows, fill: rollout.padded(rows, fill, model.device)
    return model(padded(ids, 0), attention_mask=padded([torch.ones_like(row) for row in ids], 0), labels=padded(labels, -100)).loss


def response_loss(model, batch):
    """The same number, with logits only from the first label on: with a vocabulary of 50,000 they would cost most."""
    starts = [int((labels != -100).nonzero()[0]) for _, labels in batch]
    prompts, responses = [ids[:start] for (ids, _), start in zip(batch, starts)], [ids[start:] for (ids, _), start in zip(batch, starts)]
    masks = [labels[start:] != -100 for (_, labels), start in zip(batch, starts)]
    examples = rollout.assembled(prompts, responses, masks, [False] * len(batch), 0, model.device)
    return -masked_mean(rollout.response_logprobs(model, examples, 1.0), examples.mask)


def fine_tune(model, examples, loss_of, batches, num_steps, learning_rate, half=False):
    """AdamW with linear decay on loss_of(model, some examples), batches: their rows, num_steps lists; half: bf16 matrix products -> losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / num_steps))
    losses = []
    with tqdm(batches, total=num_steps, desc="warm start", leave=False) as bar:
        for rows in bar:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
                loss = loss_of(model, [examples[row] for row in rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.2f}")
    return losses


def first_layers(model, count):
    """Keeps the first `count` of the model's layers; raises InputError for a model whose layers it does not find."""
    layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", None)
    if layers is None or not 1 <= count <= len(layers):
        raise rollout.InputError(f"--layers: expected 1 to {len(layers or ())}, the model's own, found {count}")
    del layers[count:]
    for name in ("num_hidden_layers", "n_layer"):
        if hasattr(model.config, name):
            setattr(model.config, name, count)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]


def main():
    from train import number_in, run_script  # not above: train.py's own warm start uses this file

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", help="a hub name, or json, jsonl or parquet files with commas between")
    parser.add_argument("output", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--layers", type=number_in("[1, inf)", int), help="keep only so many of the model's layers, from the first on")
    parser.add_argument("--max-length", type=number_in("[2, inf)", int), default=512, help="tokens of prompt and response")
    parser.add_argument("--epochs", type=number_in("(0, inf)", float), default=1.0)
    parser.add_argument("--batch-size", type=number_in("[1, inf)", int), default=16)
    parser.add_argument("--learning-rate", type=number_in("(0, inf)", float), default=2e-4)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16; the weights stay fp32")
    parser.add_argument("--seed", type=int, default=0)
    run_script(parser, tune, parser.parse_args())


def read(name, args, tokenizer, end_id):
    """One file's examples; raises InputError naming the row."""
    data = rollout.load_prompts("data", name, args.split, tokenizer, float("inf"))
    examples = []
    for row, values in enumerate(data):
        said = next((values[column] for column in SAID if values.get(column) is not None), None)
        said = str(said) if isinstance(said, (int, float)) else said
        turns = said if isinstance(said, list) and said else [{"role": "assistant", "content": said}]
        if not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns) or turns[-1].get("role") != "assistant":
            expected = f"a text, or messages with an assistant's at the end, in {', '.join(SAID[:-1])} or {SAID[-1]}"
            raise rollout.InputError(f"data: {name}, row {row}: expected {expected}, found {str(said)[:60]!r}")
        examples.append(example(values[rollout.PROMPT_IDS], said, tokenizer, end_id))
    return examples


def tune(args):
    from train import context_of, load

    torch.manual_seed(args.seed)
    model, tokenizer = load(AutoModelForCausalLM, args.model, "model"), load(AutoTokenizer, args.model, "model")
    if args.layers is not None:
        first_layers(model, args.layers)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    end_id, longest = end_of_turn(tokenizer, rollout.stop_token_ids(model, tokenizer)), min(args.max_length, context_of(model))
    if end_id is None:
        raise rollout.InputError("model: expected a tokenizer with an end-of-sequence token, found none")
    found = [pair for name in args.data.split(",") for pair in read(name, args, tokenizer, end_id)]
    examples = [pair for pair in found if len(pair[0]) <= longest]
    if not examples:
        raise rollout.InputError(f"--max-length: expected rows of at most {longest} tokens, found {len(found)} longer ones")
    num_steps = max(1, round(args.epochs * len(examples) / args.batch_size))
    epochs = range(-(-num_steps * args.batch_size // len(examples)))
    batches = [rows.tolist() for _ in epochs for rows in torch.randperm(len(examples)).split(args.batch_size)][:num_steps]
    losses = fine_tune(model, examples, response_loss, batches, len(batches), args.learning_rate, args.bf16)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    early, late = (statistics.fmean(part) for part in (losses[:20], losses[-20:]))
    print(f"{len(examples)} rows ({len(found) - len(examples)} too long), {len(losses)} steps: loss {early:.3f} -> {late:.3f}; written: {args.output}")


if __name__ == "__main__":
    main()

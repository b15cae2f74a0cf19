"""Supervised fine-tuning on prompts and what should be said: for a model that earns nothing yet.

    python experiments/sft.py MODEL data.jsonl FOLDER    # prompt; completion, reference or answer

MODEL: a folder or a hub name. The loss counts the policy's tokens only; prompts are encoded as
train.py does it. Rows beyond --max-length tokens are left out.
"""

import math
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch

import rollout
from dvpo import masked_mean
from experiments.scripts import COUNT, load_policy, new_parser, run_script
from harness.flags import number_in
from harness.setup import context_of, stop_token_ids
from tasks import InputError
from tasks.conversations import continuation
from tasks.prompts import PROMPT_IDS, load_prompts
from tasks.warm_start import example, fine_tune

SAID = ("completion", "reference", "answer")  # columns; the first that a row has


def end_of_turn(tokenizer, stop_ids):
    """The stop token that the template writes behind an assistant's turn, else the EOS."""
    if tokenizer.chat_template:
        ids = continuation(None, "x", tokenizer)
        first = next((token for token in ids if tokenizer.decode([token]).strip()), None)
        if first in stop_ids:
            return first
    return tokenizer.eos_token_id


def response_loss(model, batch):
    """whole_loss with logits only from the first label on: with 50,000 tokens they cost most."""
    starts = [int((labels != -100).nonzero()[0]) for _, labels in batch]
    prompts = [ids[:start] for (ids, _), start in zip(batch, starts)]
    responses = [ids[start:] for (ids, _), start in zip(batch, starts)]
    masks = [labels[start:] != -100 for (_, labels), start in zip(batch, starts)]
    whole = [False] * len(batch)
    examples = rollout.assemble(prompts, responses, masks, whole, 0, model.device)
    return -masked_mean(rollout.response_logprobs(model, examples, 1.0), examples.mask)


def first_layers(model, count):
    """Keeps the first `count` of the model's layers; raises InputError where it finds fewer."""
    layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", ())
    if count > len(layers):
        raise InputError(f"--layers: expected 1 to {len(layers)}, the model's own, found {count}")
    del layers[count:]
    model.config.num_hidden_layers = count  # GPT-2's n_layer, too
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]


def read(name, tokenizer, end_id, limit):
    """A file's examples, their ids below limit; raises InputError naming the row."""
    examples = []
    for row, values in enumerate(load_prompts("data", name, "train", tokenizer, float("inf"))):
        said = next((values[column] for column in SAID if values.get(column) is not None), None)
        said = str(said) if isinstance(said, (int, float)) else said
        turns = said if isinstance(said, list) else [{"role": "assistant", "content": said}]
        texts = [isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns]
        if not turns or not all(texts) or turns[-1].get("role") != "assistant":
            expected = "a text, or messages with an assistant's at the end"
            where = f"data: {name}, row {row}: expected {expected}, in {', '.join(SAID)}"
            raise InputError(f"{where}, found {str(said)[:60]!r}")
        examples.append(example(values[PROMPT_IDS], said, tokenizer, end_id))
        if (most := examples[-1][0].max()) >= limit:
            expected = f"expected token ids below {limit}, the model's"
            raise InputError(f"data: {name}, row {row}: {expected}, found {most}")
    return examples


def tune(args):
    torch.manual_seed(0)
    model, tokenizer = load_policy(args.model, "model")
    if args.layers is not None:
        first_layers(model, args.layers)
    end_id = end_of_turn(tokenizer, stop_token_ids(model, tokenizer))
    if end_id is None:
        raise InputError("model: expected a tokenizer with an end-of-sequence token, found none")
    longest = min(args.max_length, context_of(model))
    found = read(args.data, tokenizer, end_id, model.config.vocab_size)
    examples = [pair for pair in found if len(pair[0]) <= longest]
    if not examples:
        expected = f"expected rows of at most {longest} tokens, found {len(found)} longer ones"
        raise InputError(f"--max-length: {expected}")
    num_steps = max(1, round(args.epochs * len(examples) / args.batch_size))
    orders = [torch.randperm(len(examples)) for _ in range(math.ceil(args.epochs))]
    batches = [rows.tolist() for order in orders for rows in order.split(args.batch_size)]
    fit = (response_loss, batches[:num_steps], num_steps, args.learning_rate, args.bf16)
    args.output.mkdir(parents=True, exist_ok=True)  # or nothing could be saved
    losses = fine_tune(model.train(), examples, *fit)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    early, late = (statistics.fmean(part) for part in (losses[:20], losses[-20:]))
    rows = f"{len(examples)} rows ({len(found) - len(examples)} too long), {len(losses)} steps"
    print(f"{rows}: loss {early:.3f} -> {late:.3f}; written: {args.output}")


def main():
    parser = new_parser(__doc__)
    positive = number_in("(0, inf)", float)
    parser.add_argument("model")
    parser.add_argument("data", help="a hub name, or a json, jsonl or parquet file")
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=COUNT, help="keep only so many of the model's, the first")
    parser.add_argument("--max-length", type=COUNT, default=512, help="tokens of a whole row")
    parser.add_argument("--epochs", type=positive, default=1.0)
    parser.add_argument("--batch-size", type=COUNT, default=16)
    parser.add_argument("--learning-rate", type=positive, default=2e-4)
    parser.add_argument("--bf16", action="store_true", help="matrix products; weights stay fp32")
    run_script(parser, tune)


if __name__ == "__main__":
    main()

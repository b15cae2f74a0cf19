"""From prompts to scored samples: tasks, prompt encoding, sampling, log-probs, verifiers, reward noise. Top to bottom as data flows.

Two rules keep the importance ratio honest. What was sampled is what is trained on: token ids in, token ids out, text only for
the reward. And the old log-probs are those of the update's own forward pass, or have been checked against them.
"""

import importlib
import inspect
import json
import random
import re
import sys
import traceback
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline

from dvpo import token_logprobs

PROMPT_IDS, PSEUDO_LABEL = "_prompt_ids", "_pseudo_label"  # columns of ours beside the user's


class InputError(ValueError):
    """What the user gave cannot work. The message is one line: the flag or row, what was found, what is expected."""


def one_line(error):
    return " ".join(str(error).split())[:160]


SLOTS = {
    "area": "north south east west".split(),
    "food": "thai greek indian french".split(),
    "price": "cheap fair dear".split(),
    "day": "monday tuesday friday sunday".split(),
    "people": "two three four five six".split(),
}
TASKS = {  # per split: range of the number of terms, user turns or slots, and the share of long sums or of turns that revise an earlier one
    "sums": {"warm": ((2, 3), 0.1), "train": ((2, 4), 0.0), "test": ((2, 4), 0.0), "ood": ((5, 6), 0.0)},
    "dialogue": {"warm": ((2, 5), 0.03), "train": ((2, 5), 0.5), "test": ((2, 5), 0.5), "ood": ((6, 8), 0.5)},
    "booking": {"warm": ((3, 4), 0.03), "train": ((3, 4), 0.5), "test": ((3, 4), 0.5), "ood": ((5, 5), 0.5)},
}


def task_row(task, split, rng):
    """One example of a built-in task as {prompt, answer, completion}; rng a random.Random.

    sums: `12+7+40=` -> `19,59#59`, running totals and then the answer.  dialogue: a user fills the slots of a booking turn by
    turn, sometimes changing their mind, and then asks for it -> the slots as they stand at the end.  booking: the same the other way
    round, for scripted_user: the policy asks slot by slot for what the first message leaves open, and then books.  [ours]
    """
    (low, high), rare = TASKS[task][split]
    length = rng.randint(low, high)
    if task == "sums":
        length = rng.randint(4, 6) if rng.random() < rare else length
        terms = [rng.randint(1, 20) for _ in range(length)]
        totals = [str(sum(terms[: i + 1])) for i in range(1, length)]
        return {"prompt": "+".join(map(str, terms)) + "=", "answer": totals[-1], "completion": ",".join(totals) + "#" + totals[-1]}
    if task == "booking":
        return booking_row(length, rare, rng)
    state, messages = {}, []
    for _ in range(length):
        unset = [slot for slot in SLOTS if slot not in state]
        revise = state and (not unset or rng.random() < rare)
        slot = rng.choice(list(state) if revise else unset)
        state[slot] = rng.choice([value for value in SLOTS[slot] if value != state.get(slot)])
        messages += [{"role": "user", "content": f"{slot} {state[slot]}"}, {"role": "assistant", "content": "ok"}]
    messages.append({"role": "user", "content": "book"})
    answer = " ".join(f"{slot} {state[slot]}" for slot in SLOTS if slot in state)
    return {"prompt": messages, "answer": answer, "completion": answer}


def booking_row(num_slots, rare, rng):
    """{prompt, replies, completion}: `book area food thai` -> ask for `area`, hear `area north`, or `area north food greek`, book."""
    values = {slot: rng.choice(SLOTS[slot]) for slot in rng.sample(list(SLOTS), num_slots)}
    given = set(rng.sample(list(values), rng.randint(1, num_slots - 1)))
    opening = " ".join(f"{slot} {values[slot]}" if slot in given else slot for slot in values)
    known, replies, completion = [slot for slot in values if slot in given], {}, []
    for slot in (slot for slot in values if slot not in given):
        replies[slot] = f"{slot} {values[slot]}"
        if rng.random() < rare:
            changed = rng.choice(known)
            values[changed] = rng.choice([value for value in SLOTS[changed] if value != values[changed]])
            replies[slot] += f" {changed} {values[changed]}"
        known.append(slot)
        completion += [{"role": "assistant", "content": slot}, {"role": "user", "content": replies[slot]}]
    booked = " ".join(f"{slot} {values[slot]}" for slot in SLOTS if slot in values)
    completion.append({"role": "assistant", "content": f"book {booked}"})
    return {"prompt": [{"role": "user", "content": f"book {opening}"}], "replies": json.dumps(replies), "completion": completion}


def scripted_user(messages, replies, **columns):
    """The user of the booking task: answers a slot's name with its value, anything else with ok, and leaves when something is booked."""
    said = messages[-1]["content"]
    return None if said.startswith("book") else json.loads(replies).get(said.strip(), "ok")


def booking_reward(prompts, completions, **columns):
    """1.0 where the last turn books every slot that the user named, with the value that the user said last, else 0.0."""
    scores = []
    for prompt, completion in zip(prompts, completions):
        state = {}
        for word in " ".join(m["content"] for m in [*prompt, *completion] if m["role"] == "user").split():
            if word in SLOTS:
                slot = word
                state.setdefault(slot)
            elif word not in ("book", "ok"):
                state[slot] = word
        expected = ["book", *(word for slot in SLOTS if slot in state for word in (slot, state[slot]))]  # None: not said
        scores.append(float(text_of(completion).split() == expected))
    return scores


def task_rows(task, split, num_rows, seed):
    """num_rows examples with distinct prompts, the same for the same seed."""
    rng, rows = random.Random(f"{task}/{split}/{seed}"), {}
    while len(rows) < num_rows:
        row = task_row(task, split, rng)
        rows[str(row["prompt"])] = row
    return list(rows.values())


def task_tokenizer(task):
    """A small real tokenizer: characters for sums, words and a chat template for the others."""
    special = ["<pad>", "<eos>", "<bos>", "<user>", "<assistant>"]
    if task == "sums":
        words, split = list("0123456789+=,#"), pre_tokenizers.Split(Regex("."), "isolated")
    else:
        words, split = [*SLOTS, *(value for values in SLOTS.values() for value in values), "ok", "book"], pre_tokenizers.WhitespaceSplit()
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = split
    if task == "sums":
        tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                                   extra_special_tokens=["<user>", "<assistant>"], padding_side="left")  # fmt: skip
    if task != "sums":
        fast.chat_template = (
            "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}"
            "{% if message['role'] == 'assistant' %} <eos>{% endif %} {% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    return fast


def load_data(flag, name, split, config=None, prompt_column="prompt"):
    """A data set whose prompts stand in the column prompt; raises InputError naming the flag.

    name: a hub name, perhaps with a config, a json, jsonl or parquet file, or a built-in task whose split is (split, number of rows, seed).
    prompt_column: the one that is renamed to prompt.
    """
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    try:
        if isinstance(split, tuple):
            data = Dataset.from_list(task_rows(name, *split)).remove_columns("completion")
        elif kind and not Path(name).is_file():
            raise FileNotFoundError("no such file")
        elif not kind and Path(name).is_file():
            raise ValueError("expected a json, jsonl or parquet file")
        elif kind and config:
            raise ValueError(f"a file has no config, found {config!r}")
        elif kind == "json" and (where := broken_line(name)):
            raise ValueError(where)
        else:
            data = load_dataset(kind, data_files=name, split=split) if kind else load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises many kinds; the cause of the last one says most
        raise InputError(f"{flag}: cannot load {name!r}: {one_line(error.__cause__ or error)}") from error
    if prompt_column not in data.column_names or len(data) == 0:
        found = f"{len(data)} rows of {', '.join(data.column_names) or 'nothing'}"
        raise InputError(f"{flag}: {name!r}: expected a column {prompt_column!r} (--prompt-column) and at least one row, found {found}")
    if prompt_column == "prompt":
        return data
    return data.select_columns([column for column in data.column_names if column != "prompt"]).rename_column(prompt_column, "prompt")


def load_prompts(flag, name, split, tokenizer, max_tokens, use_chat_template=True, config=None, prompt_column="prompt"):
    """load_data with the prompts' ids in a column of their own; raises InputError naming the flag and the row.

    Prompts of more than max_tokens are left out, with a count.
    """
    data = load_data(flag, name, split, config, prompt_column)
    try:
        prompt_ids = encode_prompts(data["prompt"], tokenizer, use_chat_template)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    data = data.add_column(PROMPT_IDS, prompt_ids)
    overlong = [row for row, ids in enumerate(prompt_ids) if len(ids) > max_tokens]
    if not overlong:
        return data
    expected = f"expected at most {max_tokens}, the model's context less --response-length"
    if len(overlong) == len(data):
        raise InputError(f"{flag}: row 0: prompt of {len(prompt_ids[0])} tokens, and no shorter one: {expected}")
    print(f"{flag}: {len(overlong)} of {len(data)} prompts left out, {expected}")
    return data.select(sorted({*range(len(data))} - {*overlong}))


def broken_line(name):
    """Which line of a json file is not in UTF-8, or of a jsonl file not one object, as text; None if all are. pyarrow notices the first late."""
    with open(name, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                found = json.loads(text) if text.strip() and str(name).endswith(".jsonl") else {}
            except ValueError as error:  # of UTF-8, or of JSON
                return f"line {number}: {one_line(error)}"
            if not isinstance(found, dict):
                return f"line {number}: expected an object, found {one_line(found)[:40]!r}"
    return None


def assert_known_ids(flag, data, vocab_size):
    """Raises InputError where a prompt holds a token that the model has no embedding for: its tokenizer was given more of them."""
    for row, ids in enumerate(data[PROMPT_IDS]):
        if max(ids) >= vocab_size:
            raise InputError(f"{flag}: row {row}: expected token ids below {vocab_size}, the model's vocabulary, found {max(ids)}")


def encode_prompts(prompts, tokenizer, use_chat_template=True):
    """Token ids of each prompt: a list of messages goes through the chat template, and so does a string if the model has one.

    prompts: list of str or of lists of {role, content} -> list of lists of int. Raises InputError naming the row.
    The template writes its own special tokens, so none are added to its text: no double BOS.
    """
    encoded = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str) and prompt and not (tokenizer.chat_template and use_chat_template):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer(render_chat(prompt, tokenizer, row), add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"row {row}: the prompt has no tokens: {prompt!r}")
        encoded.append(ids)
    return encoded


def as_messages(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt


def render_chat(prompt, tokenizer, row=0):
    """The text of a prompt (a string is one user's message) after the tokenizer's chat template; raises InputError."""
    messages = as_messages(prompt)
    well_formed = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )  # fmt: skip
    if not well_formed:
        raise InputError(f"row {row}: prompt: expected a text or a list of {{role, content}}, found {str(prompt)[:80]!r}")
    if not tokenizer.chat_template:
        raise InputError(f"row {row}: prompt is a list of messages, but the model's tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's author, and raises what it likes
        raise InputError(f"row {row}: prompt: the chat template refuses it: {one_line(error)}") from error


@dataclass
class Rollout:
    """Sampled sequences, flush right: every row's last token stands in the last column. A response may be a conversation.

    input_ids, attention_mask, position_ids (B, L); mask (B, T), of the last T columns, True on the policy's tokens, the stop token included;
    truncated (B,) True where the response ran out of room before a stop token; lengths (B, 2) tokens of each row and of its response,
    kept on the CPU so that cutting batches never waits for a GPU; logprobs (B, T) as sampled, in nats, if recorded; messages: the turns
    of each response, [{role, content}], if it is a conversation, whose user's tokens are gaps in the mask.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    truncated: torch.Tensor
    lengths: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    messages: list | None = None

    def __post_init__(self):
        if self.lengths is None:
            response = self.mask.shape[1] - self.mask.long().argmax(dim=1)  # from the first token that the policy chose
            self.lengths = torch.stack([self.attention_mask.sum(dim=1), response], dim=1).cpu()

    def __getitem__(self, rows):
        """The given rows (a slice, or indices on the CPU), without the columns that are padding in all of them, logprobs and messages."""
        lengths = self.lengths[rows]
        width, used = lengths.amax(0).tolist()
        rows = rows.to(self.mask.device, non_blocking=True) if isinstance(rows, torch.Tensor) else rows
        columns = (x[rows, -width:] for x in (self.input_ids, self.attention_mask, self.position_ids))
        return Rollout(*columns, self.mask[rows, -used:], self.truncated[rows], lengths)

    @property
    def response_ids(self):
        return self.input_ids[:, -self.mask.shape[1] :]


def flush_right(lengths, *tensors):
    """Rolls every row of the tensors (B, L) right, so that its first lengths (B,) columns become its last ones."""
    length = tensors[0].shape[1]
    source = (torch.arange(length, device=lengths.device) + lengths.unsqueeze(1)) % length
    return [tensor.gather(1, source) for tensor in tensors]


def padded(rows, fill, device, side="right"):
    """Lists or 1-D tensors of unequal length as one tensor."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=fill, padding_side=side).to(device)


def assembled(prompts, responses, masks, truncated, pad_id, device):
    """The Rollout of B prompts and responses (ids) and the responses' masks, lists or 1-D tensors of any lengths."""
    rows = [torch.cat([torch.as_tensor(prompt), torch.as_tensor(response)]) for prompt, response in zip(prompts, responses)]
    attention = padded([torch.ones_like(row) for row in rows], 0, device, "left")
    positions, truncated = (attention.cumsum(1) - 1).clamp(min=0), torch.tensor(truncated, device=device)
    return Rollout(padded(rows, pad_id, device, "left"), attention, positions, padded(masks, False, device, "left"), truncated)


def pad_token_id(tokenizer, stop_ids):
    """The tokenizer's pad token, or a stop token where it has none: masks never look at it."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]


def stop_token_ids(model, tokenizer, stop_token=None):
    """Every id that ends a response: the tokenizer's EOS, all of the model's, and --stop-token."""
    listed = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, (list, tuple)) else [listed])} - {None}
    if stop_token is not None:
        stop_id = tokenizer.convert_tokens_to_ids(stop_token)
        if stop_id is None or (stop_id == tokenizer.unk_token_id and stop_token != tokenizer.unk_token):
            raise InputError(f"--stop-token: {stop_token!r} is not one token of the model's vocabulary")
        ids.add(stop_id)
    if not ids:
        raise InputError("--stop-token: the model names no end-of-sequence token; expected one here")
    return sorted(ids)


@torch.no_grad()
def sample(model, prompt_ids, pad_id, stop_ids, response_length, temperature, record_logprobs=False):
    """Samples one response per prompt (temperature 0: greedy) with transformers' generate, and says what was sampled.

    prompt_ids: list of B lists of int -> Rollout on the model's device. Draws from torch's global generator.
    The model's own generation settings (top-k, penalties, ...) are put aside: they would shape the samples but not the log-probs.
    record_logprobs: keep those that sampling drew from (not for temperature 0), which saves a scoring pass where they can be trusted.
    """
    width = max(map(len, prompt_ids))
    device, step, chosen = model.device, [], []
    prompts = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
    attention = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
    settings = GenerationConfig(use_cache=True, max_new_tokens=response_length, eos_token_id=stop_ids, pad_token_id=pad_id, **sampling)

    def record(input_ids, logits):  # transformers calls it at each step, when the token before has been drawn
        if step:
            chosen.append(step.pop().gather(1, input_ids[:, -1:]))
        step.append((logits / temperature).log_softmax(dim=-1))
        return drawable(input_ids, logits)

    def drawable(input_ids, logits):  # on a GPU, drawing from NaN would end the process; the recorded log-probs stay NaN and stop the run
        return torch.where(logits.amax(dim=-1, keepdim=True).isfinite(), logits, 0)

    recording = record_logprobs and temperature > 0
    own_settings, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()  # in train mode, gradient checkpointing would switch the KV cache off
    try:
        input_ids = model.generate(prompts, attention_mask=attention, generation_config=settings, logits_processor=[record if recording else drawable])
    finally:
        model.generation_config = own_settings
        model.train(was_training)
    # The mask comes from the first stop token, never from `ids != pad`: pad may be the stop token, or be sampled.
    is_stop = torch.isin(input_ids[:, width:], torch.tensor(stop_ids, device=device))
    mask = is_stop.cumsum(1) - is_stop.long() == 0
    attention, used, truncated = torch.cat([attention, mask.long()], dim=1), mask.shape[1], ~is_stop.any(1)
    lengths = width + mask.sum(1)  # columns until each row's end
    full_mask = torch.nn.functional.pad(mask, (width, 0))
    input_ids_right, attention, full_mask = flush_right(lengths, input_ids, attention, full_mask)
    found = Rollout(input_ids_right, attention, (attention.cumsum(1) - 1).clamp(min=0), full_mask[:, -used:], truncated)
    if recording:
        if len(chosen) < mask.shape[1]:  # on a GPU, generate may run a few steps too far and take them back
            chosen.append(step.pop().gather(1, input_ids[:, -1:]))
        (recorded,) = flush_right(mask.sum(1), torch.cat(chosen[:used], dim=1))
        found.logprobs = torch.where(found.mask, recorded, 0)
    return found


def turns_between(reply, tokenizer):
    """Ids of what the chat template writes from the end of one assistant's turn to the beginning of the next, a user's reply between."""
    mark = "turn-of-the-policy"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}, {"role": "user", "content": reply}]
    _, found, text = render_chat(messages, tokenizer).partition(mark)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not (found and ids):
        raise InputError("expected a chat template that writes every turn, found one that leaves some out")
    return ids


def continuation(last_id, reply, tokenizer):
    """turns_between, without the template's own end of turn if last_id, the token that the turn before ended in, is just that."""
    ids = turns_between(reply, tokenizer)
    at = ids.index(last_id) if last_id in ids else len(ids)
    return ids[at + 1 :] if at < len(ids) and not tokenizer.decode(ids[:at]).strip() else ids


def reply_of(user, messages, columns):
    """What --user says to the conversation so far: a str, or None where it is over; raises InputError."""
    try:
        reply = user([dict(message) for message in messages], **columns)  # copies: a user may swap roles in place
    except (Exception, SystemExit) as error:  # the user's own code may fail in any way
        raise InputError(f"--user: it raised {type(error).__name__}: {one_line(error)}") from error
    if reply is not None and not isinstance(reply, str):
        raise InputError(f"--user: expected a str, or None at the end, found {str(reply)[:80]!r}")
    return reply


@torch.no_grad()
def converse(take_turn, batch, user, tokenizer, pad_id, stop_ids, max_turns, max_tokens):
    """Whole conversations, the policy's turns and between them a user's, until the user has nothing to say -> Rollout with messages.

    take_turn: list of lists of int -> Rollout of one turn each, as sample gives it. batch: {prompt, its ids, other columns: lists}.
    user: f(messages, **a row's columns) -> the reply, or None. A conversation also ends after max_turns, and truncated where a turn
    found no stop token or more than max_tokens would be behind it. What was sampled is not encoded again: the next turn reads the
    same ids, and behind them the template's tokens and the reply's, which the mask leaves out. [ours]
    """
    prompts = batch[PROMPT_IDS]
    columns = {name: values for name, values in batch.items() if name not in ("prompt", "messages", PROMPT_IDS, PSEUDO_LABEL)}
    tokens, messages = [[] for _ in prompts], [[] for _ in prompts]  # tokens: (id, whether the policy chose it, its log-prob)
    truncated, live, device, recorded = [False] * len(prompts), range(len(prompts)), "cpu", False
    for turn in range(1, max_turns + 1):
        part = take_turn([prompts[row] + [token for token, *_ in tokens[row]] for row in live])
        texts, device, recorded = completion_texts(part, tokenizer, stop_ids), part.mask.device, part.logprobs is not None
        logprobs = part.logprobs if recorded else torch.zeros(part.mask.shape)
        sampled, still = zip(live, texts, part.truncated.tolist(), part.lengths[:, 1].tolist(), part.response_ids.tolist(), logprobs.tolist()), []
        for row, text, cut, length, ids, logprobs in sampled:
            tokens[row] += zip(ids[-length:], [True] * length, logprobs[-length:])
            messages[row].append({"role": "assistant", "content": text})
            truncated[row] = cut
            own = {name: values[row] for name, values in columns.items()}
            reply = None if cut or turn == max_turns else reply_of(user, as_messages(batch["prompt"][row]) + messages[row], own)
            if reply is None:
                continue
            between = continuation(tokens[row][-1][0], reply, tokenizer)
            truncated[row] = len(prompts[row]) + len(tokens[row]) + len(between) > max_tokens
            if not truncated[row]:
                tokens[row] += ((token, False, 0.0) for token in between)
                messages[row].append({"role": "user", "content": reply})
                still.append(row)
        if not (live := still):
            break
    ids, masks, logprobs = ([[token[i] for token in row] for row in tokens] for i in range(3))
    found = assembled(prompts, ids, masks, truncated, pad_id, device)
    found.messages, found.logprobs = messages, padded(logprobs, 0.0, device, "left") if recorded else None
    return found


def completion_texts(rollout, tokenizer, stop_ids):
    """The text of each response, stop and special tokens dropped: what rewards read."""
    keep = rollout.mask & ~torch.isin(rollout.response_ids, torch.tensor(stop_ids, device=rollout.mask.device))
    ids = [row[kept].tolist() for row, kept in zip(rollout.response_ids.cpu(), keep.cpu())]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def response_logprobs(model, rollout, temperature):
    """The log-prob of every response token under the distribution it was sampled from: Rollout -> (B, T) fp32, in nats, 0 off the mask.

    The logits one position before a token are the ones that chose it; only as many are computed as the longest response needs.
    """
    used = rollout.mask.shape[1]
    ids, attention, positions = (x[:, :-1] for x in (rollout.input_ids, rollout.attention_mask, rollout.position_ids))
    output = model(ids, attention_mask=attention, position_ids=positions, use_cache=False, logits_to_keep=used)
    return torch.where(rollout.mask, token_logprobs(output.logits, rollout.response_ids, temperature), 0)


def response_quantiles(critic, rollout, after_last=False):
    """The critic's quantiles at the state before every response token: Rollout -> (B, T, N, M) fp32.

    after_last: also at the state after the last token, in one more column, (B, T + 1, N, M).
    """
    used, length = rollout.mask.shape[1], rollout.input_ids.shape[1] - (not after_last)
    inputs = (x[:, :length] for x in (rollout.input_ids, rollout.attention_mask, rollout.position_ids))
    return critic(*inputs, last=used + after_last)


def micro_batches(rollout, rows, max_rows, max_tokens):
    """rows (a CPU tensor of indices) in groups of similar length, longest first: of at most max_rows and max_tokens, padding counted.

    A row of more than max_tokens goes alone. A row shorter than 3/4 of a group's longest begins the next one, unless the group is
    so small (256 tokens) that overhead rules.
    """
    lengths = rollout.lengths[:, 0]
    lengths, order = lengths[rows].sort(descending=True, stable=True)
    groups, width = [], 0
    for row, length in zip(rows[order].tolist(), lengths.tolist()):
        size = len(groups[-1]) if groups else max_rows
        if size >= max_rows or (size + 1) * width > max_tokens or (length < 0.75 * width and size * width >= 256):
            groups.append([])
            width = length
        groups[-1].append(row)
    return [torch.tensor(group) for group in groups]


def in_micro_batches(function, rollout, max_rows, max_tokens):
    """function(rollout of some rows) for all rows, a micro-batch at a time, put together with zeros where rows are shorter."""
    result, num_rows = None, len(rollout.lengths)
    for rows in micro_batches(rollout, torch.arange(num_rows), max_rows, max_tokens):
        micro = rollout[rows]
        part = function(micro)
        if result is None:  # some functions give one column more than there are tokens
            width = rollout.mask.shape[1] + part.shape[1] - micro.mask.shape[1]
            result = part.new_zeros(num_rows, width, *part.shape[2:])
        result[rows.to(part.device, non_blocking=True), -part.shape[1] :] = part
    return result


# Reward functions have TRL's signature: f(prompts, completions, **columns) -> list of float, columns being the data set's other columns as lists.

NUMBER = re.compile(r"(?<![0-9)])-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))(?:\s*/\s*[0-9]+)?")
UNIT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?|\^\{?\\circ\}?|\\[%$]")
POWER = re.compile(r"(?<![\w.,)}\]])([0-9]{1,4})\s*\^\s*(?:\{\s*([0-9]{1,2})\s*\}|([0-9]))(?!\s*[\w^!'])")
LETTER = r"(A(?!\s+(?!because|since|as\b|and\b)[a-z])|[B-Z])\b(?!['’])"  # an A before a word is an article
ANSWERS = [
    r"\\boxed\{(?:\\text\{)?\(?" + LETTER,
    r"\b(?i:answer|option|choice)\b(?:\s*(?i:is|would\s+be|should\s+be|option|choice|:)){0,4}\W{0,4}" + LETTER,
    r"\b(?i:answer)\s*:\s*\(?([a-z])\)?\W*$",
    r"^\W*([A-Za-z])(?:\W*$|[.):,*]|\s*\n|\s+is\s+(?:the\s+)?(?:correct|right))",
    r"\(([A-Z])\)",
]  # tried in this order

NUMBERED = [r"^\W*([0-9])\W*$", r"\\boxed\{\s*([0-9])\s*\}", r"\b(?i:answer|option|choice)\b(?:\s*(?i:is|:)){0,4}\W{0,4}([0-9])(?!\w|[.,/]\w|\s+\w|\s*[%$/])",
            r"\(([0-9])\)"]  # fmt: skip


def text_of(completion):
    """A completion's text, whether a string or a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def boxed(text):
    """What stands in the last \\boxed{...} of text, braces balanced; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 7 : end]
    return None


def plain_latex(text):
    """Powers of whole numbers as numbers, fractions as a/b, mixed ones too, and the many ways to write a comma, a minus or a \\frac as one."""
    for old, new in (("\\!", ""), ("{,}", ","), ("\u2212", "-"), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\$", "$"), ("\\\\", ";")):
        text = text.replace(old, new)
    text = POWER.sub(lambda found: str(int(found[1]) ** int(found[2] or found[3])), text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}", text)
    fraction = r"\\frac\s*\{\s*(-?[0-9]{1,50})\s*\}\s*\{\s*([0-9]{1,50})\s*\}"
    text = re.sub(r"\b([0-9]{1,50})\s*" + fraction, lambda found: f"{int(found[1]) * int(found[3]) + int(found[2])}/{found[3]}", text)
    return re.sub(fraction, r"\1/\2", text)


def last_number(text):
    """The last number in text as a Fraction (commas as thousands, decimals, a/b, \\frac{a}{b}); None if there is none."""
    for found in reversed(NUMBER.findall(plain_latex(text[-4000:]))):  # an answer stands at the end; int() of a huge string is slow
        whole, _, denominator = re.sub(r"[,\s]", "", found).partition("/")
        if len(whole) + len(denominator) <= 100 and int(denominator or 1) != 0:
            return Fraction(whole) / int(denominator or 1)
    return None


def one_number(text):
    """The number that text is, a sign, a unit or `x =` around it aside, as a Fraction; None for a tuple, a root, a multiple of x, ..."""
    text = UNIT.sub(lambda found: " " + re.sub(r"[^0-9.,]", " ", found[0].split("}")[0]), plain_latex(text))
    text = re.sub(r"^\s*(?:[A-Za-z]\s*=\s*)?\+?", "", text)
    rest = NUMBER.sub("", text, count=1).strip(" .$%")
    return None if re.search(r"[0-9\\(){}\[\]^_=+*<>!']|-$|^[A-Za-z]$|[-/]\s*[A-Za-z]$|^[A-Za-z]\s*/", rest) else last_number(text)


def plain_answer(text):
    """A LaTeX answer as a bare string, to compare answers that are not numbers."""
    text = re.sub(r"\\(?:text|mbox|mathrm|left|right|displaystyle|,|;|:| )|[\s$]", "", plain_latex(text))
    return re.sub(r"\{(\w)\}", r"\1", text).rstrip(".").lower()


def math_reward(prompts, completions, answer, **columns):
    """1.0 where the answer (in \\boxed{}, else the last number) equals the answer column's, as numbers or as plain strings, else 0.0."""
    scores = []
    for completion, expected in zip(completions, answer):
        text, expected = text_of(completion), str(expected).split("####")[-1]  # GSM8K's own answers end in #### 72
        given, target = boxed(text), one_number(expected)
        if target is not None:
            scores.append(float((last_number(text) if given is None else one_number(given)) == target))
        else:
            scores.append(float(given is not None and plain_answer(given) == plain_answer(expected)))
    return scores


def chosen_letter(text, choices):
    """The option that an answer names, by letter or by its text; None if it names none, or more than one."""
    text, letters = text.strip()[:10_000], [chr(ord("A") + i) for i in range(len(choices) or 26)]
    for pattern in ANSWERS:
        found = re.search(pattern, text)
        if found and found[1].upper() in letters:
            return found[1].upper()
    named = [letter for letter, choice in zip(letters, choices) if str(choice).strip().lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def option_texts(choices):
    """The texts to choose from: a list of texts, the hub's {"text": [...], "label": [...]}, or None -> a list."""
    return choices["text"] if isinstance(choices, dict) else choices or []


def choice_reward(prompts, completions, answer, choices=None, **columns):
    """1.0 where the completion names the option whose letter is in the answer column (by letter or by its text), else 0.0.

    choices: per row a list of texts, or the hub's {"text": [...], "label": [...]}.
    """
    scores = []
    for completion, expected, option in zip(completions, answer, choices or [None] * len(answer)):
        text, expected = text_of(completion).strip()[:10_000], str(expected).strip().upper()
        found, letters = None, {}
        if isinstance(option, dict) and all(str(label).isdigit() for label in option["label"]):  # some of ARC's are 1 to 4
            letters = {str(label): chr(ord("A") + i) for i, label in enumerate(option["label"])}
            found = next(filter(None, (re.search(pattern, text) for pattern in NUMBERED)), None)
        letter = letters.get(found[1]) if found else chosen_letter(text, option_texts(option))
        scores.append(float(letter is not None and letter == letters.get(expected, expected)))
    return scores


def exact_reward(prompts, completions, answer, **columns):
    """1.0 where the completion is the answer column's text, white space aside, else 0.0."""
    return [float(text_of(completion).split() == str(expected).split()) for completion, expected in zip(completions, answer)]


def judged_text(prompt, completion, tokenizer):
    """A prompt (text or messages) and the response to it as a reward model reads them: by its own chat template, else a line per turn."""
    messages = [*as_messages(prompt), *([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion)]
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def model_reward(name, device="cpu", batch_size=16):
    """A reward function that scores with a sequence classifier: its one logit, or the probability of its last label."""
    safe = {"trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
    classify = pipeline("text-classification", name, device=device, dtype=torch.float32, top_k=None, **safe)
    tokenizer, config = classify.tokenizer, classify.model.config
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"  # the judged turn is the last one
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id  # a decoder finds its last real token by it
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise ValueError(f"expected a sequence classifier, found {', '.join(config.architectures or ['no architecture'])}")
    tokenizer.model_max_length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 512)
    function, last_label = ("none" if config.num_labels == 1 else "softmax"), config.id2label[config.num_labels - 1]

    def reward(prompts, completions, **columns):
        texts = [judged_text(prompt, completion, tokenizer) for prompt, completion in zip(prompts, completions)]
        found = classify(texts, batch_size=batch_size, truncation=True, function_to_apply=function, add_special_tokens=not tokenizer.chat_template)
        return [next(label["score"] for label in labels if label["label"] == last_label) for labels in found]

    return reward


def load_function(flag, spec):
    """module:function, the module found from the working folder on; raises InputError."""
    module, _, name = spec.partition(":")
    if not (module and name):
        raise InputError(f"{flag}: expected module:function, found {spec!r}")
    try:
        sys.path.insert(0, "")
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's own code may fail in any way
        raise InputError(f"{flag}: cannot load {spec!r}: {one_line(error)}") from error
    if not callable(function):
        raise InputError(f"{flag}: {spec!r}: expected a function, found {type(function).__name__}")
    return function


def load_reward(spec, device="cpu"):
    """The reward function behind --reward: math, choice, exact, model:NAME or module:function. Raises InputError."""
    built_in = {"math": math_reward, "choice": choice_reward, "exact": exact_reward}
    if spec in built_in:
        return built_in[spec]
    module, _, name = spec.partition(":")
    if not (module and name):
        raise InputError(f"--reward: expected {', '.join(built_in)}, model:NAME or module:function, found {spec!r}")
    if module != "model":
        return load_function("--reward", spec)
    try:
        return model_reward(name, device)
    except Exception as error:  # a broken folder or a missing one, each library in its own words
        raise InputError(f"--reward: cannot load {spec!r}: {one_line(error)}") from error


def row_text(row, prompts):
    """A row of a batch so that the user can find it in the file: by the beginning of its prompt, or of the last message of it."""
    prompt = prompts[row] if isinstance(prompts[row], str) else prompts[row][-1]["content"]
    return f"row {row} of the batch, {' '.join(prompt.split())[:60]!r}"


def needed_parameters(function, positional=0):
    """The parameters that a user's function must be given by name, behind the first `positional` ones -> list of str."""
    parameters = list(inspect.signature(function).parameters.values())[positional:]
    return [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def score(reward, batch, completions, answer="answer"):
    """Calls a reward function on a batch {prompt, other columns: lists} and checks what it gives: (B,) fp32. Raises InputError.

    Conversational prompts get conversational completions, [{role, content}], as in TRL (whole conversations are). `answer` names the column that the
    function sees under that name: pseudo-labels stand in another one.
    """
    columns = {name: values for name, values in batch.items() if name not in ("prompt", "prompts", "completions", "answer", PROMPT_IDS, PSEUDO_LABEL)}
    columns |= {"answer": batch[answer]} if answer in batch else {}
    for name in needed_parameters(reward):
        if name not in {"prompts", "completions", *columns}:
            raise InputError(f"--reward: it needs the column {name!r}; the data set has {', '.join(sorted(columns)) or 'none'} beside 'prompt'")
    plain = lambda prompt, completion: isinstance(prompt, str) or not isinstance(completion, str)
    pairs = zip(batch["prompt"], completions)
    shaped = [completion if plain(prompt, completion) else [{"role": "assistant", "content": completion}] for prompt, completion in pairs]
    try:
        scores = reward(prompts=batch["prompt"], completions=shaped, **columns)
    except (Exception, SystemExit) as error:  # the user's own code may fail in any way
        file, line, *_ = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(f"--reward: it raised {type(error).__name__}: {one_line(error)} ({Path(file).name}, line {line})") from error
    found = f"{len(scores)} values" if isinstance(scores, (list, tuple)) or getattr(scores, "ndim", 0) == 1 else type(scores).__name__
    if found != f"{len(shaped)} values":
        raise InputError(f"--reward: expected a list of {len(shaped)} numbers, one per completion, found {found}")
    return torch.tensor([number_of(value, row, batch["prompt"]) for row, value in enumerate(scores)])


def number_of(value, row, prompts):
    """A score as a float: a number, a bool, or an array or tensor of one; raises InputError for anything else, and for NaN and infinities."""
    try:
        number = None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = None
    if number is None or not abs(number) < 3e38:  # what fp32 holds
        raise InputError(f"--reward: {row_text(row, prompts)}: expected a finite number, found {str(value)[:80]!r}")
    return number


def noisy_scores(scores, fp, fn, outlier, generator):
    """Scores as a careless judge would give them: (B,) -> (B,). [ours]

    fp, fn: the probability that a 0 becomes 1, and a 1 becomes 0. outlier (p, scale): with probability p the score loses
    scale * U(0, 1), a heavy negative tail. Raises InputError if fp or fn meet a score other than 0 and 1.
    Draws the same numbers whatever the scores are, so that two algorithms meet the same noise.
    """
    flip, hit, size = torch.rand(3, len(scores), generator=generator)
    if fp or fn:
        odd = ((scores != 0) & (scores != 1)).nonzero().flatten().tolist()
        if odd:
            found = f"found {scores[odd[0]]:g} in row {odd[0]} of the batch"
            raise InputError(f"--reward-noise-fp, --reward-noise-fn: they flip 0/1 scores, {found}; expected both at 0 for such a reward")
        scores = torch.where(flip < torch.where(scores == 1, fn, fp), 1 - scores, scores)
    return scores - (hit < outlier[0]).float() * outlier[1] * size


def prompt_offsets(prompt_ids, scale, vocab_size, seed):
    """A level of the scores that depends on the prompt alone, as a reward model's does: list of lists of int -> (B,) in [0, scale]. [ours]

    scale * (1 + sin 2z) / 2, z the sum over a prompt's distinct tokens of a seeded N(0, 1) weight each, over the root of their number:
    a critic that reads the prompt can learn it, a batch's statistics cannot.
    """
    weights = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))
    z = torch.stack([weights[list(set(ids))].sum() / len(set(ids)) ** 0.5 for ids in prompt_ids])
    return scale * (1 + (2 * z).sin()) / 2  # a sine: the words that all prompts share shift it and cannot saturate it


def pseudo_labels(answers, share, generator):
    """Labels as a majority vote would leave them: a fixed `share` of the answers replaced by another, different one.

    answers: list -> list. A letter A-D becomes another of the letters that occur, a sum another row's sum. [ours]
    Raises InputError if all answers are the same.
    """
    if share and len(set(map(str, answers))) < 2:
        raise InputError("--pseudo-label-noise: expected at least two different values in the column 'answer', found one")
    labels = list(answers)
    for row in torch.randperm(len(answers), generator=generator)[: round(share * len(answers))].tolist():
        while str(labels[row]) == str(answers[row]):
            labels[row] = answers[int(torch.randint(len(answers), (1,), generator=generator))]
    return labels

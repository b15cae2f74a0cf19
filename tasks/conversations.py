"""Conversations: the policy's turns and a user's between them, a response with gaps in its mask."""

from dataclasses import dataclass, field

import torch

from rollout import assemble, completion_texts, padded
from tasks import InputError, raised
from tasks.noise import PSEUDO_LABEL
from tasks.prompts import PROMPT_IDS, as_messages, render_chat


@dataclass
class Conversation:
    """One row's conversation: its prompt's ids, and what has been said behind it so far."""

    prompt: list
    ids: list = field(default_factory=list)
    mask: list = field(default_factory=list)  # whether the policy chose a token
    logprobs: list = field(default_factory=list)
    messages: list = field(default_factory=list)
    truncated: bool = False

    def add(self, role, text, ids, logprobs):
        self.messages.append({"role": role, "content": text})
        self.ids += ids
        self.mask += [role == "assistant"] * len(ids)
        self.logprobs += logprobs


def turns_between(reply, tokenizer):
    """Ids that the chat template writes between two turns of the policy, a user's reply in them."""
    mark = "turn-of-the-policy"
    said = [("user", "x"), ("assistant", mark), ("user", reply)]
    messages = [{"role": role, "content": content} for role, content in said]
    _, found, text = render_chat(messages, tokenizer).partition(mark)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not (found and ids):
        expected = "expected a chat template that writes every turn"
        raise InputError(f"{expected}, found one that leaves some out")
    return ids


def continuation(last_id, reply, tokenizer):
    """turns_between, without the template's end of turn if the turn ended in that, in last_id."""
    ids = turns_between(reply, tokenizer)
    at = ids.index(last_id) if last_id in ids else len(ids)
    # Llama 2's template writes a space before it.
    is_end = at < len(ids) and not tokenizer.decode(ids[:at]).strip()
    return ids[at + 1 :] if is_end else ids


def reply_of(user, messages, columns):
    """What --user says to the conversation so far: a str, or None at its end; raises InputError."""
    copies = [dict(message) for message in messages]  # a user may swap roles in place
    try:
        reply = user(copies, **columns)
    except (Exception, SystemExit) as error:  # the user's own code may fail in any way
        raise InputError(f"--user: {raised(error)}") from error
    if reply is not None and not isinstance(reply, str):
        raise InputError(f"--user: expected a str, or None at the end, found {str(reply)[:80]!r}")
    return reply


@torch.no_grad()
def converse(take_turn, batch, user, tokenizer, pad_id, stop_ids, max_turns, max_tokens):
    """Whole conversations, until the user has nothing to say -> Rollout with messages. [ours]

    take_turn: B lists of int -> Rollout of a turn each. batch: {prompt, its ids, other columns}.
    user: f(messages, **a row's columns) -> the reply, or None. A conversation also ends after
    max_turns, and truncated where a turn found no stop token or the next would begin behind more
    than max_tokens.
    """
    talks = [Conversation(ids) for ids in batch[PROMPT_IDS]]
    live = list(range(len(talks)))
    for turn in range(1, max_turns + 1):
        # What was sampled is not encoded again: the next turn reads the same ids.
        part = take_turn([talks[row].prompt + talks[row].ids for row in live])
        add_turn([talks[row] for row in live], part, completion_texts(part, tokenizer, stop_ids))
        if turn == max_turns:
            break
        for row in live:
            hear(talks[row], batch, row, user, tokenizer, max_tokens)
        live = [row for row in live if talks[row].messages[-1]["role"] == "user"]
        if not live:
            break
    prompts, ids, masks = zip(*((talk.prompt, talk.ids, talk.mask) for talk in talks))
    device = part.mask.device
    found = assemble(prompts, ids, masks, [talk.truncated for talk in talks], pad_id, device)
    found.messages = [talk.messages for talk in talks]
    if part.logprobs is not None:
        found.logprobs = padded([talk.logprobs for talk in talks], 0.0, device, side="left")
    return found


def add_turn(talks, part, texts):
    """Adds a turn of the policy to each conversation: part, a Rollout with a row for each."""
    truncated = part.truncated.tolist()
    ids = part.response_ids.tolist()
    logprobs = torch.zeros(part.mask.shape) if part.logprobs is None else part.logprobs
    logprobs = logprobs.tolist()
    for row, length in enumerate(part.lengths[:, 1].tolist()):
        talks[row].add("assistant", texts[row], ids[row][-length:], logprobs[row][-length:])
        talks[row].truncated = truncated[row]


def hear(talk, batch, row, user, tokenizer, max_tokens):
    """Adds the user's reply to a conversation, unless it is over: cut off, no room, no reply."""
    if talk.truncated:
        return
    ours = ("prompt", "messages", PROMPT_IDS, PSEUDO_LABEL)
    columns = {name: values[row] for name, values in batch.items() if name not in ours}
    reply = reply_of(user, as_messages(batch["prompt"][row]) + talk.messages, columns)
    if reply is None:
        return
    ids = continuation(talk.ids[-1], reply, tokenizer)
    talk.truncated = len(talk.prompt) + len(talk.ids) + len(ids) > max_tokens
    if not talk.truncated:
        talk.add("user", reply, ids, [0.0] * len(ids))

"""Conversations: the policy's turns and a user's between them, a response with gaps in its mask."""

from dataclasses import dataclass, field

import torch

from rollout import assemble, completion_texts, padded
from tasks import InputError, as_messages, naming, users_code
from tasks.noise import PSEUDO_LABEL
from tasks.prompts import PROMPT_IDS, render_chat


@dataclass
class Conversation:
    """One row's: the ids and messages of its prompt, and what has been said behind them so far."""

    prompt: list
    opening: list
    columns: dict  # what the user is given beside the messages
    ids: list = field(default_factory=list)
    mask: list = field(default_factory=list)  # whether the policy chose a token
    logprobs: list = field(default_factory=list)
    messages: list = field(default_factory=list)
    truncated: bool = False

    def add(self, role, text, ids, logprobs):
        self.messages += as_messages(text, role)
        self.ids += ids
        self.mask += [role == "assistant"] * len(ids)
        self.logprobs += logprobs


def continuation(last_id, reply, tokenizer, limit=float("inf")):
    """Ids that the chat template writes between two turns of the policy, a user's reply in them."""
    mark = "turn-of-the-policy"
    messages = as_messages("x") + as_messages(mark, "assistant") + as_messages(reply)
    # The template may raise, or leave turns out; for half a character the tokenizer raises.
    with naming(f"--user: expected a chat template for all turns, found with {reply[:40]!r}"):
        text = render_chat(messages, tokenizer).partition(mark)[2]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or max(ids) >= limit:
            raise InputError(f"expected token ids below {limit}, found {max(ids, default='none')}")
    # Not again the end of turn that was sampled. Llama 2's template writes a space before it.
    if last_id in ids and not tokenizer.decode(ids[: ids.index(last_id)]).strip():
        return ids[ids.index(last_id) + 1 :]
    return ids


@torch.no_grad()
def converse(take_turn, batch, user, tokenizer, pad_id, stop_ids, max_turns, max_tokens, limit):
    """Whole conversations, until the user has nothing to say -> Rollout with messages. [ours]

    take_turn: B lists of ids below limit -> Rollout. A conversation also ends after max_turns, and
    truncated where a turn found no stop token or the next would begin behind more than max_tokens.
    """
    ours = ("prompt", "messages", PROMPT_IDS, PSEUDO_LABEL)
    live = talks = []
    for row, prompt in enumerate(batch["prompt"]):
        columns = {name: values[row] for name, values in batch.items() if name not in ours}
        talks.append(Conversation(batch[PROMPT_IDS][row], as_messages(prompt), columns))
    for turns_left in reversed(range(max_turns)):
        # What was sampled is not encoded again: the next turn reads the same ids.
        part = take_turn([talk.prompt + talk.ids for talk in live])
        for row, text in enumerate(completion_texts(part, tokenizer, stop_ids)):
            own = slice(-int(part.lengths[row, 1]), None)
            logprobs = [] if part.logprobs is None else part.logprobs[row, own].tolist()
            live[row].add("assistant", text, part.response_ids[row, own].tolist(), logprobs)
            live[row].truncated = bool(part.truncated[row])
        going_on = [talk for talk in live if turns_left and not talk.truncated]
        live = [talk for talk in going_on if hear(talk, user, tokenizer, max_tokens, limit)]
        if not live:
            break
    parts = [(talk.prompt, talk.ids, talk.mask, talk.truncated) for talk in talks]
    found = assemble(*zip(*parts), pad_id, part.mask.device)
    found.messages = [talk.messages for talk in talks]
    if part.logprobs is not None:
        found.logprobs = padded([talk.logprobs for talk in talks], 0.0, part.mask.device)
    return found


def hear(talk, user, tokenizer, max_tokens, limit):
    """Adds the user's reply, if it has one and there is room -> whether; raises InputError."""
    with users_code("--user"):  # it gets copies, as it may swap roles
        reply = user([dict(message) for message in talk.opening + talk.messages], **talk.columns)
        if not isinstance(reply, str | None):
            raise InputError(f"--user: expected a str, or None at the end, found {reply!r:.80}")
    if reply is None:
        return False
    ids = continuation(talk.ids[-1], reply, tokenizer, limit)
    talk.truncated = len(talk.prompt) + len(talk.ids) + len(ids) > max_tokens
    if not talk.truncated:
        talk.add("user", reply, ids, [0.0] * len(ids))
    return not talk.truncated

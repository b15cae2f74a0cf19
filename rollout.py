"""Sampling, and what the models say of what was sampled: log-probs, quantiles, micro-batches.

Two rules keep the importance ratio honest. What was sampled is what is trained on: token ids in,
token ids out, text only for the reward. And the old log-probs are those of the function that the
update uses, or of sampling where the two were seen to agree.

One layout: everything stands flush right. Padding is on the left alone, a row's last token is in
the last column, and a response is a slice of the last T columns, of ids, logits and values alike.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig


@dataclass
class Rollout:
    """Sampled sequences of at most L tokens, whose last T columns hold the responses.

    A response may be a conversation: the user's turns are then gaps in its mask.
    """

    # (B, L) prompt and response, padding on the left.
    input_ids: torch.Tensor
    # (B, L) 1 where there is a token.
    attention_mask: torch.Tensor
    # (B, T) True on the policy's tokens, the stop token that it sampled included.
    mask: torch.Tensor
    # (B,) True where a response ran out of room: before a stop token, or before the user's reply.
    truncated: torch.Tensor
    # (B, 2) tokens of each row and of its response, on the CPU: cutting never waits for a GPU.
    lengths: torch.Tensor | None = None
    # (B, T) log-probs in nats of what was sampled, if recorded.
    logprobs: torch.Tensor | None = None
    # The turns of each response, [{role, content}], if it is a conversation.
    messages: list | None = None

    def __post_init__(self):
        if self.lengths is None:
            first = self.mask.long().argmax(dim=1)
            response = self.mask.shape[1] - first
            self.lengths = torch.stack([self.attention_mask.sum(dim=1), response], dim=1).cpu()

    def __getitem__(self, rows):
        """The given rows (a slice, or indices on the CPU), cut to the longest row and response.

        logprobs and messages are left behind.
        """
        lengths = self.lengths[rows]
        length, response_length = lengths.amax(dim=0).tolist()
        if isinstance(rows, torch.Tensor):
            rows = rows.to(self.mask.device, non_blocking=True)
        return Rollout(
            self.input_ids[rows, -length:],
            self.attention_mask[rows, -length:],
            self.mask[rows, -response_length:],
            self.truncated[rows],
            lengths,
        )

    @property
    def position_ids(self):
        """(B, L): a row's first token is at 0, wherever its padding ends."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def response_ids(self):
        """(B, T): the ids that mask and log-probs are about; before a response, its prompt's."""
        return self.input_ids[:, -self.mask.shape[1] :]


def flush_right(lengths, tensor):
    """Rolls every row of tensor (B, L) right, until its first lengths (B,) columns are its last."""
    num_columns = tensor.shape[1]
    columns = torch.arange(num_columns, device=tensor.device)
    return tensor.gather(1, (columns + lengths.unsqueeze(1)) % num_columns)


def padded(rows, fill, device, side="left"):
    """Lists or 1-D tensors of unequal length as one tensor (B, L)."""
    rows = [torch.as_tensor(row) for row in rows]
    return pad_sequence(rows, True, fill, padding_side=side).to(device)


def assemble(prompts, responses, masks, truncated, pad_id, device):
    """The Rollout of B prompts and responses (ids) and their masks: lists or 1-D tensors."""
    rows = []
    for prompt, response in zip(prompts, responses):
        rows.append(torch.cat([torch.as_tensor(prompt), torch.as_tensor(response)]))
    return Rollout(
        input_ids=padded(rows, pad_id, device),
        attention_mask=padded([torch.ones_like(row) for row in rows], 0, device),
        mask=padded(masks, False, device),
        truncated=torch.tensor(truncated, device=device),
    )


class LogprobRecorder:
    """Watches transformers' generate: keeps the log-probs of what it draws, and lets it draw."""

    def __init__(self, temperature):
        self.temperature = temperature
        self.distribution = None
        self.chosen = []

    def __call__(self, input_ids, logits):
        """Called at each step, when the token before has been drawn: input_ids ends in it."""
        self.note(input_ids)
        if self.temperature > 0:
            self.distribution = (logits / self.temperature).log_softmax(dim=-1)
        # On a GPU, drawing from NaN ends the process. What is recorded, or scored, shows it.
        return torch.where(logits.amax(dim=-1, keepdim=True).isfinite(), logits, 0)

    def note(self, input_ids):
        if self.distribution is not None:
            self.chosen.append(self.distribution.gather(1, input_ids[:, -1:]))
            self.distribution = None


@torch.no_grad()
def generate(model, prompt_ids, attention_mask, temperature, recorder, **settings):
    """transformers' generate from temperature alone: (B, P) -> (B, P + T) ids.

    The model's own settings (top-k, penalties, ...) are put aside: they would shape the samples
    but not the log-probs.
    """
    if temperature > 0:
        settings |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    own_settings, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    # In train mode, gradient checkpointing would switch the KV cache off.
    model.eval()
    try:
        return model.generate(
            prompt_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(use_cache=True, **settings),
            logits_processor=[recorder],
        )
    finally:
        model.generation_config = own_settings
        model.train(was_training)


@torch.no_grad()
def sample(
    model, prompt_ids, pad_id, stop_ids, response_length, temperature, record_logprobs=False, **more
):
    """Samples one response to each prompt (temperature 0: greedy), and says what was sampled.

    prompt_ids: B lists of ids -> Rollout on the model's device. Draws from torch's generator.
    record_logprobs: keep the log-probs that it drew from (not for temperature 0); where scoring's
    are the same, that saves a pass. more: settings of transformers' generate.
    """
    device = model.device
    prompts = padded(prompt_ids, pad_id, device)
    attention = padded([[1] * len(ids) for ids in prompt_ids], 0, device)
    width = prompts.shape[1]
    recorder = LogprobRecorder(temperature if record_logprobs else 0.0)
    limits = {"max_new_tokens": response_length, "eos_token_id": stop_ids, "pad_token_id": pad_id}
    input_ids = generate(model, prompts, attention, temperature, recorder, **limits, **more)
    # The mask comes from the first stop token, never from `ids != pad`: pad may be the stop token.
    is_stop = torch.isin(input_ids[:, width:], torch.tensor(stop_ids, device=device))
    mask = is_stop.cumsum(dim=1) - is_stop.long() == 0
    lengths, num_tokens = mask.sum(dim=1), mask.shape[1]
    rollout = Rollout(
        input_ids=flush_right(width + lengths, input_ids),
        attention_mask=flush_right(width + lengths, torch.cat([attention, mask.long()], dim=1)),
        mask=flush_right(lengths, mask),
        truncated=~is_stop.any(dim=1),
    )
    if recorder.temperature > 0:
        recorder.note(input_ids)
        # On a GPU, generate may run a few steps too far and take them back.
        chosen = torch.cat(recorder.chosen[:num_tokens], dim=1)
        rollout.logprobs = torch.where(rollout.mask, flush_right(lengths, chosen), 0)
    return rollout


def completion_texts(rollout, tokenizer, stop_ids):
    """The text of each response, stop and special tokens dropped: what rewards read."""
    is_stop = torch.isin(rollout.response_ids, torch.tensor(stop_ids, device=rollout.mask.device))
    keep = (rollout.mask & ~is_stop).cpu()
    ids = [row[kept].tolist() for row, kept in zip(rollout.response_ids.cpu(), keep)]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def chunk_logprobs(logits, ids, temperature):
    """log softmax(logits / temperature) at ids: (K, V), (K,) -> (K,) fp32."""
    logits = logits.float()
    # Not in place: the logits are the model's own tensor.
    logits = logits if temperature == 1 else logits / temperature
    return -cross_entropy(logits, ids, reduction="none")


def token_logprobs(logits, ids, temperature, chunk_size=2**24):
    """log softmax(logits / temperature) at ids: (B, T, V), (B, T) -> (B, T) fp32, in nats.

    Tokens go in chunks of about chunk_size numbers, recomputed in backward: no fp32 copy of
    (B, T, V) is ever kept.
    """
    num_rows = max(1, chunk_size // logits.shape[-1])
    options = {"use_reentrant": False, "preserve_rng_state": False}
    logprobs = []
    for rows in zip(logits.flatten(0, 1).split(num_rows), ids.flatten().split(num_rows)):
        logprobs.append(checkpoint(chunk_logprobs, *rows, temperature, **options))
    return torch.cat(logprobs).view(ids.shape)


def response_logprobs(model, rollout, temperature):
    """The log-prob of every response token at the sampling temperature: -> (B, T) fp32, nats.

    0 off the mask. The logits one position before a token are the ones that chose it; only those
    of the last T positions are computed.
    """
    output = model(
        rollout.input_ids[:, :-1],
        attention_mask=rollout.attention_mask[:, :-1],
        position_ids=rollout.position_ids[:, :-1],
        use_cache=False,
        logits_to_keep=rollout.mask.shape[1],
    )
    logprobs = token_logprobs(output.logits, rollout.response_ids, temperature)
    return torch.where(rollout.mask, logprobs, 0)


def response_quantiles(critic, rollout, after_last=False):
    """The critic's quantiles at the state before every response token: -> (B, T, N, M) fp32.

    after_last: one column more, the state after the last token: (B, T + 1, N, M).
    """
    num_columns, end = rollout.mask.shape[1], rollout.input_ids.shape[1] - 1
    if after_last:
        num_columns, end = num_columns + 1, end + 1
    return critic(
        rollout.input_ids[:, :end],
        rollout.attention_mask[:, :end],
        rollout.position_ids[:, :end],
        last=num_columns,
    )


def micro_batches(rollout, rows, max_rows, max_tokens):
    """rows (a CPU tensor of indices) in groups of similar length, longest first.

    A group has at most max_rows and, padding counted, max_tokens; a longer row goes alone. A row
    shorter than 3/4 of a group's longest begins the next one, unless the group is so small
    (256 tokens) that overhead rules.
    """
    lengths, order = rollout.lengths[rows, 0].sort(descending=True, stable=True)
    groups, width = [], 0
    for row, length in zip(rows[order].tolist(), lengths.tolist()):
        size = len(groups[-1]) if groups else max_rows
        is_full = size >= max_rows or (size + 1) * width > max_tokens
        if is_full or (length < 0.75 * width and size * width >= 256):
            groups.append([])
            width = length
        groups[-1].append(row)
    return [torch.tensor(group) for group in groups]


def in_micro_batches(function, model, rollout, max_rows, max_tokens, *rest):
    """function(model, some rows of rollout, *rest) for all rows, put together flush right.

    function gives (rows, T or more, ...) -> (B, T or more, ...), anything off the mask.
    """
    result, num_rows = None, len(rollout.lengths)
    for rows in micro_batches(rollout, torch.arange(num_rows), max_rows, max_tokens):
        micro = rollout[rows]
        part = function(model, micro, *rest)
        if result is None:
            # Some functions give one column more than there are response tokens.
            num_columns = rollout.mask.shape[1] + part.shape[1] - micro.mask.shape[1]
            result = part.new_zeros(num_rows, num_columns, *part.shape[2:])
        result[rows.to(part.device, non_blocking=True), -part.shape[1] :] = part
    return result

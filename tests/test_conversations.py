"""tasks/conversations.py: turns by hand, ids that are never encoded again, and gaps in the mask."""

import sys

import pytest
import torch
from common import bos_tokenizer, favour, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from critic import QuantileCritic
from rollout import assemble, response_logprobs, response_quantiles, sample
from tasks import InputError
from tasks.builtin import task_tokenizer
from tasks.conversations import continuation, converse
from tasks.noise import PSEUDO_LABEL
from tasks.prompts import PROMPT_IDS, encode_prompts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns_of(script, tokenizer, seen, cut=()):
    """A policy that says script[row][turn].

    seen collects the ids that it is given, cut names the texts without a stop token.
    """
    counts = [0] * len(script)
    first = []

    def take_turn(prompt_ids):
        if not first:
            first.extend(prompt_ids)
        seen.append(prompt_ids)
        said = []
        for ids in prompt_ids:
            row = next(i for i, start in enumerate(first) if ids[: len(start)] == start)
            said.append(script[row][counts[row]])
            counts[row] += 1
        responses = [tokenizer(text)["input_ids"] + [1] * (text not in cut) for text in said]
        masks = [[True] * len(ids) for ids in responses]
        return assemble(prompt_ids, responses, masks, [text in cut for text in said], 0, "cpu")

    return take_turn


def conversation_batch(tokenizer, *openings, **columns):
    prompts = [[{"role": "user", "content": text}] for text in openings]
    return {"prompt": prompts, PROMPT_IDS: encode_prompts(prompts, tokenizer), **columns}


def test_a_conversation_by_hand():
    tokenizer, seen = task_tokenizer("booking"), []
    batch = conversation_batch(tokenizer, "book area food", "book day", name=["one", "two"])
    heard = []

    def user(messages, name):
        heard.append((name, [m["content"] for m in messages]))
        return {"area": "area north", "food": "food thai"}.get(messages[-1]["content"])

    take_turn = turns_of([["area", "food", "book ok"], ["book"]], tokenizer, seen)
    found = converse(
        take_turn, batch, user, tokenizer, 0, [1], max_turns=5, max_tokens=100, limit=99
    )
    words = tokenizer.convert_ids_to_tokens
    first = "<user> book area food <assistant>".split()
    talk = "area <eos> <user> area north <assistant> food <eos> <user> food thai <assistant>"
    talk = [*talk.split(), "book", "ok", "<eos>"]
    short = "<user> book day <assistant> book <eos>".split()
    assert words(found.input_ids[0].tolist()) == first + talk
    assert words(found.input_ids[1].tolist()) == ["<pad>"] * 14 + short
    own = [word in ("area", "<eos>", "food", "book", "ok") for word in talk]
    own[3] = own[9] = False  # the user's
    assert found.mask.tolist() == [own, [False] * 13 + [True] * 2]
    assert found.attention_mask.tolist() == [[1] * 20, [0] * 14 + [1] * 6]
    assert found.position_ids[1].tolist() == [0] * 14 + [0, 1, 2, 3, 4, 5]
    assert found.lengths.tolist() == [[20, 15], [6, 2]]
    assert found.truncated.tolist() == [False, False]
    assert [len(ids) for ids in seen] == [2, 1, 1] and words(seen[1][0]) == first + talk[:6]
    said = ["area", "area north", "food", "food thai", "book ok"]
    assert [[m["content"] for m in row] for row in found.messages] == [said, ["book"]]
    assert [m["role"] for m in found.messages[0]] == ["assistant", "user"] * 2 + ["assistant"]
    assert heard[0] == ("one", ["book area food", "area"])
    assert heard[1] == ("two", ["book day", "book"])
    assert heard[-1] == ("one", ["book area food", *said])
    assert found[:].mask.equal(found.mask) and found.logprobs is None


LIMITS = [  # script, texts without a stop token, (max_turns, max_tokens), turns, truncated
    (["area"] * 9, (), (3, 100), 3, False),
    (["area", "food", "area"], ("food",), (9, 100), 2, True),
    # 4 tokens, then 5 each turn, 2 of the policy and 3 between: before the fourth turn 19.
    (["area"] * 9, (), (9, 16), 3, True),
    (["area"] * 9, (), (9, 19), 4, True),
]


@pytest.mark.parametrize("script,cut,limits,turns,truncated", LIMITS)
def test_conversations_end_after_max_turns_at_a_torn_turn_and_before_the_context_does(
    script, cut, limits, turns, truncated
):
    tokenizer = task_tokenizer("booking")
    batch = conversation_batch(tokenizer, "book area")
    take_turn = turns_of([script], tokenizer, [], cut)
    found = converse(take_turn, batch, lambda messages: "ok", tokenizer, 0, [1], *limits, 99)
    assert [m["role"] for m in found.messages[0]].count("assistant") == turns
    assert found.truncated.tolist() == [truncated]
    # What ends it is the policy's.
    assert found.messages[0][-1]["role"] == "assistant" and found.mask[0, -1]


@pytest.fixture
def talked():
    """Conversations of a random policy, ragged in everything, and the policy."""
    tokenizer = task_tokenizer("booking")
    torch.manual_seed(0)
    model = favour(AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer))), 1, 4.0)
    batch = conversation_batch(tokenizer, "book area food", "book day", "book people two area")

    def take_turn(prompt_ids):
        return sample(model, prompt_ids, 0, [1], 8, 1.0, record_logprobs=True)

    def user(messages):
        limit = 4 if "day" in messages[0]["content"] else 6
        return "ok" if len(messages) < limit else None

    return converse(take_turn, batch, user, tokenizer, 0, [1], 9, 60, 99), model, batch


def test_every_conversations_last_token_stands_in_the_last_column(talked):
    found, _, batch = talked
    assert len(set(found.lengths[:, 1].tolist())) > 1
    assert found.mask[:, -1].all() and found.attention_mask[:, -1].all()
    width = found.input_ids.shape[1]
    assert width == found.lengths[:, 0].max()
    for row, (total, length) in enumerate(found.lengths.tolist()):
        prompt = batch[PROMPT_IDS][row]
        assert total == len(prompt) + length
        assert found.input_ids[row, width - total : width - length].tolist() == prompt
        assert found.attention_mask[row].tolist() == [0] * (width - total) + [1] * total
        assert found.mask[row].nonzero()[0] == found.mask.shape[1] - length  # a turn begins there
        own = [m["content"] for m in found.messages[row] if m["role"] == "assistant"]
        said = found.response_ids[row][found.mask[row]]
        assert len(own) == (said == 1).sum() + found.truncated[row]


def test_logprobs_of_conversations_are_the_scored_ones(talked):
    found, model, _ = talked
    gaps = (~found.mask) & found.attention_mask[:, -found.mask.shape[1] :].bool()
    assert gaps.any() and found.mask.sum() > 9
    assert torch.equal(found.logprobs != 0, found.mask)
    scored = response_logprobs(model, found, 1.0)
    torch.testing.assert_close(scored, found.logprobs, rtol=0, atol=1e-4)


def test_logprobs_and_values_of_a_conversation_are_those_of_it_alone(talked):
    """Gaps in the mask hide no token: the states between are read, and after the last."""
    found, model, _ = talked
    critic = QuantileCritic(model.model, 2, 3, seed=0)
    torch.nn.init.normal_(critic.heads.weight)
    logprobs = response_logprobs(model, found, 1.0)
    before = response_quantiles(critic, found)
    quantiles = response_quantiles(critic, found, after_last=True)
    torch.testing.assert_close(quantiles[:, :-1], before, rtol=0, atol=1e-4)
    for row, (total, length) in enumerate(found.lengths.tolist()):
        ids = found.input_ids[row : row + 1, -total:]
        alone = critic(ids, torch.ones_like(ids), torch.arange(total)[None])[0, -length - 1 :]
        torch.testing.assert_close(quantiles[row, -length - 1 :], alone, rtol=0, atol=1e-4)
        scored = model(ids).logits[:, -length - 1 : -1].log_softmax(-1)
        scored = scored.gather(-1, ids[:, -length:, None])[0, :, 0]
        expected = torch.where(found.mask[row, -length:], scored, 0)
        torch.testing.assert_close(logprobs[row, -length:], expected, rtol=0, atol=1e-4)


class Written:
    """A tokenizer that keeps what it is asked to encode."""

    def __init__(self, tokenizer):
        self.chat_template = tokenizer.chat_template
        self.apply_chat_template = tokenizer.apply_chat_template
        self.written = []

    def __call__(self, text, add_special_tokens):
        self.written.append((text, add_special_tokens))
        return {"input_ids": [7]}


LEAVES_OUT = [
    "{{ messages[-1]['content'] }}",
    "{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% endfor %}",
]


def test_between_two_turns_stands_what_the_template_writes():
    tokenizer = Written(bos_tokenizer(CHATML))
    assert continuation(None, "and then?", tokenizer) == [7]
    between = "<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.written == [(between, False)]
    for template in LEAVES_OUT:
        with pytest.raises(InputError, match="a chat template for all turns, .* found none"):
            continuation(None, "x", bos_tokenizer(template))


def test_what_follows_a_turn_drops_the_templates_mark_only_where_it_was_sampled():
    """A space before EOS, as Llama 2's template writes it; another stop token; our own marker."""
    words = ["<pad>", "</s>", "<end>", "[user]", "ok", "go", "on", "turn-of-the-policy", "x", " "]
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[user] {{ m.content }}"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )

    def said(last, reply):
        return tokenizer.convert_ids_to_tokens(continuation(last, reply, tokenizer))

    assert said(1, "go on") == ["[user]", " ", "go", " ", "on"]
    assert said(2, "go on") == [" ", "</s>", "[user]", " ", "go", " ", "on"]
    assert said(1, "turn-of-the-policy x") == ["[user]", " ", "turn-of-the-policy", " ", "x"]


def test_a_user_may_change_the_messages_it_gets_and_sees_the_users_columns_alone():
    tokenizer = task_tokenizer("booking")
    columns = {"messages": ["mine"], "other": [1], PSEUDO_LABEL: ["label"]}
    batch = conversation_batch(tokenizer, "book area", **columns)

    def user(messages, **columns):
        assert columns == {"other": 1}
        for message in messages:
            message["role"] = "nobody"
        return "ok" if len(messages) < 4 else None

    take_turn = turns_of([["area", "food", "day"]], tokenizer, [])
    found = converse(take_turn, batch, user, tokenizer, 0, [1], 9, 99, 99)
    assert [m["role"] for m in found.messages[0]] == ["assistant", "user", "assistant"]
    assert batch["prompt"][0][0]["role"] == "user"


def fails(messages):
    raise ValueError


def ends(messages):
    raise GeneratorExit


MISTAKES = [
    (lambda messages: 3, "expected a str, or None at the end, found 3"),
    (lambda messages: 1 / 0, r"it raised ZeroDivisionError.* \(test_conversations.py, line "),
    (fails, r"it raised ValueError\(\) \(test_conversations.py, line "),
    (lambda messages: sys.exit(0), r"it raised SystemExit\(0\)"),
    (lambda: "ok", r"it raised TypeError\(.*takes 0 positional arguments but 1 was given.\)$"),
    (lambda messages, level: "ok", r"it raised TypeError\(.*missing .* argument: 'level'.\)$"),
    (lambda messages: ["ok"], r"expected a str, or None at the end, found \[.ok.\]"),
    (ends, r"it raised GeneratorExit\(\) \(test_conversations.py, line "),
]


@pytest.mark.parametrize("user,found", MISTAKES)
def test_a_users_mistakes_are_one_line(user, found):
    tokenizer = task_tokenizer("booking")
    batch = conversation_batch(tokenizer, "book")
    take_turn = turns_of([["area"]], tokenizer, [])
    with pytest.raises(InputError, match=f"^--user: {found}"):
        converse(take_turn, batch, user, tokenizer, 0, [1], 3, 99, 99)


UNWRITABLE = [
    (lambda messages: "half a \ud83d", r"found with 'half a \\ud83d': "),
    (lambda messages: "sushi", "found with 'sushi': expected token ids below 32, found 32"),
    (lambda messages: "refused", "found with 'refused': row 0: .* cannot write it as a chat: no"),
]


@pytest.mark.parametrize("user,found", UNWRITABLE)
def test_a_reply_that_cannot_be_written_is_one_line(user, found):
    """Half a character; a token that was added without an embedding; what the template refuses."""
    tokenizer = task_tokenizer("booking")
    tokenizer.add_tokens(["sushi"])
    tokenizer.chat_template += (
        "{% if messages[-1].content == 'refused' %}{{ raise_exception('no') }}{% endif %}"
    )
    assert tokenizer.convert_tokens_to_ids("sushi") == 32
    batch = conversation_batch(tokenizer, "book")
    take_turn = turns_of([["area"]], tokenizer, [])
    with pytest.raises(InputError, match=f"^--user: expected a chat template .*{found}") as caught:
        converse(take_turn, batch, user, tokenizer, 0, [1], 3, 99, 32)
    assert "\n" not in str(caught.value)

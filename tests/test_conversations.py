"""tasks/conversations.py: turns by hand, ids that are never encoded again, and gaps in the mask."""

import pytest
import torch
from conftest import bos_tokenizer, favour, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from critic import QuantileCritic
from rollout import assemble, response_logprobs, response_quantiles, sample
from tasks import InputError
from tasks.builtin import task_tokenizer
from tasks.conversations import continuation, converse, turns_between
from tasks.noise import PSEUDO_LABEL
from tasks.prompts import PROMPT_IDS, encode_prompts


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns_of(script, tokenizer, seen, cut=()):
    """A policy that says script[row][turn]; `seen` collects the ids that it is given, `cut` names the texts without a stop token."""
    counts, first = [], []

    def take_turn(prompt_ids):
        if not counts:
            counts.extend([0] * len(script))
            first.extend(prompt_ids)
        seen.append(prompt_ids)
        said = []
        for ids in prompt_ids:
            row = next(i for i, start in enumerate(first) if ids[: len(start)] == start)
            said.append(script[row][counts[row]])
            counts[row] += 1
        width, length = max(map(len, prompt_ids)), 4
        responses = [tokenizer(text)["input_ids"] + [1] * (text not in cut) for text in said]
        ids = [
            [0] * (width - len(p)) + p + r + [0] * (length - len(r))
            for p, r in zip(prompt_ids, responses)
        ]
        attention = [
            [0] * (width - len(p)) + [1] * (len(p) + len(r)) + [0] * (length - len(r))
            for p, r in zip(prompt_ids, responses)
        ]
        attention = torch.tensor(attention)
        truncated = torch.tensor([text in cut for text in said])
        return Rollout(
            torch.tensor(ids),
            attention,
            (attention.cumsum(1) - 1).clamp(min=0),
            attention[:, width:].bool(),
            truncated,
        )

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
    found = converse(take_turn, batch, user, tokenizer, 0, [1], max_turns=5, max_tokens=100)
    words = lambda ids: tokenizer.convert_ids_to_tokens(ids)
    first = "<user> book area food <assistant>".split()
    talk = "area <eos> <user> area north <assistant> food <eos> <user> food thai <assistant> book ok <eos>".split()
    assert words(found.input_ids[0].tolist()) == first + talk
    assert (
        words(found.input_ids[1].tolist())
        == ["<pad>", *"<user> book day <assistant> book <eos>".split()] + ["<pad>"] * 13
    )
    assert found.mask[0].tolist() == [
        word in ("area", "<eos>", "food", "book", "ok") and i not in (3, 9)
        for i, word in enumerate(talk)
    ]
    assert found.mask[1].tolist() == [True] * 2 + [False] * 13
    assert found.lengths.tolist() == [[5, 15], [4, 2]] and found.truncated.tolist() == [
        False,
        False,
    ]
    assert (
        found.position_ids[1].tolist()[:7] == [0, 0, 1, 2, 3, 4, 5]
        and found.attention_mask[1].sum() == 6
    )
    assert [len(ids) for ids in seen] == [2, 1, 1] and words(seen[1][0]) == first + talk[:6]
    assert [[m["content"] for m in row] for row in found.messages] == [
        ["area", "area north", "food", "food thai", "book ok"],
        ["book"],
    ]
    assert [m["role"] for m in found.messages[0]] == ["assistant", "user"] * 2 + ["assistant"]
    assert heard[0] == ("one", ["book area food", "area"]) and heard[1] == (
        "two",
        ["book day", "book"],
    )
    assert heard[-1] == (
        "one",
        ["book area food", "area", "area north", "food", "food thai", "book ok"],
    )
    assert found[:].mask.equal(found.mask) and found.logprobs is None


def test_conversations_end_after_max_turns_at_a_torn_turn_and_before_the_context_does():
    tokenizer, ok = task_tokenizer("booking"), lambda messages: "ok"
    for script, cut, limits, turns, truncated in (
        (["area"] * 9, (), (3, 100), 3, False),
        (["area", "food", "area"], ("food",), (9, 100), 2, True),
        (
            ["area"] * 9,
            (),
            (9, 16),
            3,
            True,
        ),  # 4 tokens, 5 each turn: 2 of the policy, 3 between; before the fourth turn 19
        (["area"] * 9, (), (9, 19), 4, True),
    ):
        batch = conversation_batch(tokenizer, "book area")
        found = converse(
            turns_of([script], tokenizer, [], cut), batch, ok, tokenizer, 0, [1], *limits
        )
        assert [m["role"] for m in found.messages[0]].count(
            "assistant"
        ) == turns and found.truncated.tolist() == [truncated], limits
        assert (
            found.messages[0][-1]["role"] == "assistant" and found.mask[0, -1]
        )  # what ends it is the policy's


def test_logprobs_of_conversations_are_the_scored_ones_and_gaps_change_no_value_before_them():
    tokenizer = task_tokenizer("booking")
    torch.manual_seed(0)
    model = favour(AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer))), 1, 4.0)
    batch = conversation_batch(tokenizer, "book area food", "book day", "book people two area")
    take_turn = lambda prompt_ids: sample(model, prompt_ids, 0, [1], 8, 1.0, record_logprobs=True)
    found = converse(
        take_turn,
        batch,
        lambda messages: "ok" if len(messages) < 6 else None,
        tokenizer,
        0,
        [1],
        9,
        60,
    )
    gaps = (~found.mask) & found.attention_mask[:, -found.mask.shape[1] :].bool()
    assert gaps.any() and found.mask.sum() > 9 and (found.logprobs[~found.mask] == 0).all()
    torch.testing.assert_close(
        response_logprobs(model, found, 1.0), found.logprobs, rtol=0, atol=1e-4
    )
    critic = QuantileCritic(model.model, 2, 3, seed=0)
    torch.nn.init.normal_(critic.heads.weight)
    whole = response_quantiles(critic, found)
    for row, (prompt, response) in enumerate(found.lengths.tolist()):
        ids = found.input_ids[row, found.input_ids.shape[1] - found.mask.shape[1] - prompt :][
            : prompt + response
        ].unsqueeze(0)
        alone = critic(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).unsqueeze(0))[
            0, prompt - 1 : -1
        ]
        torch.testing.assert_close(whole[row, :response], alone, rtol=0, atol=1e-4)


def test_between_two_turns_stands_what_the_template_writes():
    tokenizer = bos_tokenizer(CHATML)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "isolated")
    written = []
    encode = lambda text, add_special_tokens: (
        written.append((text, add_special_tokens)) or {"input_ids": [7]}
    )
    stub = type(
        "Stub",
        (),
        {
            "chat_template": CHATML,
            "apply_chat_template": tokenizer.apply_chat_template,
            "__call__": lambda self, *a, **k: encode(*a, **k),
        },
    )
    assert turns_between("and then?", stub()) == [7]
    assert written == [
        ("<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n", False)
    ]
    for template in (
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% endfor %}",
    ):
        with pytest.raises(InputError, match="expected a chat template that writes every turn"):
            turns_between("x", bos_tokenizer(template))


def test_what_follows_a_turn_drops_the_templates_mark_only_where_it_was_sampled():
    """A space before EOS, as Llama 2's template writes it; a stop token of two that is not the template's; a reply with our own marker."""
    words = ["<pad>", "</s>", "<end>", "[user]", "ok", "go", "on", "turn-of-the-policy", "x"]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)} | {" ": 9}, unk_token="<pad>")
    )
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}[user] {{ m.content }}{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    said = lambda last, reply: tokenizer.convert_ids_to_tokens(continuation(last, reply, tokenizer))
    assert said(1, "go on") == ["[user]", " ", "go", " ", "on"]
    assert said(2, "go on") == [" ", "</s>", "[user]", " ", "go", " ", "on"]
    assert said(1, "turn-of-the-policy x") == ["[user]", " ", "turn-of-the-policy", " ", "x"]


def test_a_user_may_change_the_messages_it_gets_and_sees_the_users_columns_alone():
    tokenizer = task_tokenizer("booking")
    batch = conversation_batch(
        tokenizer, "book area", messages=["mine"], other=[1], **{PSEUDO_LABEL: ["label"]}
    )

    def user(messages, **columns):
        assert columns == {"other": 1}
        for message in messages:
            message["role"] = "nobody"
        return "ok" if len(messages) < 4 else None

    found = converse(
        turns_of([["area", "food", "day"]], tokenizer, []), batch, user, tokenizer, 0, [1], 9, 99
    )
    assert [m["role"] for m in found.messages[0]] == ["assistant", "user", "assistant"] and batch[
        "prompt"
    ][0][0]["role"] == "user"


@pytest.mark.parametrize(
    "reply,found",
    [
        (lambda messages: 3, "expected a str, or None at the end, found '3'"),
        (lambda messages: 1 / 0, "ZeroDivisionError"),
        (lambda: "ok", "TypeError"),
    ],
)
def test_a_users_mistakes_are_one_line(reply, found):
    tokenizer = task_tokenizer("booking")
    with pytest.raises(InputError, match=f"--user: .*{found}"):
        converse(
            turns_of([["area"]], tokenizer, []),
            conversation_batch(tokenizer, "book"),
            reply,
            tokenizer,
            0,
            [1],
            3,
            99,
        )

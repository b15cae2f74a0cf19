"""rollout.py: masks, log-probs against samples, verifiers, noise, and every known way to get them subtly wrong."""

import json
import math
import random
import time
from fractions import Fraction

import numpy
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import rollout
from critic import QuantileCritic
from rollout import (
    InputError,
    Rollout,
    booking_reward,
    boxed,
    choice_reward,
    chosen_letter,
    completion_texts,
    converse,
    encode_prompts,
    exact_reward,
    last_number,
    load_reward,
    math_reward,
    noisy_scores,
    prompt_offsets,
    pseudo_labels,
    response_logprobs,
    response_quantiles,
    sample,
    score,
    scripted_user,
    stop_token_ids,
    task_row,
    task_rows,
    task_tokenizer,
    turns_between,
)

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [13, 14]]  # ragged: left padding


def rolled(model, stop_ids=(1,), temperature=1.0, length=8, pad_id=0, prompts=PROMPTS, seed=0):
    torch.manual_seed(seed)
    return sample(model, prompts, pad_id, list(stop_ids), length, temperature)


def favour(model, token, bonus):
    """Makes a token likelier, through a bias on the head."""
    bias = torch.zeros(model.config.vocab_size)
    bias[token] = bonus
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output + bias)
    return model


# ---- tasks


@pytest.mark.parametrize("task", ["sums", "dialogue"])
@pytest.mark.parametrize("split", ["warm", "train", "test", "ood"])
def test_task_rows_are_right_and_their_answers_earn_the_reward(task, split):
    for row in task_rows(task, split, 50, seed=3):
        reward = {"sums": math_reward, "dialogue": exact_reward}[task]
        assert reward([row["prompt"]], [row["completion"]], [row["answer"]]) == [1.0]
        assert reward([row["prompt"]], [row["completion"] + "1"], [row["answer"]]) == [0.0]
        if task == "sums":
            assert eval(row["prompt"][:-1]) == int(row["answer"])  # our own text, not a model's
        else:
            state = dict(m["content"].split() for m in row["prompt"] if m["role"] == "user" and m["content"] != "book")
            assert dict(zip(row["answer"].split()[::2], row["answer"].split()[1::2])) == state


@pytest.mark.parametrize("task", ["sums", "dialogue", "booking"])
def test_tasks_are_seeded_and_prompts_distinct(task):
    test = task_rows(task, "test", 40, seed=0)
    assert test == task_rows(task, "test", 40, seed=0) != task_rows(task, "test", 40, seed=1)
    assert len({str(row["prompt"]) for row in test}) == 40


def test_out_of_domain_is_longer():
    rng = random.Random(0)
    turns = {split: [len(task_row("dialogue", split, rng)["prompt"]) for _ in range(200)] for split in ("train", "ood")}
    assert min(turns["ood"]) > max(turns["train"])
    terms = {split: [task_row("sums", split, rng)["prompt"].count("+") for _ in range(200)] for split in ("train", "ood")}
    assert min(terms["ood"]) > max(terms["train"])


@pytest.mark.parametrize("task", ["sums", "dialogue", "booking"])
def test_task_tokenizer_round_trips_through_a_folder(task, tmp_path):
    tokenizer = task_tokenizer(task)
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    row = task_row(task, "ood", random.Random(0))
    said = row["completion"] if isinstance(row["completion"], str) else row["completion"][-1]["content"]
    ids = loaded(said)["input_ids"]
    assert ids == tokenizer(said)["input_ids"] and loaded.pad_token_id not in ids
    assert loaded.decode(ids) == said
    assert encode_prompts([row["prompt"]], loaded) == encode_prompts([row["prompt"]], tokenizer)


@pytest.mark.parametrize("split", ["warm", "train", "test", "ood"])
def test_booking_examples_are_what_the_scripted_user_answers_and_earn_the_reward(split):
    for row in task_rows("booking", split, 50, seed=3):
        messages = list(row["prompt"])
        for policy, user in zip(row["completion"][::2], [*row["completion"][1::2], None]):
            messages.append(policy)
            assert scripted_user(messages, replies=row["replies"]) == (user and user["content"])
            messages += [user] if user else []
        assert booking_reward([row["prompt"]], [row["completion"]]) == [1.0]
        assert booking_reward([row["prompt"]], [row["completion"][:-1]]) == [0.0]  # nothing booked
        assert booking_reward([row["prompt"]], [row["completion"][-1:]]) == [0.0]  # booked what nobody has said
    assert len({m["content"] for m in row["completion"]}) == len(row["completion"])


def test_bookings_by_hand():
    prompt = [{"role": "user", "content": "book food thai area day"}]
    say = lambda *turns: [{"role": role, "content": text} for role, text in zip(("assistant", "user") * 4, turns)]
    talk = ("area", "area north", "day", "day friday food greek")
    for last, right in (("book area north food greek day friday", 1.0), ("book area north food thai day friday", 0.0),  # an old value
                        ("book food greek area north day friday", 0.0), ("area north food greek day friday", 0.0), ("", 0.0)):  # fmt: skip
        assert booking_reward([prompt], [say(*talk, last)]) == [right]
    assert booking_reward([prompt], [say("area", "area north", "book area north food thai")]) == [0.0]  # the day was never asked for
    assert booking_reward([prompt], [say("hello", "ok", "book area None food thai day None")]) == [0.0]
    replies = json.dumps({"area": "area north"})
    assert [scripted_user(say(text), replies) for text in ("area", " area ", "day", "area area", "", "book", "book area")] == \
        ["area north", "area north", "ok", "ok", "ok", None, None]  # fmt: skip


# ---- prompts


def bos_tokenizer(template=None):
    """A word tokenizer that puts <bos> before every text, as Llama's does."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "hello": 2, "there": 3, "[user]": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


TEMPLATE = "{{ bos_token }} {% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"


def test_one_bos_with_and_without_a_template():
    messages = [{"role": "user", "content": "hello there"}]
    assert encode_prompts(["hello there"], bos_tokenizer()) == [[1, 2, 3]]
    assert encode_prompts(["hello there", messages], bos_tokenizer(TEMPLATE)) == [[1, 4, 2, 3]] * 2
    assert encode_prompts(["hello there"], bos_tokenizer(TEMPLATE), use_chat_template=False) == [[1, 2, 3]]


@pytest.mark.parametrize("prompt", [[], "", None, 7, [{"role": "user"}], [{"role": "user", "content": 3}], ["hello"]])
def test_malformed_prompts_are_refused_with_their_row(prompt):
    with pytest.raises(InputError, match="row 1: prompt"):
        encode_prompts(["hello", prompt], bos_tokenizer(TEMPLATE))


def test_messages_without_a_template_and_templates_that_raise_are_one_line():
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(InputError, match="row 0: .*no chat template"):
        encode_prompts([messages], bos_tokenizer())
    with pytest.raises(InputError, match="row 0: .*refuses it: only two roles"):
        encode_prompts([messages], bos_tokenizer("{{ raise_exception('only two\n roles') }}"))


# ---- sampling


def test_mask_ends_with_the_first_stop_token_and_truncation_is_not_guessed_from_width(model):
    favour(model, 1, 2.0)
    found = rolled(model, length=8, prompts=PROMPTS * 8)
    for ids, mask, truncated in zip(found.response_ids, found.mask, found.truncated):
        stops = (ids == 1).nonzero().flatten().tolist()
        assert bool(truncated) == (not stops)
        assert mask.sum() == (stops[0] + 1 if stops else 8)
        assert mask[: mask.sum()].all()
    assert found.truncated.any() and not found.truncated.all()
    longest_finished = found.mask.sum(1)[~found.truncated].max()
    assert longest_finished <= 8


def test_a_row_that_stops_on_the_last_slot_is_not_truncated(model):
    found = rolled(favour(model, 1, 100.0), length=1)
    assert found.mask.tolist() == [[True]] * 4 and not found.truncated.any()


@pytest.mark.parametrize("pad_id", [0, 1])
def test_pad_equal_to_eos_keeps_exactly_one_eos_in_mask_and_attention(model, pad_id):
    found = rolled(favour(model, 1, 2.5), pad_id=pad_id, prompts=PROMPTS * 4)
    for ids, mask in zip(found.response_ids, found.mask):
        assert (ids[mask] == 1).sum() <= 1
    assert torch.equal(found.attention_mask[:, 6:].bool(), found.mask)
    assert (found.mask & (found.response_ids == 1)).sum() == (~found.truncated).sum()


def test_a_sampled_pad_token_is_an_action_like_any_other(model):
    found = rolled(favour(model, 0, 3.0), stop_ids=[1], pad_id=0)
    assert ((found.response_ids == 0) & found.mask).any()


def test_several_stop_ids_and_a_custom_one(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    book = tokenizer.convert_tokens_to_ids("book")
    ids = stop_token_ids(model, tokenizer, "book")
    assert ids == sorted({tokenizer.eos_token_id, 7, book})
    found = rolled(favour(model, book, 3.0), stop_ids=ids, prompts=PROMPTS * 4)
    ends = [row[mask][-1].item() for row, mask in zip(found.response_ids, found.mask)]
    assert book in ends and all(end in ids for end, cut in zip(ends, found.truncated) if not cut)
    with pytest.raises(InputError, match="--stop-token: 'no such'"):
        stop_token_ids(model, tokenizer, "no such")


def test_positions_count_real_tokens_only(model):
    found = rolled(model)
    assert found.position_ids[1, :6].tolist() == [0, 0, 0, 0, 0, 0] and found.position_ids[2, :6].tolist() == [0, 1, 2, 3, 4, 5]
    last = found.attention_mask.sum(1) - 1
    assert torch.equal(found.position_ids.max(1).values, last)


def test_greedy_takes_the_likeliest_token_and_leaves_the_generator_alone(model):
    model.eval()
    state = torch.get_rng_state()
    found = sample(model, PROMPTS, 0, [1], 5, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    logits = model(found.input_ids, attention_mask=found.attention_mask, position_ids=found.position_ids).logits[:, 5:-1]
    assert torch.equal(logits.argmax(-1)[found.mask], found.response_ids[found.mask])


def test_texts_drop_stop_and_special_tokens(model_folder):
    """A custom stop token is an ordinary word: it ends the response and is not part of the answer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    thai, book = tokenizer.convert_tokens_to_ids(["thai", "book"])
    found = rollout.Rollout(torch.tensor([[5, thai, 4, book, thai]]), torch.tensor([[1, 1, 1, 1, 0]]), torch.arange(5)[None],
                            torch.tensor([[1, 1, 1, 0]]).bool(), torch.tensor([False]))  # fmt: skip
    assert completion_texts(found, tokenizer, [1, book]) == ["thai"]
    assert completion_texts(found, tokenizer, [1]) == ["thai book"]


def test_the_models_own_generation_settings_do_not_shape_the_samples(model):
    """A repetition penalty, top-k or minimum length in the model's file would make log-probs those of another distribution."""
    plain = rolled(model)
    own = GenerationConfig(repetition_penalty=5.0, top_k=1, top_p=0.1, min_new_tokens=7, no_repeat_ngram_size=1, temperature=0.1, do_sample=True)
    model.generation_config = own
    assert torch.equal(rolled(model).input_ids, plain.input_ids)
    assert model.generation_config is own


def test_generate_under_gradient_checkpointing_and_train_mode_keeps_its_cache(model):
    plain = rolled(model.eval())
    widths = []
    note_width = lambda module, args, kwargs: widths.append((args[0] if args else kwargs["input_ids"]).shape[1])
    model.base_model.register_forward_pre_hook(note_width, with_kwargs=True)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(rolled(model).input_ids, plain.input_ids)
    assert model.training and set(widths[1:]) == {1}  # one new token at a time: the cache holds the rest


# ---- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_recorded_logprobs_are_the_scored_ones(model, temperature):
    """What sampling drew from, against a forward pass with gradient: within 1e-5 on every valid token, zero on the others."""
    favour(model, 1, 1.0 * temperature)
    torch.manual_seed(0)
    found = sample(model, PROMPTS * 8, 0, [1], 8, temperature, record_logprobs=True)
    assert 0 < found.truncated.sum() < 32 and not found.logprobs.requires_grad
    scored = response_logprobs(model.train(), found, temperature)
    assert (found.logprobs - scored)[found.mask].abs().max() < 1e-5
    assert (found.logprobs[~found.mask] == 0).all() and not found.mask.all()
    assert found[torch.tensor([5, 1])].logprobs is None and sample(model, PROMPTS, 0, [1], 2, 0.0, record_logprobs=True).logprobs is None
    torch.manual_seed(0)
    assert torch.equal(sample(model, PROMPTS * 8, 0, [1], 8, temperature).input_ids, found.input_ids)  # recording changes no sample


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_frequencies_are_the_scored_probabilities(model, temperature):
    """6,000 one-token samples against exp(logprobs) of the same prompt: within five standard errors for every token."""
    found = rolled(model, temperature=temperature, length=1, prompts=[[3, 4, 5]] * 6000)
    counts = torch.bincount(found.response_ids[:, 0], minlength=40)
    with torch.no_grad():
        expected = torch.stack([
            response_logprobs(model, rollout.Rollout(torch.tensor([[3, 4, 5, token]]), torch.ones(1, 4).long(), torch.arange(4)[None],
                                                     torch.ones(1, 1).bool(), torch.zeros(1)), temperature)[0, 0]
            for token in range(40)
        ]).exp()  # fmt: skip
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    error = (expected * (1 - expected) / 6000).sqrt() + 1e-4
    assert ((counts / 6000 - expected).abs() < 5 * error).all()


def test_ratio_is_1_before_any_update_under_ragged_left_padding(model):
    """Scored as one batch, then in micro-batches of other widths in train mode: log-ratios within 1e-5 on every valid token."""
    found = rolled(favour(model, 1, 1.0), prompts=PROMPTS * 3)
    with torch.no_grad():
        old = response_logprobs(model, found, 0.7)
    model.train()
    for rows in torch.randperm(12).split(5):
        part = found[rows]
        new = response_logprobs(model, part, 0.7)
        assert new.requires_grad
        difference = (new - old[rows, : part.mask.shape[1]])[part.mask]
        assert difference.abs().max() < 1e-5
    unpadded = [found[torch.tensor([row])] for row in range(12)]
    assert any(part.input_ids.shape[1] < found.input_ids.shape[1] for part in unpadded)
    for row, part in enumerate(unpadded):
        assert (response_logprobs(model, part, 0.7)[part.mask] - old[row][found.mask[row]]).abs().max() < 1e-5


def test_left_padding_without_positions_is_what_the_ratio_test_would_catch(model):
    """The check has teeth: GPT-2 with positions counted from the padding disagrees (rotary models only see differences)."""
    found = rolled(model)
    right = response_logprobs(model, found, 1.0)
    found.position_ids = torch.arange(found.input_ids.shape[1]).expand_as(found.input_ids)
    wrong = (response_logprobs(model, found, 1.0) - right)[found.mask].abs().max()
    assert wrong > 1e-3 if model.config.model_type == "gpt2" else wrong < 1e-4


def test_logprobs_and_values_pair_token_t_with_the_position_before_it(model):
    """A model whose logits say where they were computed: token t is judged by position prompt + t - 1."""
    found = rolled(model, prompts=[[3, 4, 5], [6, 7, 8]], length=4)

    def forward(input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        logits = torch.zeros(*input_ids.shape, 40)
        logits[..., 0] = position_ids  # the log-prob of token 0 grows with the position
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})

    found.input_ids[:, 3:] = 0
    expected = [(torch.tensor([float(position)] + [0.0] * 39).log_softmax(-1)[0]).item() for position in (2, 3, 4, 5)]
    assert response_logprobs(forward, found, 1.0)[0].tolist() == pytest.approx(expected, rel=1e-5)
    critic = lambda ids, attention, positions, columns: positions.gather(1, columns)[..., None, None].float()
    assert response_quantiles(critic, found)[0].flatten().tolist() == [2, 3, 4, 5]
    assert response_quantiles(critic, found, after_last=True)[0].flatten().tolist() == [2, 3, 4, 5, 6]


# ---- conversations


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
        ids = [[0] * (width - len(p)) + p + r + [0] * (length - len(r)) for p, r in zip(prompt_ids, responses)]
        attention = [[0] * (width - len(p)) + [1] * (len(p) + len(r)) + [0] * (length - len(r)) for p, r in zip(prompt_ids, responses)]
        attention = torch.tensor(attention)
        truncated = torch.tensor([text in cut for text in said])
        return Rollout(torch.tensor(ids), attention, (attention.cumsum(1) - 1).clamp(min=0), attention[:, width:].bool(), truncated)

    return take_turn


def conversation_batch(tokenizer, *openings, **columns):
    prompts = [[{"role": "user", "content": text}] for text in openings]
    return {"prompt": prompts, rollout.PROMPT_IDS: encode_prompts(prompts, tokenizer), **columns}


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
    assert words(found.input_ids[1].tolist()) == ["<pad>", *"<user> book day <assistant> book <eos>".split()] + ["<pad>"] * 13
    assert found.mask[0].tolist() == [word in ("area", "<eos>", "food", "book", "ok") and i not in (3, 9) for i, word in enumerate(talk)]
    assert found.mask[1].tolist() == [True] * 2 + [False] * 13
    assert found.lengths.tolist() == [[5, 15], [4, 2]] and found.truncated.tolist() == [False, False]
    assert found.position_ids[1].tolist()[:7] == [0, 0, 1, 2, 3, 4, 5] and found.attention_mask[1].sum() == 6
    assert [len(ids) for ids in seen] == [2, 1, 1] and words(seen[1][0]) == first + talk[:6]
    assert [[m["content"] for m in row] for row in found.messages] == [["area", "area north", "food", "food thai", "book ok"], ["book"]]
    assert [m["role"] for m in found.messages[0]] == ["assistant", "user"] * 2 + ["assistant"]
    assert heard[0] == ("one", ["book area food", "area"]) and heard[1] == ("two", ["book day", "book"])
    assert heard[-1] == ("one", ["book area food", "area", "area north", "food", "food thai", "book ok"])
    assert found[:].mask.equal(found.mask) and found.logprobs is None


def test_conversations_end_after_max_turns_at_a_torn_turn_and_before_the_context_does():
    tokenizer, ok = task_tokenizer("booking"), lambda messages: "ok"
    for script, cut, limits, turns, truncated in (
        (["area"] * 9, (), (3, 100), 3, False),
        (["area", "food", "area"], ("food",), (9, 100), 2, True),
        (["area"] * 9, (), (9, 16), 3, True),  # 4 tokens, 5 each turn: 2 of the policy, 3 between; before the fourth turn 19
        (["area"] * 9, (), (9, 19), 4, True),
    ):
        batch = conversation_batch(tokenizer, "book area")
        found = converse(turns_of([script], tokenizer, [], cut), batch, ok, tokenizer, 0, [1], *limits)
        assert [m["role"] for m in found.messages[0]].count("assistant") == turns and found.truncated.tolist() == [truncated], limits
        assert found.messages[0][-1]["role"] == "assistant" and found.mask[0, -1]  # what ends it is the policy's


def test_logprobs_of_conversations_are_the_scored_ones_and_gaps_change_no_value_before_them():
    tokenizer = task_tokenizer("booking")
    torch.manual_seed(0)
    model = favour(AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer))), 1, 4.0)
    batch = conversation_batch(tokenizer, "book area food", "book day", "book people two area")
    take_turn = lambda prompt_ids: sample(model, prompt_ids, 0, [1], 8, 1.0, record_logprobs=True)
    found = converse(take_turn, batch, lambda messages: "ok" if len(messages) < 6 else None, tokenizer, 0, [1], 9, 60)
    gaps = (~found.mask) & found.attention_mask[:, -found.mask.shape[1] :].bool()
    assert gaps.any() and found.mask.sum() > 9 and (found.logprobs[~found.mask] == 0).all()
    torch.testing.assert_close(response_logprobs(model, found, 1.0), found.logprobs, rtol=0, atol=1e-4)
    critic = QuantileCritic(model.model, 2, 3, seed=0)
    torch.nn.init.normal_(critic.heads.weight)
    whole = response_quantiles(critic, found)
    for row, (prompt, response) in enumerate(found.lengths.tolist()):
        ids = found.input_ids[row, found.input_ids.shape[1] - found.mask.shape[1] - prompt :][: prompt + response].unsqueeze(0)
        alone = critic(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).unsqueeze(0))[0, prompt - 1 : -1]
        torch.testing.assert_close(whole[row, :response], alone, rtol=0, atol=1e-4)


def test_between_two_turns_stands_what_the_template_writes():
    tokenizer = bos_tokenizer(CHATML)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "isolated")
    written = []
    encode = lambda text, add_special_tokens: written.append((text, add_special_tokens)) or {"input_ids": [7]}
    stub = type("Stub", (), {"chat_template": CHATML, "apply_chat_template": tokenizer.apply_chat_template, "__call__": lambda self, *a, **k: encode(*a, **k)})
    assert turns_between("and then?", stub()) == [7]
    assert written == [("<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n", False)]
    for template in ("{{ messages[-1]['content'] }}", "{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% endfor %}"):
        with pytest.raises(InputError, match="expected a chat template that writes every turn"):
            turns_between("x", bos_tokenizer(template))


def test_what_follows_a_turn_drops_the_templates_mark_only_where_it_was_sampled():
    """A space before EOS, as Llama 2's template writes it; a stop token of two that is not the template's; a reply with our own marker."""
    words = ["<pad>", "</s>", "<end>", "[user]", "ok", "go", "on", "turn-of-the-policy", "x"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)} | {" ": 9}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}[user] {{ m.content }}{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    said = lambda last, reply: tokenizer.convert_ids_to_tokens(rollout.continuation(last, reply, tokenizer))
    assert said(1, "go on") == ["[user]", " ", "go", " ", "on"]
    assert said(2, "go on") == [" ", "</s>", "[user]", " ", "go", " ", "on"]
    assert said(1, "turn-of-the-policy x") == ["[user]", " ", "turn-of-the-policy", " ", "x"]


def test_a_user_may_change_the_messages_it_gets_and_sees_the_users_columns_alone():
    tokenizer = task_tokenizer("booking")
    batch = conversation_batch(tokenizer, "book area", messages=["mine"], other=[1], **{rollout.PSEUDO_LABEL: ["label"]})

    def user(messages, **columns):
        assert columns == {"other": 1}
        for message in messages:
            message["role"] = "nobody"
        return "ok" if len(messages) < 4 else None

    found = converse(turns_of([["area", "food", "day"]], tokenizer, []), batch, user, tokenizer, 0, [1], 9, 99)
    assert [m["role"] for m in found.messages[0]] == ["assistant", "user", "assistant"] and batch["prompt"][0][0]["role"] == "user"


@pytest.mark.parametrize("reply,found", [(lambda messages: 3, "expected a str, or None at the end, found '3'"), (lambda messages: 1 / 0, "ZeroDivisionError"),
                                         (lambda: "ok", "TypeError")])  # fmt: skip
def test_a_users_mistakes_are_one_line(reply, found):
    tokenizer = task_tokenizer("booking")
    with pytest.raises(InputError, match=f"--user: .*{found}"):
        converse(turns_of([["area"]], tokenizer, []), conversation_batch(tokenizer, "book"), reply, tokenizer, 0, [1], 3, 99)


def test_whole_conversations_reach_the_reward_as_they_are():
    said = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    seen = []
    reward = lambda prompts, completions: seen.extend(completions) or [1.0] * len(completions)
    score(reward, {"prompt": [[{"role": "user", "content": "x"}]] * 2}, [said, "c"])
    assert seen == [said, said[-1:]]
    assert exact_reward(["x"], [said], ["c"]) == [1.0]  # the last turn is the answer


def test_logits_are_computed_at_response_positions_only(model):
    found, seen = rolled(model), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    response_logprobs(model, found, 1.0)
    assert seen == [found.mask.shape[1]]


def by_hand():
    """Two rows, prompts of 1 and 3 tokens, responses of 3 and 1: five columns of padding in twelve."""
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [2, 3, 4, 9, 0, 0]])
    attention = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    return rollout.Rollout(ids, attention, (attention.cumsum(1) - 1).clamp(min=0), mask, torch.tensor([False, True]))


def test_right_alignment_leaves_no_padding_but_what_lengths_demand():
    ids, attention, positions, columns = rollout.right_aligned(by_hand())
    assert ids.tolist() == [[5, 6, 7, 8], [2, 3, 4, 9]] and attention.all() and positions.tolist() == [[0, 1, 2, 3]] * 2
    assert columns.tolist() == [[0, 1, 2, 3], [2, 3, 3, 3]]  # before each response token, after the last, then nothing new
    longer = by_hand()
    longer.lengths[1, 1], longer.attention_mask[1, 4], longer.mask[1, 1] = 2, 1, True
    ids, attention, _, columns = rollout.right_aligned(longer)
    assert ids.tolist() == [[0, 5, 6, 7, 8], [2, 3, 4, 9, 0]] and attention.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert columns.tolist() == [[1, 2, 3, 4], [2, 3, 4, 4]]


@pytest.mark.parametrize("extra", [1, 5, 40])
def test_appended_pad_columns_change_no_logprob_and_no_value(model, extra):
    found = rolled(favour(model, 1, 1.0))
    pad = lambda x: torch.nn.functional.pad(x, (0, extra))
    wide = rollout.Rollout(pad(found.input_ids), pad(found.attention_mask), pad(found.position_ids), pad(found.mask), found.truncated)
    old, new = (response_logprobs(model, x, 1.0) for x in (found, wide))
    assert new.shape == wide.mask.shape and torch.equal(new[:, : old.shape[1]], old) and (new[~wide.mask] == 0).all()
    critic = QuantileCritic(model.base_model, 2, 3)
    for after_last in (False, True):
        old, new = (response_quantiles(critic, x, after_last) for x in (found, wide))
        assert new.shape[1] == wide.mask.shape[1] + after_last and torch.equal(new[:, : old.shape[1]], old)
        assert torch.equal(new[:, -1], old[:, -1]) or not after_last  # behind a response: the state after its last token


def test_lengths_are_counted_from_the_attention_mask():
    assert by_hand().lengths.tolist() == [[1, 3], [3, 1]]
    assert by_hand()[torch.tensor([1])].input_ids.tolist() == [[2, 3, 4, 9]]


@pytest.mark.parametrize("max_rows, max_tokens", [(1, 10**6), (3, 10**6), (100, 10**6), (100, 700), (100, 1)])
def test_micro_batches_are_a_partition_within_limits_and_of_similar_lengths(max_rows, max_tokens):
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 300, (40, 2), generator=rng)
    found = rollout.Rollout(torch.zeros(40, 2), torch.zeros(40, 2), torch.zeros(40, 2), torch.zeros(40, 1), torch.zeros(40), lengths=lengths)
    rows = torch.randperm(40, generator=rng)[:30]
    groups = rollout.micro_batches(found, rows, max_rows, max_tokens)
    assert sorted(torch.cat(groups).tolist()) == sorted(rows.tolist())
    totals = [lengths.sum(1)[group] for group in groups]
    assert all(len(total) <= max_rows and (len(total) * total.max() <= max_tokens or len(total) == 1) for total in totals)
    assert torch.equal(torch.cat(totals), torch.cat(totals).sort(descending=True).values)
    padded, needed = sum(len(total) * total.max() for total in totals), lengths.sum(1)[rows].sum()
    assert padded < 1.2 * needed
    assert max_tokens < 10**6 or max_rows > 3 or len(groups) <= -(-30 // max_rows) + 6


def test_small_micro_batches_stay_together_whatever_their_lengths():
    found = rollout.Rollout(*[torch.zeros(4, 2)] * 3, torch.zeros(4, 1), torch.zeros(4), lengths=torch.tensor([[20, 20], [1, 1], [10, 5], [3, 3]]))
    assert [group.tolist() for group in rollout.micro_batches(found, torch.arange(4), 64, 4096)] == [[0, 2, 3, 1]]


# ---- verifiers

MATH = [  # (completion, answer column, right)
    ("The answer is 72.", "72", True), ("72", "72", True), ("so 48 + 24 = 72 clips", "72", True), ("71", "72", False), ("", "72", False),
    ("no idea", "72", False), ("First 72, then 71", "72", False), ("#### 1,234", "1234", True), ("1,234,567", "1234567", True),
    ("$18", "18", True), ("18 dollars", "$18", True), ("It costs $1,000.50.", "1000.5", True), ("3.50", "3.5", True), ("-4", "-4", True),
    ("\u22124", "-4", True), ("4", "-4", False), ("7-4=3", "3", True), ("10 - -2 = 12", "12", True), ("x=-3.", "-3", True), ("50%", "50", True),
    ("12+7+40=19,59#59", "59", True), ("19,59#60", "59", False), ("0.50", "1/2", True), (".5", "0.5", True), ("1/0", "1", False),
    ("1/\u0660", "1", True), ("1e3", "1000", False), ("answer: 6 eggs", "6.0", True), ("12 3", "3", True), ("1,23", "23", True),
    ("\\boxed{42} and then 7", "42", True), ("\\boxed{41} \\boxed{42}", "42", True), ("\\boxed{\\text{42 apples}}", "42", True),
    ("\\boxed{}", "42", False), ("\\boxed{42", "42", True), ("\\boxed{x=5}", "5", True), ("\\boxed{5\\text{ cm}^2}", "5", True),
    ("\\boxed{90^\\circ}", "90", True), ("\\boxed{\\$32,\\!348}", "32348", True), ("10080", "10,\\!080", True), ("\\boxed{25\\%}", "25", True),
    ("\\boxed{\\frac{3}{4}}", "0.75", True), ("\\boxed{3/4}", "\\frac{3}{4}", True), ("\\boxed{\\dfrac43}", "\\frac{4}{3}", True),
    ("\\boxed{1\\frac{4}{5}}", "\\frac{9}{5}", True), ("\\boxed{1\\frac{4}{5}}", "\\frac{14}{5}", False), ("\\boxed{-\\frac{1}{2}}", "-0.5", True),
    ("\\boxed{3\\sqrt{2}}", "2", False), ("\\boxed{(1,2)}", "2", False), ("\\boxed{\\frac{a}{5}}", "5", False), ("\\boxed{12_5}", "5", False),
    ("\\boxed{10^{-3}}", "-3", False), ("\\boxed{3\\pi}", "3", False), ("\\boxed{2k}", "2", False),
    ("\\boxed{x + 1}", "1", False), ("\\boxed{x - 1}", "1", False), ("\\boxed{+5}", "5", True), ("\\boxed{x = +5}", "5", True),
    ("\\boxed{n > 3}", "3", False), ("\\boxed{60\\text{ km/h}}", "60", True), ("\\boxed{10-inch}", "10", True),
    ("the set [1,2]", "[1,2]", False), ("\\boxed{2^{10}}", "1024", True), ("\\boxed{1024}", "2^{10}", True), ("1024", "2^{10}", True),
    ("\\boxed{2^3!}", "8", False), ("\\boxed{5!}", "5", False), ("\\boxed{8 - x}", "8", False), ("\\boxed{x/8}", "8", False), ("\\boxed{3^2'}", "9", False),
    ("so 2^{10}", "2^{10}", True), ("so 2^{10}", "10", False), ("\\boxed{\\frac{2^3}{5}}", "8/5", True), ("\\boxed{3^2}", "9", True),
    ("\\boxed{2^{10}}", "20", False), ("\\boxed{2x^2}", "4", False), ("\\boxed{3^2x}", "9", False),
    ("\\boxed{2^{3^2}}", "8", False), ("\\boxed{12_5^2}", "25", False), ("\\boxed{5^{-1}}", "5", False), ("\\boxed{2^{10}}", "2^{10}", True),
    ("\\boxed{x^2+1}", "x^2 + 1", True), ("\\boxed{(3, \\pi/2)}", "\\left( 3, \\pi/2 \\right)", True), ("\\boxed{x^2}", "x^2+1", False),
    ("\\boxed{\\frac{\\pi}{2}}", "\\dfrac{\\pi}{2}", True), ("\\boxed{\\sqrt{2x}}", "\\sqrt{2}x", False), ("\\boxed{[1,2]}", "[1,2]", True),
    ("72", "He has <<48/2=24>>24\n#### 72", True), ("\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\2 \\end{pmatrix}", True),
]  # fmt: skip


@pytest.mark.parametrize("completion,answer,right", MATH)
def test_math_verifier(completion, answer, right):
    assert math_reward([""], [completion], [answer]) == [float(right)]
    assert math_reward([""], [[{"role": "assistant", "content": completion}]], [answer]) == [float(right)]


def test_math_reads_numeric_answer_columns():
    assert math_reward([""] * 2, ["5", "2.5"], [5, 2.5]) == [1.0, 1.0]


PIECES = ["(", "\\boxed{", "9", "1,111", "-", "\\frac{1}", "1/", "\\text{", "\\text{}^", "{", "}", " ", "\n", "A ", "(A", "answer ", "answer: a ", "is ",
          "option ", "\\frac{9}{", "2^", "2^{", "x=", ",", ".", ".5", "1 / ", "\\", "\\ ", "\\frac 1", "1\\frac{1}{2}", "\u2212", "$", "A*",
          "\\boxed{\\text{("]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_verifiers_are_linear_on_hostile_text(piece):
    """100 kB of one piece, bare, boxed, and with an end that does not match: none takes longer than a second, all together."""
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    for hostile in (text, f"\\boxed{{{text}}}", text + "!", "answer" + text + "x", "1" + text + "}"):
        for answer in ("42", "x^2", text[:1000]):
            math_reward([""], [hostile], [answer])
        choice_reward([""], [hostile], ["A"], [["one", "two"]])
        choice_reward([""], [hostile], ["1"], [{"text": ["one", "two"], "label": ["1", "2"]}])
    assert time.process_time() - start < 1.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.sampled_from(PIECES))
def test_verifiers_take_any_mixture_in_linear_time(mixture, end):
    """Random pieces in a row, repeated to 100 kB: a number for each, and soon."""
    text = "".join(mixture)
    hostile = text * (100_000 // len(text)) + end
    start = time.process_time()
    assert {*math_reward([""] * 2, [hostile, f"\\boxed{{{hostile}}}"], ["42"] * 2), *choice_reward([""], [hostile], ["A"], [["one", "two"]])} <= {0.0, 1.0}
    assert time.process_time() - start < 0.5


def test_nothing_of_the_models_text_is_evaluated():
    assert math_reward([""], ["__import__('os').abort()"], ["1"]) == [0.0]
    assert last_number("9**9**9**9") == 9
    assert boxed("a \\boxed{b {c} d} e") == "b {c} d" and boxed("none") is None


CHOICES = ["a leg muscle", "a bacterial population", "viral particles", "carbohydrates"]
CHOICE = [
    ("B", "B"), ("b", "B"), ("B.", "B"), ("(B)", "B"), ("B) a bacterial population", "B"), ("The answer is B.", "B"), ("Answer: C", "C"),
    ("**B**", "B"), ("The correct answer is (D) because A is wrong", "D"), ("a bacterial population", "B"), ("It is viral particles.", "C"),
    ("A leg muscle relaxing", "A"), ("A plant grows", None), ("E", None), ("", None), ("viral particles or carbohydrates", None),
    ("I think it's a bacterial population", "B"), ("B: yes", "B"), ("the answer is a", None), ("The answer is A's friend", None),
    ("The answer is option C.", "C"), ("Option A", "A"), ("A is correct.", "A"), ("The answer is \\boxed{C}", "C"), ("Answer: c", "C"),
    ("D\n\nBecause it is", "D"), ("The answer would be C", "C"), ("To answer: A person rubs", None), ("The answer is A because it is", "A"),
    ("Answer: D. Explanation: The answer A is wrong", "D"), ("The answer is **C**", "C"),
]  # fmt: skip


@pytest.mark.parametrize("text,letter", CHOICE)
def test_choice_verifier(text, letter):
    assert chosen_letter(text, CHOICES) == letter
    assert choice_reward([""], [text], ["B"], [CHOICES]) == [float(letter == "B")]


def test_choices_as_the_hub_has_them_and_numbers():
    assert choice_reward([""], ["D"], ["D"], [{"text": CHOICES, "label": list("ABCD")}]) == [1.0]
    assert choice_reward([""] * 2, ["B", "it is 7"], ["B", "A"], [None, [7, 8]]) == [1.0, 1.0]
    numbered = {"text": CHOICES, "label": list("1234")}
    said = ["3", "The answer is 3.", "(2)", "C", CHOICES[2], "D", "30"]
    assert choice_reward([""] * 7, said, ["3"] * 7, [numbered] * 7) == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    metres = {"text": ["4 meters", "6 meters", "2 meters", "9 meters"], "label": list("1234")}
    said = ["The answer is 2 meters.", "The answer is 2.", "2 meters", "\\boxed{3}", "The answer is 3.5", "1. Light.\n2. So it is 2 meters."]
    assert choice_reward([""] * 6, said, ["3"] * 6, [metres] * 6) == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def test_choice_without_a_choices_column_and_exact():
    assert choice_reward(["", ""], ["The answer is C", "D"], ["C", "A"]) == [1.0, 0.0]
    assert exact_reward(["", ""], [" a  b ", "a"], ["a b", "b"]) == [1.0, 0.0]


# ---- reward functions


def test_columns_reach_the_reward_and_conversations_stay_conversations():
    seen = {}

    def reward(prompts, completions, level, **columns):
        seen.update(prompts=prompts, completions=completions, level=level, others=columns)
        return [True, 0]

    prompts = ["text", [{"role": "user", "content": "hi"}]]
    assert score(reward, {"prompt": prompts, "level": [1, 2], "more": ["x", "y"]}, ["a", "b"]).tolist() == [1.0, 0.0]
    assert seen["completions"] == ["a", [{"role": "assistant", "content": "b"}]] and seen["level"] == [1, 2] and seen["others"] == {"more": ["x", "y"]}


@pytest.mark.parametrize(
    "returned,found",
    [([1.0], "1 values"), (1.0, "float"), (None, "NoneType"), ([1.0, float("nan")], "row 1.*nan"), ([float("inf"), 0], "row 0.*inf"),
     ([0, "1.0"], "row 1.*'1.0'"), ([0, None], "row 1.*None"), ([0, [1]], r"row 1.*\[1\]"),
     ([1e39, 0], "row 0.*1e.39"), ([0, 10**400], "row 1"), (torch.tensor(1.0), "Tensor"), ("ab", "str")],
)  # fmt: skip
def test_bad_reward_values_are_one_line_with_the_row(returned, found):
    with pytest.raises(InputError, match=f"--reward: .*{found}"):
        score(lambda prompts, completions, **columns: returned, {"prompt": ["p", "q"]}, ["a", "b"])


def test_rewards_may_be_tensors_and_a_missing_column_is_named():
    assert score(lambda prompts, completions, **columns: torch.tensor([0.5, 2.0]), {"prompt": ["p", "q"]}, ["a", "b"]).tolist() == [0.5, 2.0]
    with pytest.raises(InputError, match="--reward: it raised ZeroDivisionError"):
        score(lambda prompts, completions, **columns: [1 / 0], {"prompt": ["p"]}, ["a"])
    assert score(lambda prompts, completions, **columns: [len(columns)], {"prompt": ["p"], "completions": [1], "prompts": [2]}, ["a"]).tolist() == [0.0]
    with pytest.raises(InputError, match="needs the column 'answer'; the data set has level"):
        score(math_reward, {"prompt": ["p"], "level": [1]}, ["a"])


def test_plain_numbers_of_any_kind_are_scores():
    values = [True, 1, 0.5, numpy.float32(0.25), numpy.int64(2), numpy.bool_(False), torch.tensor(3.0), torch.tensor([4]), numpy.array(5.0), Fraction(1, 2)]
    expected = [1, 1, 0.5, 0.25, 2, 0, 3, 4, 5, 0.5]
    batch, texts = {"prompt": ["p"] * len(values)}, ["a"] * len(values)
    for returned in (values, tuple(values)):
        assert score(lambda prompts, **columns: returned, batch, texts).tolist() == expected  # noqa: B023
    for returned in (numpy.array(expected), numpy.array(expected, dtype=object), torch.tensor(expected, dtype=torch.float64)):
        assert score(lambda prompts, **columns: returned, batch, texts).tolist() == expected  # noqa: B023


@pytest.mark.parametrize("prompt", ["how many", [{"role": "user", "content": "how \n many"}]])
def test_a_score_that_is_no_number_is_named_with_its_prompt(prompt):
    with pytest.raises(InputError, match="--reward: row 1 of the batch, 'how many': expected a finite number, found 'nan'"):
        score(lambda prompts, **columns: [1, math.nan], {"prompt": ["p", prompt]}, ["a", "b"])


def test_what_a_reward_raises_is_named_with_its_file_and_line():
    def reward(prompts, level, **columns):
        return [1 / value for value in level]

    line = reward.__code__.co_firstlineno + 1
    with pytest.raises(InputError, match=rf"--reward: it raised ZeroDivisionError: .* \(test_rollout.py, line {line}[,)]"):
        score(reward, {"prompt": ["p", "q", "r", "s"], "level": [1, 2, 0, 0]}, ["a"] * 4)


def test_load_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text("def short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n")
    assert load_reward("my_reward:short")(["p"], ["abc"]) == [-3]
    assert load_reward("math") is math_reward
    (tmp_path / "broken.py").write_text("def f(:\n")
    for wrong in ("maths", "my_reward:long", "broken:f", "my_reward:__name__", "no_such_module:f", ":f", "model:", "model:/no/such/folder"):
        with pytest.raises(InputError, match="--reward"):
            load_reward(wrong)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_model_reward_reads_the_last_real_token_whatever_the_batch(tmp_path, num_labels):
    torch.manual_seed(0)
    tokenizer = task_tokenizer("dialogue")
    tokenizer.chat_template = None
    config = LlamaConfig(**{**tiny_config("llama", len(tokenizer)).to_dict(), "num_labels": num_labels, "pad_token_id": 0})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(f"model:{tmp_path}")
    prompts, completions = ["area north", [{"role": "user", "content": "food thai food greek"}]], ["ok", [{"role": "assistant", "content": "book book book"}]]
    together = score(reward, {"prompt": prompts}, ["ok", "book book book"])
    alone = [reward([prompt], [completion])[0] for prompt, completion in zip(prompts, completions)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert num_labels == 1 or all(0 < value < 1 for value in alone)
    assert len(reward(["area north"], ["food " * 200])) == 1  # longer than the model's context: its start is cut


def test_a_causal_lm_is_no_reward_model(model_folder):
    with pytest.raises(InputError, match="--reward: .*expected a sequence classifier, found GPT2LMHeadModel"):
        load_reward(f"model:{model_folder}")


# ---- noise


def test_flips_have_their_own_rates_and_noise_is_seeded():
    scores = torch.cat([torch.zeros(20_000), torch.ones(20_000)])
    noisy = noisy_scores(scores, 0.1, 0.3, (0.0, 0.0), torch.Generator().manual_seed(0))
    assert noisy[:20_000].mean().item() == pytest.approx(0.1, abs=0.01) and noisy[20_000:].mean().item() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(noisy, noisy_scores(scores, 0.1, 0.3, (0.0, 0.0), torch.Generator().manual_seed(0)))
    assert not torch.equal(noisy, noisy_scores(scores, 0.1, 0.3, (0.0, 0.0), torch.Generator().manual_seed(1)))
    assert torch.equal(scores, noisy_scores(scores, 0.0, 0.0, (0.0, 0.0), torch.Generator()))
    assert torch.equal(1 - scores, noisy_scores(scores, 1.0, 1.0, (0.0, 0.0), torch.Generator()))


def test_outliers_are_a_negative_tail():
    noisy = noisy_scores(torch.zeros(40_000), 0.0, 0.0, (0.3, 2.0), torch.Generator().manual_seed(0))
    assert (noisy < 0).float().mean().item() == pytest.approx(0.3, abs=0.01) and noisy.min() >= -2 and noisy.max() == 0
    assert noisy.mean().item() == pytest.approx(-0.3, abs=0.01)


def test_noise_does_not_depend_on_the_scores_and_flips_need_0_or_1():
    a, b = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    noisy_scores(torch.zeros(9), 0.2, 0.2, (0.1, 1.0), a), noisy_scores(torch.ones(9), 0.0, 0.0, (0.0, 0.0), b)
    assert torch.equal(a.get_state(), b.get_state())
    with pytest.raises(InputError, match="--reward-noise-fp.*0.5 in row 1"):
        noisy_scores(torch.tensor([1.0, 0.5]), 0.1, 0.0, (0.0, 0.0), torch.Generator())


def test_offsets_depend_on_the_prompt_alone_and_span_the_scale():
    rows = task_rows("dialogue", "train", 500, 0)
    tokenizer = task_tokenizer("dialogue")
    ids = encode_prompts([row["prompt"] for row in rows], tokenizer)
    offsets = prompt_offsets(ids, 3.0, len(tokenizer), 0)
    assert 0 <= offsets.min() and offsets.max() <= 3 and offsets.std() > 0.7
    assert torch.equal(prompt_offsets(ids[5:9], 3.0, len(tokenizer), 0), offsets[5:9]) and prompt_offsets([ids[0]] * 2, 1.0, 40, 1).diff() == 0
    assert not torch.equal(prompt_offsets(ids, 3.0, len(tokenizer), 1), offsets)
    words = torch.zeros(500, len(tokenizer))
    for row, prompt in enumerate(ids):
        words[row, prompt] = 1.0
    pairs = (words[:, :, None] * words[:, None, :]).flatten(1)  # pairs of words predict most of it, on prompts not seen too
    weights = torch.linalg.solve(pairs[:400].T @ pairs[:400] + torch.eye(pairs.shape[1]), pairs[:400].T @ offsets[:400, None])
    assert (pairs[400:] @ weights - offsets[400:, None]).var() < 0.5 * offsets[400:].var()


def test_pseudo_labels_are_wrong_for_a_fixed_share():
    answers = [str(i % 7) for i in range(1000)]
    labels = pseudo_labels(answers, 0.3, torch.Generator().manual_seed(0))
    assert sum(a != b for a, b in zip(answers, labels)) == 300
    assert labels == pseudo_labels(answers, 0.3, torch.Generator().manual_seed(0)) and set(labels) <= set(answers)
    assert pseudo_labels(answers, 0.0, torch.Generator()) == answers
    with pytest.raises(InputError, match="--pseudo-label-noise"):
        pseudo_labels(["same"] * 3, 0.5, torch.Generator())


def test_tasks_need_no_json_tricks():
    """Rows survive json, as a data file of one's own would hold them."""
    row = task_row("dialogue", "train", random.Random(0))
    assert json.loads(json.dumps(row)) == row

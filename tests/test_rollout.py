"""rollout.py: masks, log-probs against samples, one layout, and every way to get them wrong."""

import pytest
import torch
from conftest import favour, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import rollout
from critic import QuantileCritic
from rollout import (
    Rollout,
    assemble,
    completion_texts,
    in_micro_batches,
    padded,
    response_logprobs,
    response_quantiles,
    sample,
    token_logprobs,
)

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [13, 14]]  # ragged: left padding


def rolled(model, stop_ids=(1,), temperature=1.0, length=8, pad_id=0, prompts=PROMPTS, seed=0):
    torch.manual_seed(seed)
    return sample(model, prompts, pad_id, list(stop_ids), length, temperature)


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
    assert found.position_ids[1, :6].tolist() == [0, 0, 0, 0, 0, 0] and found.position_ids[
        2, :6
    ].tolist() == [0, 1, 2, 3, 4, 5]
    last = found.attention_mask.sum(1) - 1
    assert torch.equal(found.position_ids.max(1).values, last)


def test_greedy_takes_the_likeliest_token_and_leaves_the_generator_alone(model):
    model.eval()
    state = torch.get_rng_state()
    found = sample(model, PROMPTS, 0, [1], 5, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    logits = model(
        found.input_ids, attention_mask=found.attention_mask, position_ids=found.position_ids
    ).logits[:, 5:-1]
    assert torch.equal(logits.argmax(-1)[found.mask], found.response_ids[found.mask])


def test_texts_drop_stop_and_special_tokens(model_folder):
    """A custom stop token is an ordinary word: it ends the response and is not part of the answer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    thai, book = tokenizer.convert_tokens_to_ids(["thai", "book"])
    found = rollout.Rollout(torch.tensor([[5, thai, 4, book, thai]]), torch.tensor([[1, 1, 1, 1, 0]]), torch.arange(5)[None],
                            torch.tensor([[1, 1, 1, 0]]).bool(), torch.tensor([False]))
    assert completion_texts(found, tokenizer, [1, book]) == ["thai"]
    assert completion_texts(found, tokenizer, [1]) == ["thai book"]


def test_the_models_own_generation_settings_do_not_shape_the_samples(model):
    """A repetition penalty, top-k or minimum length in the model's file would make log-probs those of another distribution."""
    plain = rolled(model)
    own = GenerationConfig(
        repetition_penalty=5.0,
        top_k=1,
        top_p=0.1,
        min_new_tokens=7,
        no_repeat_ngram_size=1,
        temperature=0.1,
        do_sample=True,
    )
    model.generation_config = own
    assert torch.equal(rolled(model).input_ids, plain.input_ids)
    assert model.generation_config is own


def test_generate_under_gradient_checkpointing_and_train_mode_keeps_its_cache(model):
    plain = rolled(model.eval())
    widths = []
    note_width = lambda module, args, kwargs: widths.append(
        (args[0] if args else kwargs["input_ids"]).shape[1]
    )
    model.base_model.register_forward_pre_hook(note_width, with_kwargs=True)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(rolled(model).input_ids, plain.input_ids)
    assert model.training and set(widths[1:]) == {
        1
    }  # one new token at a time: the cache holds the rest


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
    assert (
        found[torch.tensor([5, 1])].logprobs is None
        and sample(model, PROMPTS, 0, [1], 2, 0.0, record_logprobs=True).logprobs is None
    )
    torch.manual_seed(0)
    assert torch.equal(
        sample(model, PROMPTS * 8, 0, [1], 8, temperature).input_ids, found.input_ids
    )  # recording changes no sample


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
        ]).exp()
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
        assert (
            response_logprobs(model, part, 0.7)[part.mask] - old[row][found.mask[row]]
        ).abs().max() < 1e-5


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
    expected = [
        (torch.tensor([float(position)] + [0.0] * 39).log_softmax(-1)[0]).item()
        for position in (2, 3, 4, 5)
    ]
    assert response_logprobs(forward, found, 1.0)[0].tolist() == pytest.approx(expected, rel=1e-5)
    critic = lambda ids, attention, positions, columns: positions.gather(1, columns)[
        ..., None, None
    ].float()
    assert response_quantiles(critic, found)[0].flatten().tolist() == [2, 3, 4, 5]
    assert response_quantiles(critic, found, after_last=True)[0].flatten().tolist() == [
        2,
        3,
        4,
        5,
        6,
    ]


def test_logits_are_computed_at_response_positions_only(model):
    found, seen = rolled(model), []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.shape[1])
    )
    response_logprobs(model, found, 1.0)
    assert seen == [found.mask.shape[1]]


def by_hand():
    """Two rows, prompts of 1 and 3 tokens, responses of 3 and 1: five columns of padding in twelve."""
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [2, 3, 4, 9, 0, 0]])
    attention = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    return rollout.Rollout(
        ids, attention, (attention.cumsum(1) - 1).clamp(min=0), mask, torch.tensor([False, True])
    )


def test_right_alignment_leaves_no_padding_but_what_lengths_demand():
    ids, attention, positions, columns = rollout.right_aligned(by_hand())
    assert (
        ids.tolist() == [[5, 6, 7, 8], [2, 3, 4, 9]]
        and attention.all()
        and positions.tolist() == [[0, 1, 2, 3]] * 2
    )
    assert columns.tolist() == [
        [0, 1, 2, 3],
        [2, 3, 3, 3],
    ]  # before each response token, after the last, then nothing new
    longer = by_hand()
    longer.lengths[1, 1], longer.attention_mask[1, 4], longer.mask[1, 1] = 2, 1, True
    ids, attention, _, columns = rollout.right_aligned(longer)
    assert ids.tolist() == [[0, 5, 6, 7, 8], [2, 3, 4, 9, 0]] and attention.tolist() == [
        [0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]
    assert columns.tolist() == [[1, 2, 3, 4], [2, 3, 4, 4]]


@pytest.mark.parametrize("extra", [1, 5, 40])
def test_appended_pad_columns_change_no_logprob_and_no_value(model, extra):
    found = rolled(favour(model, 1, 1.0))
    pad = lambda x: torch.nn.functional.pad(x, (0, extra))
    wide = rollout.Rollout(
        pad(found.input_ids),
        pad(found.attention_mask),
        pad(found.position_ids),
        pad(found.mask),
        found.truncated,
    )
    old, new = (response_logprobs(model, x, 1.0) for x in (found, wide))
    assert (
        new.shape == wide.mask.shape
        and torch.equal(new[:, : old.shape[1]], old)
        and (new[~wide.mask] == 0).all()
    )
    critic = QuantileCritic(model.base_model, 2, 3)
    for after_last in (False, True):
        old, new = (response_quantiles(critic, x, after_last) for x in (found, wide))
        assert new.shape[1] == wide.mask.shape[1] + after_last and torch.equal(
            new[:, : old.shape[1]], old
        )
        assert (
            torch.equal(new[:, -1], old[:, -1]) or not after_last
        )  # behind a response: the state after its last token


def test_lengths_are_counted_from_the_attention_mask():
    assert by_hand().lengths.tolist() == [[1, 3], [3, 1]]
    assert by_hand()[torch.tensor([1])].input_ids.tolist() == [[2, 3, 4, 9]]


@pytest.mark.parametrize(
    "max_rows, max_tokens", [(1, 10**6), (3, 10**6), (100, 10**6), (100, 700), (100, 1)]
)
def test_micro_batches_are_a_partition_within_limits_and_of_similar_lengths(max_rows, max_tokens):
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 300, (40, 2), generator=rng)
    found = rollout.Rollout(
        torch.zeros(40, 2),
        torch.zeros(40, 2),
        torch.zeros(40, 2),
        torch.zeros(40, 1),
        torch.zeros(40),
        lengths=lengths,
    )
    rows = torch.randperm(40, generator=rng)[:30]
    groups = rollout.micro_batches(found, rows, max_rows, max_tokens)
    assert sorted(torch.cat(groups).tolist()) == sorted(rows.tolist())
    totals = [lengths.sum(1)[group] for group in groups]
    assert all(
        len(total) <= max_rows and (len(total) * total.max() <= max_tokens or len(total) == 1)
        for total in totals
    )
    assert torch.equal(torch.cat(totals), torch.cat(totals).sort(descending=True).values)
    padded, needed = sum(len(total) * total.max() for total in totals), lengths.sum(1)[rows].sum()
    assert padded < 1.2 * needed
    assert max_tokens < 10**6 or max_rows > 3 or len(groups) <= -(-30 // max_rows) + 6


def test_small_micro_batches_stay_together_whatever_their_lengths():
    found = rollout.Rollout(
        *[torch.zeros(4, 2)] * 3,
        torch.zeros(4, 1),
        torch.zeros(4),
        lengths=torch.tensor([[20, 20], [1, 1], [10, 5], [3, 3]]),
    )
    assert [
        group.tolist() for group in rollout.micro_batches(found, torch.arange(4), 64, 4096)
    ] == [[0, 2, 3, 1]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_logprobs_values_gradient_chunks_and_untouched_logits(temperature):
    torch.manual_seed(0)
    logits, ids = torch.randn(5, 3, 7, requires_grad=True), torch.randint(7, (5, 3))
    before = logits.detach().clone()
    expected = (logits / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    for chunk_size in (1, 42, 10**6):
        found = token_logprobs(logits, ids, temperature, chunk_size)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), logits)[0],
            torch.autograd.grad(expected.sum(), logits, retain_graph=True)[0],
        )
    assert torch.equal(logits.detach(), before)
    half = token_logprobs(logits.bfloat16(), ids, temperature)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_no_fp32_copy_of_bf16_logits_is_made_forward_or_backward(temperature):
    class LargestFloat(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.numel = max(self.numel, result.numel())
            return result

    logits, ids = torch.randn(4, 10, 50).bfloat16().requires_grad_(), torch.randint(50, (4, 10))
    for chunk_size, largest_numel in ((500, 500), (1, 50)):  # a token at a time at least
        with LargestFloat() as largest:
            token_logprobs(logits, ids, temperature, chunk_size).sum().backward()
        assert largest.numel == largest_numel and logits.grad.dtype == torch.bfloat16

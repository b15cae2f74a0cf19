"""rollout.py: masks, log-probs against samples, one layout, and every way to get them wrong."""

import dataclasses

import pytest
import torch
from common import favour
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from critic import QuantileCritic
from harness.setup import stop_token_ids
from rollout import (
    Rollout,
    assemble,
    completion_texts,
    in_micro_batches,
    micro_batches,
    response_logprobs,
    response_quantiles,
    sample,
    token_logprobs,
)
from tasks import InputError

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [13, 14]]  # ragged: left padding


def rolled(model, stop_ids=(1,), temperature=1.0, length=8, pad_id=0, prompts=PROMPTS, seed=0):
    torch.manual_seed(seed)
    return sample(model, prompts, pad_id, list(stop_ids), length, temperature)


def put_together(prompts, responses, masks=None, truncated=None):
    """assemble on the CPU, with pad id 0 and masks without gaps."""
    masks = masks or [[True] * len(ids) for ids in responses]
    return assemble(prompts, responses, masks, truncated or [False] * len(prompts), 0, "cpu")


def critic_of(model):
    """A critic with heads that tell states apart."""
    critic = QuantileCritic(model.base_model, 2, 3)
    torch.nn.init.normal_(critic.heads.weight, generator=torch.Generator().manual_seed(0))
    return critic


# ---- sampling


def test_mask_ends_with_the_first_stop_token_and_truncation_is_not_guessed_from_width(model):
    favour(model, 1, 2.0)
    found = rolled(model, length=8, prompts=PROMPTS * 8)
    for ids, mask, truncated in zip(found.response_ids, found.mask, found.truncated):
        length = mask.sum().item()
        stops = (ids[mask] == 1).nonzero().flatten().tolist()
        assert bool(truncated) == (not stops)
        assert stops == [length - 1] or (not stops and length == 8)
        assert mask[-length:].all()
    assert found.truncated.any() and not found.truncated.all()
    assert found.mask.sum(1)[~found.truncated].max() <= 8


def test_a_row_that_stops_on_the_last_slot_is_not_truncated(model):
    found = rolled(favour(model, 1, 100.0), length=1)
    assert found.mask.tolist() == [[True]] * 4 and not found.truncated.any()


@pytest.mark.parametrize("pad_id", [0, 1])
def test_pad_equal_to_eos_keeps_exactly_one_eos_in_mask_and_attention(model, pad_id):
    found = rolled(favour(model, 1, 2.5), pad_id=pad_id, prompts=PROMPTS * 4)
    for ids, mask in zip(found.response_ids, found.mask):
        assert (ids[mask] == 1).sum() <= 1
    prompts = torch.tensor([len(ids) for ids in PROMPTS * 4])
    assert torch.equal(found.attention_mask.sum(1), prompts + found.mask.sum(1))
    assert (found.mask & (found.response_ids == 1)).sum() == (~found.truncated).sum()
    assert 0 < found.truncated.sum() < 16


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
    with pytest.raises(InputError, match="--stop-token: 'no such'"):
        stop_token_ids(model, tokenizer, "no such")
    found = rolled(favour(model, book, 3.0), stop_ids=ids, prompts=PROMPTS * 4)
    ends = [row[mask][-1].item() for row, mask in zip(found.response_ids, found.mask)]
    assert book in ends
    assert all(end in ids for end, cut in zip(ends, found.truncated) if not cut)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("recorded", [False, True])
def test_logits_that_are_not_finite_end_no_process_and_leave_other_rows_alone(
    model, temperature, recorded
):
    """One row's logits broken from the second step on: a GPU would end the process."""
    torch.manual_seed(0)
    plain = sample(model, [[5, 6], [7, 8]], 0, [1], 4, temperature, recorded)
    steps = []

    def break_row(module, inputs, logits):
        steps.append(1)
        broken = torch.tensor([len(steps) > 1, False])
        return torch.where(broken[:, None, None], torch.nan, logits)

    model.get_output_embeddings().register_forward_hook(break_row)
    torch.manual_seed(0)
    found = sample(model, [[5, 6], [7, 8]], 0, [1], 4, temperature, recorded)
    assert len(steps) > 1
    assert found.response_ids[1][found.mask[1]].equal(plain.response_ids[1][plain.mask[1]])
    if found.logprobs is not None:
        assert found.logprobs[0].isnan().any() and found.logprobs[1].isfinite().all()


def test_greedy_takes_the_likeliest_token_and_leaves_the_generator_alone(model):
    model.eval()
    state = torch.get_rng_state()
    found = sample(model, PROMPTS, 0, [1], 5, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    inputs = {"attention_mask": found.attention_mask, "position_ids": found.position_ids}
    logits = model(found.input_ids, **inputs).logits[:, -found.mask.shape[1] - 1 : -1]
    assert torch.equal(logits.argmax(-1)[found.mask], found.response_ids[found.mask])


def test_texts_drop_stop_and_special_tokens(model_folder):
    """A custom stop token is an ordinary word: it ends a response and is no part of the answer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    thai, book = tokenizer.convert_tokens_to_ids(["thai", "book"])
    found = put_together([[5], [thai, thai, thai]], [[thai, 4, book], [book]])
    assert completion_texts(found, tokenizer, [1, book]) == ["thai", ""]
    assert completion_texts(found, tokenizer, [1]) == ["thai book", "book"]


def test_the_models_own_generation_settings_do_not_shape_the_samples(model):
    """A repetition penalty, top-k or minimum length would make log-probs another distribution's."""
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

    def note_width(module, args, kwargs):
        widths.append((args[0] if args else kwargs["input_ids"]).shape[1])

    model.base_model.register_forward_pre_hook(note_width, with_kwargs=True)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(rolled(model).input_ids, plain.input_ids)
    assert model.training
    assert set(widths[1:]) == {1}  # one new token at a time: the cache holds the rest


# ---- the layout


def test_every_rows_last_token_stands_in_the_last_column(model):
    """Ragged prompts and responses: what is in front of a row's tokens is padding, and no more."""
    prompts = PROMPTS * 4
    found = rolled(favour(model, 1, 1.5), prompts=prompts)
    assert len(set(found.mask.sum(1).tolist())) > 2
    assert found.lengths.device.type == "cpu"
    assert found.lengths[:, 1].tolist() == found.mask.sum(1).tolist()
    assert found.input_ids.shape[1] == found.lengths[:, 0].max()
    assert found.mask.shape[1] == found.lengths[:, 1].max()
    for row, (total, length) in enumerate(found.lengths.tolist()):
        assert total == len(prompts[row]) + length
        assert found.input_ids[row, -total:-length].tolist() == prompts[row]
        assert found.input_ids[row, :-total].tolist() == [0] * (found.input_ids.shape[1] - total)
        assert found.attention_mask[row].nonzero().flatten().tolist() == [
            *range(found.input_ids.shape[1] - total, found.input_ids.shape[1])
        ]
        assert found.mask[row, -length:].all() and not found.mask[row, :-length].any()


def test_recorded_logprobs_stand_where_their_tokens_do(model):
    torch.manual_seed(0)
    found = sample(favour(model, 1, 1.5), PROMPTS * 4, 0, [1], 8, 1.0, record_logprobs=True)
    assert found.logprobs.shape == found.mask.shape
    assert torch.equal(found.logprobs != 0, found.mask) and not found.mask.all()


def test_positions_count_real_tokens_only(model):
    found = rolled(favour(model, 1, 1.5))
    for row, (total, _) in enumerate(found.lengths.tolist()):
        assert found.position_ids[row, -total:].tolist() == list(range(total))
        assert not found.position_ids[row, :-total].any()


def by_hand():
    """Two rows of four tokens, prompts of 1 and 3, responses of 3 and 1."""
    return put_together([[5], [2, 3, 4]], [[6, 7, 8], [9]], truncated=[False, True])


def test_rows_of_one_length_have_no_padding_whatever_their_prompts():
    found = by_hand()
    assert found.input_ids.tolist() == [[5, 6, 7, 8], [2, 3, 4, 9]]
    assert found.attention_mask.all() and found.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert found.mask.tolist() == [[True] * 3, [False, False, True]]
    assert found.truncated.tolist() == [False, True] and found.lengths.tolist() == [[4, 3], [4, 1]]
    longer = put_together([[5], [2, 3, 4]], [[6, 7, 8], [9, 1]])
    assert longer.input_ids.tolist() == [[0, 5, 6, 7, 8], [2, 3, 4, 9, 1]]
    assert longer.attention_mask.tolist() == [[0, 1, 1, 1, 1], [1] * 5]
    assert longer.mask.tolist() == [[True] * 3, [False, True, True]]


def test_some_rows_lose_the_columns_on_the_left_that_none_of_them_needs():
    found = put_together([[5], [2, 3, 4], [2]], [[6, 7, 8], [9], [3]])
    part = found[torch.tensor([2, 1])]
    assert (
        part.input_ids.tolist() == [[0, 0, 2, 3], [2, 3, 4, 9]]
        and part.mask.tolist() == [[True]] * 2
    )
    assert part.lengths.tolist() == [[2, 1], [4, 1]]
    assert found[torch.tensor([2])].input_ids.tolist() == [[2, 3]]
    assert found[1:].mask.tolist() == [[True]] * 2


def test_gaps_in_a_mask_stay_where_they_are():
    found = put_together([[5], [2, 3]], [[6, 7, 8], [9]], [[True, False, True], [True]])
    assert found.mask.tolist() == [[True, False, True], [False, False, True]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert found.lengths.tolist() == [[4, 3], [3, 1]]


@pytest.mark.parametrize("extra", [1, 5, 40])
def test_pad_columns_on_the_left_change_no_logprob_and_no_value(model, extra):
    found = rolled(favour(model, 1, 1.0))
    wide = dataclasses.replace(
        found,
        input_ids=torch.nn.functional.pad(found.input_ids, (extra, 0)),
        attention_mask=torch.nn.functional.pad(found.attention_mask, (extra, 0)),
        mask=torch.nn.functional.pad(found.mask, (extra, 0)),
    )
    critic = critic_of(model)
    functions = {
        "log-probs": (lambda part: response_logprobs(model, part, 1.0), 0),
        "quantiles": (lambda part: response_quantiles(critic, part), 0),
        "after last": (lambda part: response_quantiles(critic, part, after_last=True), 1),
    }
    for name, (function, more) in functions.items():
        old, new = function(found), function(wide)
        assert new.shape[1] == wide.mask.shape[1] + more, name
        torch.testing.assert_close(new[:, extra:], old, rtol=0, atol=1e-5)
        assert torch.equal(function(wide[:]), old), name  # cut to what its rows need
    assert (response_logprobs(model, wide, 1.0)[~wide.mask] == 0).all()


def test_values_of_a_row_are_those_of_the_row_alone(model):
    """Log-probs, quantiles and the quantiles after the last token, ragged prompts and responses."""
    found = rolled(favour(model, 1, 1.5), prompts=PROMPTS * 4)
    critic = critic_of(model)
    with torch.no_grad():
        logprobs = response_logprobs(model, found, 1.0)
        before = response_quantiles(critic, found)
        quantiles = response_quantiles(critic, found, after_last=True)
        torch.testing.assert_close(quantiles[:, :-1], before, rtol=0, atol=1e-5)
        for row, (total, length) in enumerate(found.lengths.tolist()):
            ids = found.input_ids[row : row + 1, -total:]
            scored = model(ids).logits[:, -length - 1 : -1].log_softmax(-1)
            expected = scored.gather(-1, ids[:, -length:, None])[0, :, 0]
            torch.testing.assert_close(logprobs[row, -length:], expected, rtol=0, atol=1e-5)
            alone = critic(ids, torch.ones_like(ids), torch.arange(total)[None])[0, -length - 1 :]
            torch.testing.assert_close(quantiles[row, -length - 1 :], alone, rtol=0, atol=1e-4)


def test_values_that_differ_from_state_to_state_would_be_told_apart(model):
    """What the tests above compare is not one number all over."""
    quantiles = response_quantiles(critic_of(model), rolled(model), after_last=True)
    assert (quantiles[:, 1:] - quantiles[:, :-1]).abs().amin(dim=(2, 3)).median() > 0.01


# ---- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_recorded_logprobs_are_the_scored_ones(model, temperature):
    """What sampling drew from, against a forward pass with gradient; 0 off the mask."""
    favour(model, 1, 1.0 * temperature)
    torch.manual_seed(0)
    found = sample(model, PROMPTS * 8, 0, [1], 8, temperature, record_logprobs=True)
    assert 0 < found.truncated.sum() < 32 and not found.logprobs.requires_grad
    scored = response_logprobs(model.train(), found, temperature)
    assert (found.logprobs - scored)[found.mask].abs().max() < 1e-5
    assert (found.logprobs[~found.mask] == 0).all() and not found.mask.all()
    assert found[torch.tensor([5, 1])].logprobs is None
    assert sample(model, PROMPTS, 0, [1], 2, 0.0, record_logprobs=True).logprobs is None
    torch.manual_seed(0)
    again = sample(model, PROMPTS * 8, 0, [1], 8, temperature)
    assert torch.equal(again.input_ids, found.input_ids)  # recording changes no sample


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_frequencies_are_the_scored_probabilities(model, temperature):
    """6,000 one-token samples against exp(logprobs): within five standard errors for all tokens."""
    found = rolled(model, temperature=temperature, length=1, prompts=[[3, 4, 5]] * 6000)
    counts = torch.bincount(found.response_ids[:, 0], minlength=40)
    every = put_together([[3, 4, 5]] * 40, [[token] for token in range(40)])
    with torch.no_grad():
        expected = response_logprobs(model, every, temperature)[:, 0].exp()
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    error = (expected * (1 - expected) / 6000).sqrt() + 1e-4
    assert ((counts / 6000 - expected).abs() < 5 * error).all()


def test_ratio_is_1_before_any_update_under_ragged_left_padding(model):
    """Scored as one batch, then in micro-batches of other widths in train mode: within 1e-5."""
    found = rolled(favour(model, 1, 1.0), prompts=PROMPTS * 3)
    with torch.no_grad():
        old = response_logprobs(model, found, 0.7)
    model.train()
    for rows in torch.randperm(12).split(5):
        part = found[rows]
        new = response_logprobs(model, part, 0.7)
        assert new.requires_grad
        difference = (new - old[rows, -part.mask.shape[1] :])[part.mask]
        assert difference.abs().max() < 1e-5
    alone = [found[torch.tensor([row])] for row in range(12)]
    assert any(part.input_ids.shape[1] < found.input_ids.shape[1] for part in alone)
    for row, part in enumerate(alone):
        new = response_logprobs(model, part, 0.7)[part.mask]
        assert (new - old[row][found.mask[row]]).abs().max() < 1e-5


def test_left_padding_without_positions_is_what_the_ratio_test_would_catch(model, monkeypatch):
    """GPT-2 disagrees with positions that count padding; rotary models only see differences."""
    found = rolled(model)
    right = response_logprobs(model, found, 1.0)
    padding_counts = property(lambda part: torch.ones_like(part.input_ids).cumsum(1) - 1)
    monkeypatch.setattr(Rollout, "position_ids", padding_counts)
    wrong = (response_logprobs(model, found, 1.0) - right)[found.mask].abs().max()
    assert wrong > 1e-3 if model.config.model_type == "gpt2" else wrong < 1e-4


def test_logprobs_and_values_pair_token_t_with_the_position_before_it():
    """A model whose logits say where they were computed: token t is judged by the one before."""
    found = put_together([[3, 4, 5], [6, 7]], [[0] * 4, [0] * 2])

    def forward(input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        logits = torch.zeros(*input_ids.shape, 40)
        logits[..., 0] = position_ids  # the log-prob of token 0 grows with the position
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})

    def critic(input_ids, attention_mask, position_ids, last):
        return position_ids[:, -last:, None, None].float()

    logprobs = response_logprobs(forward, found, 1.0)
    for row, positions in enumerate(([2, 3, 4, 5], [1, 2])):
        logits = torch.tensor([[float(position)] + [0.0] * 39 for position in positions])
        expected = logits.log_softmax(-1)[:, 0].tolist()
        length = len(positions)
        assert logprobs[row, -length:].tolist() == pytest.approx(expected, rel=1e-5)
        values = response_quantiles(critic, found)[row, -length:]
        assert values.flatten().tolist() == positions
        values = response_quantiles(critic, found, after_last=True)[row, -length - 1 :]
        assert values.flatten().tolist() == [*positions, positions[-1] + 1]
    assert logprobs[1, :2].tolist() == [0, 0]


def test_logits_are_computed_at_response_positions_only(model):
    found = rolled(model)
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    response_logprobs(model, found, 1.0)
    assert seen == [found.mask.shape[1]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_logprobs_values_gradient_chunks_and_untouched_logits(temperature):
    torch.manual_seed(0)
    logits, ids = torch.randn(5, 3, 7, requires_grad=True), torch.randint(7, (5, 3))
    before = logits.detach().clone()
    expected = (logits / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    slope = torch.autograd.grad(expected.sum(), logits)[0]
    for chunk_size in (1, 42, 10**6):
        found = token_logprobs(logits, ids, temperature, chunk_size)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), logits)[0], slope)
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


# ---- micro-batches


def of_lengths(prompts, responses):
    """A rollout of prompts and responses of these lengths."""
    return put_together(
        [[2] * length for length in prompts], [[3] * length for length in responses]
    )


LIMITS = [(1, 10**6), (3, 10**6), (100, 10**6), (100, 700), (100, 1)]


@pytest.mark.parametrize("max_rows, max_tokens", LIMITS)
def test_micro_batches_are_a_partition_within_limits_and_of_similar_lengths(max_rows, max_tokens):
    rng = torch.Generator().manual_seed(0)
    found = of_lengths(*torch.randint(1, 300, (40, 2), generator=rng).T.tolist())
    rows = torch.randperm(40, generator=rng)[:30]
    groups = micro_batches(found, rows, max_rows, max_tokens)
    assert sorted(torch.cat(groups).tolist()) == sorted(rows.tolist())
    totals = [found.lengths[group, 0] for group in groups]
    for total in totals:
        assert len(total) <= max_rows
        assert len(total) * total.max() <= max_tokens or len(total) == 1
    assert torch.equal(torch.cat(totals), torch.cat(totals).sort(descending=True).values)
    with_padding = sum(len(total) * total.max() for total in totals)
    assert with_padding < 1.2 * found.lengths[rows, 0].sum()
    assert max_tokens < 10**6 or max_rows > 3 or len(groups) <= -(-30 // max_rows) + 6


def test_small_micro_batches_stay_together_whatever_their_lengths():
    found = of_lengths([20, 1, 10, 3], [20, 1, 5, 3])
    groups = micro_batches(found, torch.arange(4), 64, 4096)
    assert [group.tolist() for group in groups] == [[0, 2, 3, 1]]


@pytest.mark.parametrize("max_rows", [1, 3, 16])
def test_micro_batches_put_together_are_the_whole(model, max_rows):
    """Also with a column more than there are tokens; what is in front of a row is zero."""
    found = rolled(favour(model, 1, 1.5), prompts=PROMPTS * 4)
    critic = critic_of(model)
    for function, subject, option in (
        (response_logprobs, model, 1.0),
        (response_quantiles, critic, False),
        (response_quantiles, critic, True),
    ):
        with torch.no_grad():
            whole = function(subject, found, option)
            parts = in_micro_batches(function, subject, found, max_rows, 10**6, option)
        assert parts.shape == whole.shape
        for row, length in enumerate(found.lengths[:, 1].tolist()):
            used = length + whole.shape[1] - found.mask.shape[1]
            old, new = whole[row, -used:], parts[row, -used:]
            torch.testing.assert_close(new, old, rtol=0, atol=1e-4)
            assert max_rows > 1 or not parts[row, :-used].any()

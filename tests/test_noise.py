"""tasks/noise.py: rates, seeds, and independence of the scores."""

import zlib

import pytest
import torch

from tasks import InputError
from tasks.builtin import task_rows
from tasks.noise import model_scores, noisy_scores, pseudo_labels
from tasks.verifiers import choice_reward, exact_reward, math_reward

NO_OUTLIER = (0.0, 0.0)


def test_flips_have_their_own_rates_and_noise_is_seeded():
    scores = torch.cat([torch.zeros(20_000), torch.ones(20_000)])
    noisy, again, other = (
        noisy_scores(scores, 0.1, 0.3, NO_OUTLIER, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert noisy[:20_000].mean().item() == pytest.approx(0.1, abs=0.01)
    assert noisy[20_000:].mean().item() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(noisy, again) and not torch.equal(noisy, other)
    assert torch.equal(scores, noisy_scores(scores, 0.0, 0.0, NO_OUTLIER, torch.Generator()))
    assert torch.equal(1 - scores, noisy_scores(scores, 1.0, 1.0, NO_OUTLIER, torch.Generator()))


def test_outliers_are_a_negative_tail():
    generator = torch.Generator().manual_seed(0)
    noisy = noisy_scores(torch.zeros(40_000), 0.0, 0.0, (0.3, 2.0), generator)
    assert (noisy < 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert noisy.min() >= -2 and noisy.max() == 0
    assert noisy.mean().item() == pytest.approx(-0.3, abs=0.01)


def test_noise_does_not_depend_on_the_scores_and_flips_need_0_or_1():
    a, b = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    noisy_scores(torch.zeros(9), 0.2, 0.2, (0.1, 1.0), a)
    noisy_scores(torch.ones(9), 0.0, 0.0, NO_OUTLIER, b)
    assert torch.equal(a.get_state(), b.get_state())
    with pytest.raises(InputError, match="--reward-noise-fp.*found 0.5"):
        noisy_scores(torch.tensor([1.0, 0.5]), 0.1, 0.0, NO_OUTLIER, torch.Generator())


def test_a_judge_that_fails_gives_an_end_of_its_scale():
    generator = torch.Generator().manual_seed(0)
    noisy = noisy_scores(torch.ones(40_000), 0.0, 0.0, NO_OUTLIER, generator, (0.03, 5.0))
    for end in (-5, 5):
        assert (noisy == end).float().mean().item() == pytest.approx(0.015, abs=0.003)
    assert (noisy == 1).float().mean().item() == pytest.approx(0.97, abs=0.005)


def test_scores_in_a_column_meet_the_noise_of_scores_in_a_row():
    scores, noise = torch.tensor([0.0, 1.0, 1.0, 0.0]), (0.5, 0.5, (0.5, 3.0))
    row, column = (
        noisy_scores(own, *noise, torch.Generator().manual_seed(3), (0.3, 3.0))
        for own in (scores, scores.unsqueeze(1))
    )
    assert torch.equal(row, column.squeeze(1))


def test_a_reward_models_level_slope_and_noise_belong_to_the_domain():
    """Within a domain scores are a + b score + s N; the same a, b, s in every batch of a seed."""
    lines = []
    for seed in (0, 1):
        for domain in (3, 4):
            scores = torch.tensor([0.0, 1.0]).repeat_interleave(20_000)
            generator = torch.Generator().manual_seed(seed)
            noisy = model_scores(scores, [domain] * 40_000, 1.05, 7, generator)
            zeros, ones = noisy.chunk(2)
            assert zeros.std().item() == pytest.approx(ones.std().item(), rel=0.05)
            lines.append([zeros.mean(), ones.mean() - zeros.mean(), zeros.std()])
    lines = torch.tensor(lines)
    torch.testing.assert_close(lines[:2], lines[2:], rtol=0.1, atol=0.1)
    assert ((lines[0] - lines[1]).abs() > 0.1).all() and (lines[:, 1:] > 0).all()


def test_a_reward_model_ranks_right_above_wrong_as_often_as_its_docstring_says():
    """In one domain the mean of Phi(b / (s sqrt 2)) = 0.767; 0.675 by the same sum for two."""
    count = 20_000
    right, wrong = (
        model_scores(
            torch.full((count,), value),
            list(range(count)),
            1.05,
            0,
            torch.Generator().manual_seed(int(value)),
        )
        for value in (1.0, 0.0)
    )
    assert (right > wrong).float().mean().item() == pytest.approx(0.767, abs=0.015)
    assert (right > wrong.roll(1)).float().mean().item() == pytest.approx(0.675, abs=0.015)


def test_pseudo_labels_are_wrong_for_a_fixed_share():
    answers = [str(i % 7) for i in range(1000)]
    labels = drawn(exact_reward, 0.3, answers)
    assert sum(a != b for a, b in zip(answers, labels)) == 300
    assert labels == drawn(exact_reward, 0.3, answers) and set(labels) <= set(answers)
    assert drawn(exact_reward, 0.0, answers) == answers
    for same in (["same"] * 3, ["a b", "a  b"]):
        with pytest.raises(InputError, match="expected two different values of 'answer'"):
            drawn(exact_reward, 0.5, same)


def drawn(reward, share, answers, seed=0, **columns):
    generator = torch.Generator().manual_seed(seed)
    return pseudo_labels({"answer": answers, **columns}, reward, share, generator)


@pytest.mark.parametrize(
    "task,reward,seed,checksum",
    [
        ("dialogue", exact_reward, 0, 821343151),
        ("dialogue", exact_reward, 1, 1331809155),
        ("sums", math_reward, 0, 94391235),
        ("sums", math_reward, 1, 1821600635),
    ],
)
def test_the_labels_of_a_seed_stay_what_they_were(task, reward, seed, checksum):
    """Runs with wrong labels can be made again: these are the labels that e54154c drew."""
    answers = [row["answer"] for row in task_rows(task, "train", 512, 0)]
    labels = drawn(reward, 0.2, answers, seed)
    assert zlib.crc32("\n".join(labels).encode()) == checksum


SAME = {  # a column of answers, of which some mean the same
    math_reward: ["x #### 18", "18", "3.0", "3", "$3$", "x = 3", "1,000", "1000", "0.5", "1/2"],
    exact_reward: ["area north", "area  north", " area north", "food thai"],
}


@pytest.mark.parametrize("reward", SAME)
def test_a_wrong_label_is_wrong_as_the_verifier_reads_it(reward):
    """Said in so many words, the label is judged wrong under the right answer."""
    for seed in range(20):
        labels = drawn(reward, 1.0, SAME[reward], seed)
        said = [label.split("####")[-1] for label in labels]
        assert reward(None, said, answer=SAME[reward]) == [0.0] * len(said)
        assert reward(None, said, answer=labels) == [1.0] * len(said)


def test_what_has_no_wrong_label_is_refused():
    same, alone = {"answer": ["a b", "a  b"]}, {"answer": ["A"], "choices": [["ice"]]}
    rewards = {exact_reward: same, choice_reward: alone, math_reward: {"prompt": ["a"]}}
    for reward, columns in rewards.items():
        with pytest.raises(InputError, match="expected two different values of 'answer'"):
            pseudo_labels(columns, reward, 0.5, torch.Generator())


CHOICES = {
    "choices": [["ice", "12", "no"], ["12", "ice"], {"text": ["p", "q"], "label": ["1", "2"]}]
}


@pytest.mark.parametrize("answers", [["A", "B", "1"], ["ice", "ice", "P"], [0, 1, 1]])
def test_a_wrong_choice_is_another_option_of_the_row(answers):
    """Row 0 has three options, the others two, and texts that no other row has."""
    seen = set()
    for seed in range(30):
        labels = drawn(choice_reward, 1.0, answers, seed, **CHOICES)
        assert choice_reward(None, labels, answer=labels, **CHOICES) == [1.0] * 3
        assert choice_reward(None, labels, answer=answers, **CHOICES) == [0.0] * 3
        seen.add(labels[0])
    assert seen == {"B", "C"} and labels[1:] == ["A", "B"]
    assert drawn(choice_reward, 0.0, answers, **CHOICES) == ["A", "B", "A"]


def test_choices_without_options_are_those_of_other_rows():
    assert drawn(choice_reward, 1.0, ["A", "b", "A"]) == ["B", "A", "B"]


@pytest.mark.parametrize("choices", [[["ice", "12"], None], [None, ["ice", "12"]]])
def test_rows_without_options_beside_others_do_not_draw_for_ever(choices):
    with pytest.raises(InputError, match="expected two different values of 'answer'"):
        drawn(choice_reward, 1.0, ["A", "A"], choices=choices)
    assert drawn(choice_reward, 1.0, ["A", "B"], choices=choices) == ["B", "A"]


def test_a_rare_wrong_answer_is_found():
    answers = ["7"] * 5000 + ["8"]
    labels = drawn(math_reward, 0.0004, answers)
    assert sum(a != b for a, b in zip(answers, labels)) == 2

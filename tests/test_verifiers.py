"""tasks/verifiers.py: answers by hand, and hostile text in linear time."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.verifiers import (
    boxed,
    choice_reward,
    chosen_letter,
    exact_reward,
    last_number,
    math_reward,
)

MATH = [  # (completion, answer column, right)
    ("The answer is 72.", "72", True),
    ("72", "72", True),
    ("so 48 + 24 = 72 clips", "72", True),
    ("71", "72", False),
    ("", "72", False),
    ("no idea", "72", False),
    ("First 72, then 71", "72", False),
    ("#### 1,234", "1234", True),
    ("1,234,567", "1234567", True),
    ("$18", "18", True),
    ("18 dollars", "$18", True),
    ("It costs $1,000.50.", "1000.5", True),
    ("3.50", "3.5", True),
    ("-4", "-4", True),
    ("\u22124", "-4", True),
    ("4", "-4", False),
    ("7-4=3", "3", True),
    ("10 - -2 = 12", "12", True),
    ("x=-3.", "-3", True),
    ("50%", "50", True),
    ("12+7+40=19,59#59", "59", True),
    ("19,59#60", "59", False),
    ("0.50", "1/2", True),
    (".5", "0.5", True),
    ("1/0", "1", False),
    ("1/\u0660", "1", True),
    ("1e3", "1000", False),
    ("answer: 6 eggs", "6.0", True),
    ("12 3", "3", True),
    ("1,23", "23", True),
    ("\\boxed{42} and then 7", "42", True),
    ("\\boxed{41} \\boxed{42}", "42", True),
    ("\\boxed{\\text{42 apples}}", "42", True),
    ("\\boxed{}", "42", False),
    ("\\boxed{42", "42", True),
    ("\\boxed{x=5}", "5", True),
    ("\\boxed{5\\text{ cm}^2}", "5", True),
    ("\\boxed{90^\\circ}", "90", True),
    ("\\boxed{\\$32,\\!348}", "32348", True),
    ("10080", "10,\\!080", True),
    ("\\boxed{25\\%}", "25", True),
    ("\\boxed{\\frac{3}{4}}", "0.75", True),
    ("\\boxed{3/4}", "\\frac{3}{4}", True),
    ("\\boxed{\\dfrac43}", "\\frac{4}{3}", True),
    ("\\boxed{1\\frac{4}{5}}", "\\frac{9}{5}", True),
    ("\\boxed{1\\frac{4}{5}}", "\\frac{14}{5}", False),
    ("\\boxed{-\\frac{1}{2}}", "-0.5", True),
    ("\\boxed{3\\sqrt{2}}", "2", False),
    ("\\boxed{(1,2)}", "2", False),
    ("\\boxed{\\frac{a}{5}}", "5", False),
    ("\\boxed{12_5}", "5", False),
    ("\\boxed{10^{-3}}", "-3", False),
    ("\\boxed{3\\pi}", "3", False),
    ("\\boxed{2k}", "2", False),
    ("\\boxed{x + 1}", "1", False),
    ("\\boxed{x - 1}", "1", False),
    ("\\boxed{+5}", "5", True),
    ("\\boxed{x = +5}", "5", True),
    ("\\boxed{n > 3}", "3", False),
    ("\\boxed{60\\text{ km/h}}", "60", True),
    ("\\boxed{10-inch}", "10", True),
    ("the set [1,2]", "[1,2]", False),
    ("\\boxed{2^{10}}", "1024", True),
    ("\\boxed{1024}", "2^{10}", True),
    ("1024", "2^{10}", True),
    ("\\boxed{2^3!}", "8", False),
    ("\\boxed{5!}", "5", False),
    ("\\boxed{8 - x}", "8", False),
    ("\\boxed{x/8}", "8", False),
    ("\\boxed{3^2'}", "9", False),
    ("so 2^{10}", "2^{10}", True),
    ("so 2^{10}", "10", False),
    ("\\boxed{\\frac{2^3}{5}}", "8/5", True),
    ("\\boxed{3^2}", "9", True),
    ("\\boxed{2^{10}}", "20", False),
    ("\\boxed{2x^2}", "4", False),
    ("\\boxed{3^2x}", "9", False),
    ("\\boxed{2^{3^2}}", "8", False),
    ("\\boxed{12_5^2}", "25", False),
    ("\\boxed{5^{-1}}", "5", False),
    ("\\boxed{2^{10}}", "2^{10}", True),
    ("\\boxed{x^2+1}", "x^2 + 1", True),
    ("\\boxed{(3, \\pi/2)}", "\\left( 3, \\pi/2 \\right)", True),
    ("\\boxed{x^2}", "x^2+1", False),
    ("\\boxed{\\frac{\\pi}{2}}", "\\dfrac{\\pi}{2}", True),
    ("\\boxed{\\sqrt{2x}}", "\\sqrt{2}x", False),
    ("\\boxed{[1,2]}", "[1,2]", True),
    ("72", "He has <<48/2=24>>24\n#### 72", True),
    (
        "\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}",
        "\\begin{pmatrix} 1 \\\\2 \\end{pmatrix}",
        True,
    ),
]


@pytest.mark.parametrize("completion,answer,right", MATH)
def test_math_verifier(completion, answer, right):
    assert math_reward([""], [completion], [answer]) == [float(right)]
    assert math_reward([""], [[{"role": "assistant", "content": completion}]], [answer]) == [
        float(right)
    ]


def test_math_reads_numeric_answer_columns():
    assert math_reward([""] * 2, ["5", "2.5"], [5, 2.5]) == [1.0, 1.0]


PIECES = [
    "(",
    "\\boxed{",
    "9",
    "1,111",
    "-",
    "\\frac{1}",
    "1/",
    "\\text{",
    "\\text{}^",
    "{",
    "}",
    " ",
    "\n",
    "A ",
    "(A",
    "answer ",
    "answer: a ",
    "is ",
    "option ",
    "\\frac{9}{",
    "2^",
    "2^{",
    "x=",
    ",",
    ".",
    ".5",
    "1 / ",
    "\\",
    "\\ ",
    "\\frac 1",
    "1\\frac{1}{2}",
    "\u2212",
    "$",
    "A*",
    "\\boxed{\\text{(",
]


@pytest.mark.parametrize("piece", PIECES)
def test_verifiers_are_linear_on_hostile_text(piece):
    """100 kB of one piece, bare, boxed, with an end that does not match: together in a second."""
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    for hostile in (
        text,
        f"\\boxed{{{text}}}",
        text + "!",
        "answer" + text + "x",
        "1" + text + "}",
    ):
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
    assert {
        *math_reward([""] * 2, [hostile, f"\\boxed{{{hostile}}}"], ["42"] * 2),
        *choice_reward([""], [hostile], ["A"], [["one", "two"]]),
    } <= {0.0, 1.0}
    assert time.process_time() - start < 0.5


def test_nothing_of_the_models_text_is_evaluated():
    assert math_reward([""], ["__import__('os').abort()"], ["1"]) == [0.0]
    assert last_number("9**9**9**9") == 9
    assert boxed("a \\boxed{b {c} d} e") == "b {c} d" and boxed("none") is None


CHOICES = ["a leg muscle", "a bacterial population", "viral particles", "carbohydrates"]
CHOICE = [
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("B) a bacterial population", "B"),
    ("The answer is B.", "B"),
    ("Answer: C", "C"),
    ("**B**", "B"),
    ("The correct answer is (D) because A is wrong", "D"),
    ("a bacterial population", "B"),
    ("It is viral particles.", "C"),
    ("A leg muscle relaxing", "A"),
    ("A plant grows", None),
    ("E", None),
    ("", None),
    ("viral particles or carbohydrates", None),
    ("I think it's a bacterial population", "B"),
    ("B: yes", "B"),
    ("the answer is a", None),
    ("The answer is A's friend", None),
    ("The answer is option C.", "C"),
    ("Option A", "A"),
    ("A is correct.", "A"),
    ("The answer is \\boxed{C}", "C"),
    ("Answer: c", "C"),
    ("D\n\nBecause it is", "D"),
    ("The answer would be C", "C"),
    ("To answer: A person rubs", None),
    ("The answer is A because it is", "A"),
    ("Answer: D. Explanation: The answer A is wrong", "D"),
    ("The answer is **C**", "C"),
]


@pytest.mark.parametrize("text,letter", CHOICE)
def test_choice_verifier(text, letter):
    assert chosen_letter(text, CHOICES) == letter
    assert choice_reward([""], [text], ["B"], [CHOICES]) == [float(letter == "B")]


def test_choices_as_the_hub_has_them_and_numbers():
    assert choice_reward([""], ["D"], ["D"], [{"text": CHOICES, "label": list("ABCD")}]) == [1.0]
    assert choice_reward([""] * 2, ["B", "it is 7"], ["B", "A"], [None, [7, 8]]) == [1.0, 1.0]
    numbered = {"text": CHOICES, "label": list("1234")}
    said = ["3", "The answer is 3.", "(2)", "C", CHOICES[2], "D", "30"]
    assert choice_reward([""] * 7, said, ["3"] * 7, [numbered] * 7) == [
        1.0,
        1.0,
        0.0,
        1.0,
        1.0,
        0.0,
        0.0,
    ]
    metres = {"text": ["4 meters", "6 meters", "2 meters", "9 meters"], "label": list("1234")}
    said = [
        "The answer is 2 meters.",
        "The answer is 2.",
        "2 meters",
        "\\boxed{3}",
        "The answer is 3.5",
        "1. Light.\n2. So it is 2 meters.",
    ]
    assert choice_reward([""] * 6, said, ["3"] * 6, [metres] * 6) == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def test_choice_without_a_choices_column_and_exact():
    assert choice_reward(["", ""], ["The answer is C", "D"], ["C", "A"]) == [1.0, 0.0]
    assert exact_reward(["", ""], [" a  b ", "a"], ["a b", "b"]) == [1.0, 0.0]

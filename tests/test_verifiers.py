"""tasks/verifiers.py: answers by hand, and hostile text in linear time."""

import re
import signal
import time
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from common import own, refused, rows_of, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import InputError
from tasks.verifiers import (
    assert_readable,
    choice_reward,
    chosen_letter,
    exact_reward,
    final_number,
    math_reward,
    options_of,
    right_letter,
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
    ("1/\u0660", "1", False),
    ("1e3", "1000", True),
    ("answer: 6 eggs", "6.0", True),
    ("12 3", "3", False),
    ("1,23", "23", True),
    ("\\boxed{42} and then 7", "42", True),
    ("\\boxed{41} \\boxed{42}", "42", False),
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
    ("\\boxed{x^2}", "x^2+1", False),
    ("\\boxed{\\sqrt{2x}}", "\\sqrt{2}x", False),
    ("72", "He has <<48/2=24>>24\n#### 72", True),
    ("He has <<48/2=24>>24", "24", True),
    # Whole numbers, as they are and with separators.
    (r"In 4 steps: $\boxed{-307}$.", "-307", True),
    (r"\boxed{3,075}", "3075", True),
    (r"\boxed{3{,}075}", "3075", True),
    (r"\boxed{3\,075}", "3075", True),
    (r"\boxed{3,\!075}", "3075", True),
    (r"\boxed{13,\! 075}", "13075", True),
    (r"\boxed{3 075}", "3075", True),
    ("\\boxed{3\u2009075}", "3075", True),
    ("\\boxed{-3\u202f075\u202f000}", "-3075000", True),
    (r"\boxed{3,07}", "3075", False),
    (r"\boxed{3,0755}", "30755", False),
    (r"\boxed{307, 5}", "3075", False),
    (r"\boxed{30755}", r"3,\!075", False),
    (r"\boxed{\$3075}", r"3,\!075", True),
    (r"\boxed{3075}", r"\$3,\!075", True),
    (r"\boxed{7.45}", r"\$7.45", True),
    (r"\boxed{7.451}", r"\$7.45", False),
    # Decorated.
    (r"\boxed{88.}", "88", True),
    (r"\boxed{ 88 }", "88", True),
    (r"\boxed{\text{88}}", "88", True),
    (r"\boxed{\mathbf{88}}", "88", True),
    (r"\boxed{t = 88}", "88", True),
    (r"\boxed{f(3) = 88}", "88", True),
    (r"\boxed{\angle ABC = 88^\circ}", "88", True),
    (r"\boxed{88\text{ kg}}", "88", True),
    (r"\boxed{88 \text{ cubic units}}", "88", True),
    (r"\boxed{88\ \mathrm{m}}", "88", True),
    (r"\boxed{88\mbox{ cm}^2}", "88", True),
    (r"\boxed{88 km/h}", "88", True),
    (r"\boxed{88^{\circ}\text{C}}", "88", True),
    (r"\boxed{\boxed{88}}", "88", True),
    (r"\boxed{$88$}", "88", True),
    (r"\boxed{+88}", "88", True),
    (r"\boxed{- 88}", "-88", True),
    (r"\boxed{88.00}", "88", True),
    (r"\boxed{\left(88\right)}", "88", True),
    (r"\boxed{|-88|}", "88", True),
    (r"\boxed{|-88|}", "-88", False),
    # Something else.
    (r"\boxed{88x}", "88", False),
    (r"\boxed{88xy}", "88", False),
    (r"\boxed{\sqrt{88}}", "88", False),
    (r"\boxed{88\pi}", "88", False),
    (r"\boxed{88^2}", "88", False),
    (r"\boxed{88!}", "88", False),
    (r"\boxed{(88, 89)}", "88", False),
    (r"\boxed{88, 89}", "88", False),
    (r"\boxed{\{88, 89\}}", "88", False),
    (r"\boxed{\pm 88}", "88", False),
    (r"\boxed{n \ge 88}", "88", False),
    (r"\boxed{88 \text{ or } 89}", "88", False),
    (r"\boxed{88 \text{ and } 89}", "88", False),
    (r"\boxed{-88}", "88", False),
    (r"\boxed{880}", "88", False),
    (r"\boxed{\frac{1}{88}}", "88", False),
    (r"\boxed{88i}", "88", False),
    (r"\boxed{88.5}", "88", False),
    (r"\boxed{88...}", "88", False),
    (r"\boxed{88:89}", "88", False),
    (r"\boxed{88 + k}", "88", False),
    (r"\boxed{80 + 8}", "89", False),
    (r"\boxed{88_9}", "88", False),
    (r"\boxed{88 \text{ mod } 9}", "88", False),
    (r"\boxed{x^2 = 88}", "88", False),
    (r"\boxed{2x = 88}", "88", False),
    (r"\boxed{x = 1, y = 88}", "88", False),
    # The variable of an answer that names one.
    (r"\boxed{x=5}", "x=5", True),
    (r"\boxed{5}", "x = 5", True),
    (r"\boxed{y=5}", "x=5", False),
    ("So $y = 5$.", "x=5", False),
    # Equations.
    (r"\boxed{81+7 = 88}", "88", True),
    (r"\boxed{2\cdot 88 - 88 = 88}", "88", True),
    (r"\boxed{88 - 7 = 81}", "88", False),
    ("5 x 3 = 15", "15", True),
    # Fractions.
    (r"\boxed{\tfrac{7}{4}}", r"\frac{7}{4}", True),
    (r"\boxed{\frac{21}{12}}", r"\frac{7}{4}", True),
    (r"\boxed{ \frac {7} {4}}", r"\frac{7}{4}", True),
    (r"\boxed{\frac{7}{4} \text{ units}}", r"\frac{7}{4}", True),
    (r"\boxed{x = \frac{7}{4}}", r"\frac{7}{4}", True),
    (r"\boxed{\frac7{4}}", r"\frac{7}{4}", True),
    (r"\boxed{\frac{7}4}", r"\frac{7}{4}", True),
    (r"\boxed{\frac 74}", r"\frac{7}{4}", True),
    (r"\boxed{1.750}", r"\frac{7}{4}", True),
    (r"\boxed{1\frac{3}{4}}", r"\frac{7}{4}", True),
    (r"\boxed{1 3/4}", r"1\frac{3}{4}", True),
    (r"\boxed{\frac{-7}{4}}", r"-\frac{7}{4}", True),
    (r"\boxed{-1\frac{3}{4}}", r"-\frac{7}{4}", True),
    (r"\boxed{-1\frac{3}{4}}", r"-\frac{1}{4}", False),
    (r"\boxed{\frac{4}{7}}", r"\frac{7}{4}", False),
    (r"\boxed{-\frac{7}{4}}", r"\frac{7}{4}", False),
    (r"\boxed{74}", r"\frac{7}{4}", False),
    (r"\boxed{\frac{7}{4}x}", r"\frac{7}{4}", False),
    (r"\boxed{0.57}", r"\frac{4}{7}", False),
    (r"\boxed{7/4}", r"1\frac{7}{4}", False),
    (r"\boxed{\frac{3}{4}}", r"1\frac{3}{4}", False),
    (r"\boxed{0.0004}", ".0004", True),
    (r"\boxed{4e-4}", ".0004", True),
    # Powers of ten.
    (r"\boxed{2.93\times 10^{-11}}", r"2.93 \times 10^{-11}", True),
    (r"\boxed{2.93 \cdot 10^{-11}}", r"2.93 \times 10^{-11}", True),
    (r"\boxed{2.93E-11}", r"2.93 \times 10^{-11}", True),
    (r"\boxed{29.3\times 10^{-12} \text{ Hz}}", r"2.93 \times 10^{-11}", True),
    (r"\boxed{2.930 × 10^{-11}\ \mathrm{erg\,s^{-1}}}", r"2.93 \times 10^{-11}", True),
    (r"\boxed{2.93\times 10^{-11} W/m^2}", "2.93e-11", True),
    ("The answer is 2.93 x 10^-11 m.", "2.93e-11", True),
    (r"\boxed{10^{-5}}", "1e-5", True),
    (r"\boxed{0.00001}", "1e-5", True),
    (r"\boxed{17,000}", "1.70e4", True),
    (r"\boxed{5.1e14}", r"5.1 \times 10^{14} Hz", True),
    (r"\boxed{2.93\times 10^{-10}}", r"2.93 \times 10^{-11}", False),
    (r"\boxed{2.93\times 10^{11}}", r"2.93 \times 10^{-11}", False),
    (r"\boxed{-2.93\times 10^{-11}}", r"2.93 \times 10^{-11}", False),
    (r"\boxed{2.93}", r"2.93 \times 10^{-11}", False),
    (r"\boxed{0}", r"2.93 \times 10^{-11}", False),
    (r"\boxed{-5}", "1e-5", False),
    (r"\boxed{10^(10^9)}", "10", False),
    (r"\boxed{10^{10^9}}", "10", False),
    # Without a box.
    ("**Answer:** 513", "513", True),
    ("Answer: $513$", "513", True),
    ("So the final answer is $x = 513$.", "513", True),
    ("Therefore, there are **513** ways.", "513", True),
    (r"The final answer is \(513\). I hope it is correct.", "513", True),
    (r"\boxed {513}", "513", True),
    (r"$\fbox{513}$", "513", True),
    ("The answer is 513. This used step 3 of 4.", "513", True),
    ("The answer is 513, not 510.", "513", True),
    ("The answer is 513, not 510.", "510", False),
    ("It is 513, not $510$.", "513", True),
    ("The answer is not 510. It is 513.", "513", True),
    ("The answer is 513. (One might think 510.)", "510", False),
    ("We see 510 first, so the answer is 513.", "510", False),
    ("The answer is either 513 or 510.", "510", False),
    ("The answer is either 513 or 510.", "513", False),
    ("It is 513 or 510", "510", False),
    ("The answer is 513 and 510", "513", False),
    ("The answer is 513, 510", "513", False),
    (r"The answer is $\sqrt{513}$.", "513", False),
    ("The answer is 513x.", "513", False),
    ("The answer is ±513.", "513", False),
    ("The answer is 5 million.", "5", False),
    (r"\boxed{5\text{ million}}", "5", False),
    (r"The answer is $5 \mathrm{thousand}$.", "5", False),
    (r"\boxed{5\text{ hundred metres}}", "5", False),
    ("The answer is negative 5.", "5", False),
    ("5 squared", "5", False),
    ("5²", "5", False),
    ("at least 5", "5", False),
    ("≥5", "5", False),
    ("5 over 6", "6", False),
    ("sqrt(5)", "5", False),
    ("The answer is 5 to the nearest integer.", "5", True),
    ("3 plus 2 is 5", "5", True),
    ("5 apples", "5", True),
    ("- 5 apples\n- 6 apples", "6", True),
    # Several boxes.
    (r"It is 513 at least, but I cannot solve it. $\boxed{}$", "513", False),
    (r"We get 513 and then add 3, giving $\boxed{516}$.", "513", False),
    (r"First $\boxed{516}$; wait, I forgot one, so $\boxed{513}$.", "513", True),
    (r"First $\boxed{513}$; wait, I counted too few, so $\boxed{516}$.", "513", False),
    (r"$\boxed{512}$ $\boxed{513}$ $\boxed{514}$", "513", False),
    (r"$\boxed{514}$, or maybe $\boxed{513}$", "513", False),
    (r"\boxed{41}\text{ and }\boxed{42}", "42", False),
    (r"\boxed{42} and \boxed{42.0}", "42", True),
    # A sign is one, however it is written, and so is a power; a fraction's bar is not read.
    ("The answer is \uff0d7", "-7", True),
    ("The answer is \u20117", "7", False),
    ("The answer is \u207b7", "7", False),
    ("10\u2075", "10", False),
    ("The answer is 1\u20442", "1", False),
    ("2\u2075 = 32", "32", True),
]


@pytest.mark.parametrize("completion,answer,right", MATH)
def test_math_verifier(completion, answer, right):
    assert math_reward([""], [completion], [answer]) == [float(right)]
    assert math_reward([""], [[{"role": "assistant", "content": completion}]], [answer]) == [
        float(right)
    ]


NUMERIC = [  # (answer column, completion, right)
    (5, "5", True),
    (2.5, "2.5", True),
    (1e-05, r"\boxed{0.00001}", True),
    (0.1 + 0.2, r"\boxed{0.3}", True),
    (1 / 3, r"\boxed{\frac13}", True),
    (0.3, r"\boxed{0.3000001}", False),
    (1e20, r"\boxed{100000000000000000000}", True),
    (1e23, r"\boxed{10^{23}}", True),
    (1e9 + 1, r"\boxed{1000000002}", False),
    (-0.0, r"\boxed{0}", True),
    (2**70, rf"\boxed{{{2**70}}}", True),
    (2**70, rf"\boxed{{{2**70:,}}}", True),
    (2**70, rf"\boxed{{{2**70 + 1}}}", False),
    (float("nan"), r"\boxed{nan}", False),
    (float("inf"), r"\boxed{inf}", False),
    (float("-inf"), r"\boxed{-\infty}", False),
    (True, "1", False),
    (None, "0", False),
    ("['9.6\\n']", r"\boxed{9.6}", False),
]


@pytest.mark.parametrize("answer,completion,right", NUMERIC)
def test_math_reads_numeric_answer_columns(answer, completion, right):
    assert math_reward([""], [completion], [answer]) == [float(right)]


# ---- many spellings of one number


def spelled_int(number):
    sign, size = "-" if number < 0 else "", abs(number)
    separated = [f"{size:,}".replace(",", mark) for mark in (",", "{,}", r"\,", r",\!", "\u202f")]
    plain = [
        f"{size}",
        f"{size}.0",
        rf"\mathbf{{{size}}}",
        rf"{size}\text{{ cm}}",
        rf"{size}^\circ",
    ]
    rest = [rf"\frac{{{3 * number}}}{{3}}", rf"{number - 4} + 4 = {number}", f"\u2212{size}"]
    return [sign + said for said in separated + plain] + rest[: 3 if sign else 2]


def spelled_power(digits, exponent):
    """The number digits * 10**exponent."""
    lead, last = str(Decimal(digits) / 10), exponent + 1
    written = [f"{digits}e{exponent}", f"{lead}E{last}", f"{Decimal(digits).scaleb(exponent):f}"]
    latex = [rf"{digits}\times 10^{{{exponent}}}", rf"{lead} \cdot 10^{{{last}}}\ \mathrm{{Hz}}"]
    return written + latex + [f"{lead} x 10^{last}", f"{lead} × 10^{{{last}}}"]


def spelled_fraction(above, below):
    sign, size = "-" if above < 0 else "", abs(above)
    whole, part = divmod(size, below)
    spelled = [rf"\frac{{{above}}}{{{below}}}", rf"x = {sign}\dfrac {{{2 * size}}} {{{2 * below}}}"]
    if size < 10 and below < 10:
        spelled += [rf"{sign}\frac{size}{below}", rf"{sign}\frac {size}{{{below}}}"]
    if whole and part:
        spelled += [rf"{sign}{whole}\frac{{{part}}}{{{below}}}", f"{sign}{whole} {part}/{below}"]
    return spelled + [f"{above}/{below}"]


NOT_ZERO = st.integers(-(10**5), 10**5).filter(bool)
INTEGERS = st.integers(-(10**25), 10**25) | st.integers(-2000, 2000)
SPELLED = (  # (a number, its spellings)
    INTEGERS.map(lambda number: (Fraction(number), spelled_int(number)))
    | st.tuples(NOT_ZERO, st.integers(-30, 30)).map(
        lambda pair: (pair[0] * Fraction(10) ** pair[1], spelled_power(*pair))
    )
    | st.tuples(NOT_ZERO, st.integers(1, 300)).map(
        lambda pair: (Fraction(*pair), spelled_fraction(*pair))
    )
)
FRAMES = [
    r"First, 17 cases. So it is $\boxed{%s}$.",
    r"\boxed{3}? Wait, I forgot some: \boxed{%s}",
    "The answer is %s.",
    "The answer is $%s$, not 17. This used step 3.",
    "We see 17 first.\n#### %s",
    "**Answer:** %s",
    "Hence there are **%s**",
    "It is %s, not 17",
]


BESIDE = ["%sx", r"\sqrt{%s}", r"%s\pi", "%s, 99", "(%s, 99)", r"\pm %s", "x > %s", "%s_8", "%s+1"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SPELLED, SPELLED, st.sampled_from([10, -1, 1 + Fraction(1, 10**6)]), st.data())
def test_spellings_of_one_number_are_rewarded_and_of_another_are_not(one, other, factor, data):
    (number, spelled), (stranger, strange) = one, other
    frame, answer = (data.draw(st.sampled_from(some)) for some in (FRAMES, spelled))
    said = data.draw(st.sampled_from(spelled))
    assert math_reward([""], [frame % said], [answer]) == [1.0]
    if stranger != number:
        assert math_reward([""], [frame % data.draw(st.sampled_from(strange))], [answer]) == [0.0]
    if number:
        assert math_reward([""], [frame % (number * factor)], [answer]) == [0.0]
    beside = data.draw(st.sampled_from(BESIDE)) % number
    assert math_reward([""], [rf"\boxed{{{beside}}}"], [answer]) == [0.0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_what_a_numeric_column_holds_is_itself(number):
    assert math_reward([""], [rf"\boxed{{{number}}}"], [number]) == [1.0]
    assert_readable({"answer": [number, str(number)]}, math_reward)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(), st.text() | st.floats() | st.integers() | st.lists(st.text()), st.booleans())
def test_no_text_and_no_answer_raises(text, answer, is_boxed):
    said = rf"\boxed{{{text}}}" if is_boxed else text
    assert math_reward([""], [said], [answer])[0] in (0.0, 1.0)


# ---- answers that are no numbers


@pytest.mark.parametrize(
    "answer", [r"\frac{x}{2}", "['9.6\n']", "(1, 2)", "C", "52_8", "", None, float("nan"), "3:45"]
)
def test_a_data_set_whose_answers_are_no_numbers_is_refused_with_its_row(answer):
    good = ["72", 5, 2.5, "so\n#### 1,234", r"\frac{1}{2}", "x=5", "18 dollars"]
    assert_readable({"answer": good}, math_reward)
    with pytest.raises(InputError, match=r"row 1: .*a number.*docs/your-own.md.*found "):
        assert_readable({"answer": ["72", answer]}, math_reward)


@pytest.mark.parametrize("flag", ["--dataset-name", "--eval-dataset-name"])
def test_a_run_refuses_answers_that_are_no_numbers(model_folder, tmp_path, capsys, flag):
    """Of the rows of the file, before they are shuffled; another reward takes them."""
    rows = rows_of(answer="7")
    good = write_rows(tmp_path / "good.jsonl", rows)
    rows[9]["answer"] = r"\frac{x}{2}"
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    flags = [*own(model_folder, good, "math"), "--output-dir", str(tmp_path / "run"), flag, bad]
    refused(capsys, flags, flag, "row 9", "a number", "docs/your-own.md", "frac{x}{2}")
    assert not list((tmp_path / "run").iterdir())


def test_the_reward_for_latex_that_the_docs_show():
    pytest.importorskip("math_verify")
    page = (Path(__file__).parent.parent / "docs" / "your-own.md").read_text()
    (code,) = [block for block in re.findall("```python\n(.*?)```", page, re.S) if "parse" in block]
    namespace, before = {}, signal.getsignal(signal.SIGALRM)
    exec(code, namespace)
    answers = [r"\frac{x}{2}", r"\left( 3, \pi/2 \right)", "x^2+1"]
    right = [r"so $\boxed{x/2}$", r"\boxed{(3, \frac{\pi}{2})}", r"\boxed{1 + x^2}"]
    wrong = [r"so $\boxed{2x}$", [{"role": "assistant", "content": r"\boxed{(3, \pi)}"}], "no idea"]
    assert namespace["reward"]([""] * 3, right, answers) == [1.0] * 3
    assert namespace["reward"]([""] * 3, wrong, answers) == [0.0] * 3
    signal.signal(signal.SIGALRM, before)


# ---- hostile text


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
    "9999^99 ",
    "10^{999}",
    "9^9^",
    "\\boxed{9},",
    "1=",
    "cm/s",
    "/°",
    "*10^9",
    "not 9 ",
    "or 9",
    "|9",
    "<<",
    "1" + "0" * 999 + " ",
]


@pytest.mark.parametrize("piece", PIECES)
def test_verifiers_are_linear_on_hostile_text(piece):
    """1 MB of one piece, bare, boxed, with an end that does not match: together in a second."""
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    for hostile in (
        text,
        f"\\boxed{{{text}}}",
        text + "!",
        "answer" + text + "x",
        "1" + text + "}",
        f"\\boxed{{x={text[:990]}!}}",
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
    assert final_number("9**9**9**9") is None
    assert final_number("10^(10^9)") is None and final_number("1e999999999") is None


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
    # Several are none.
    ("B or C", None),
    ("(B) or (C)", None),
    (r"\boxed{B, C}", None),
    (r"First \boxed{A}." + "\n" + r"No: \boxed{\text{(B)}}", "B"),
    ("Answer: B, C, D, A", None),
    ("Answer: B and C are right", None),
    ("B, A plant is green", "B"),
    ("The answer is B, B is right", "B"),
    ("(B), (B)", "B"),
    ("The answer is B, C is wrong", "B"),
    ("It is not (C) but (B)", "B"),
    ("(C)(B)", None),
    ("(B) (B)", "B"),
    ("(B) (C is close, too)", "B"),
]


@pytest.mark.parametrize("text,letter", CHOICE)
def test_choice_verifier(text, letter):
    assert chosen_letter(text, CHOICES) == letter
    assert choice_reward([""], [text], ["B"], [CHOICES]) == [float(letter == "B")]


def test_choices_as_the_hub_has_them_and_numbers():
    assert choice_reward([""], ["D"], ["D"], [{"text": CHOICES, "label": list("ABCD")}]) == [1.0]
    # The answer may be the option's own text, whatever the letters look like.
    for said, right in (("B", 1.0), (CHOICES[1], 1.0), ("A", 0.0), (CHOICES[0], 0.0)):
        assert choice_reward([""], [said], [CHOICES[1]], [CHOICES]) == [right]
    assert choice_reward([""] * 2, ["B", "it is 7"], ["B", "A"], [None, [7, 8]]) == [1.0, 1.0]
    numbered = {"text": CHOICES, "label": list("1234")}
    said = ["3", "The answer is 3.", "(2)", "C", CHOICES[2], "D", "30"]
    assert chosen_letter(r"\boxed{3}, or rather \boxed{1}", *options_of(numbered)) == "A"
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


@pytest.mark.parametrize(
    "choices",
    [
        "A) 4 B) 5",
        {"A": "4", "B": "5"},
        [{"label": "A", "text": "4"}],
        {"text": "45"},
        4,
        True,
        [["4"], ["5"]],
        # As datasets reads ISO dates, which nobody can say.
        [datetime(2020, 1, 1), datetime(2021, 1, 1)],
    ],
)
def test_choices_of_another_shape_are_refused(choices):
    with pytest.raises(InputError, match="choices: expected texts or {text, label}, found"):
        choice_reward([""], ["B"], ["B"], [choices])
    columns = {"prompt": [""] * 2, "answer": ["B"] * 2, "choices": [["4", "5"], choices]}
    with pytest.raises(InputError, match="row 1: choices: expected texts"):
        assert_readable(columns, choice_reward)


@pytest.mark.parametrize(
    "labels", ["BA", ["i", "ii"], ["", ""], "11", "A1", ["1.", "2."], "A", "123", ["9", "10"]]
)
def test_labels_that_are_neither_letters_in_order_nor_digits_are_refused(labels):
    """Of B and A, an answer B would mean the first option, and by its place the second."""
    options = {"text": ["4", "5"], "label": list(labels)}
    with pytest.raises(InputError, match="choices: expected a label A, B.. or a digit each, found"):
        choice_reward([""], ["B"], ["B"], [options])
    options["label"] = ["a ", "B"]
    assert choice_reward([""], ["B"], ["B"], [options]) == [1.0]


def test_an_answer_that_is_the_text_of_two_options_is_refused():
    columns = {"prompt": [""], "answer": ["Yes"], "choices": [["yes", "no", "YES"]]}
    with pytest.raises(InputError, match="row 0: expected an option"):
        assert_readable(columns, choice_reward)
    assert_readable(columns | {"answer": ["C"]}, choice_reward)
    # Of more options than letters, the last ones have none.
    many = {"prompt": [""], "answer": ["27"], "choices": [[f"{own}" for own in range(1, 28)]]}
    with pytest.raises(InputError, match="row 0: expected an option"):
        assert_readable(many, choice_reward)
    assert_readable(many | {"answer": ["26"]}, choice_reward)


@pytest.mark.parametrize("answer", [["ok"], {"text": "ok"}, b"ok", date(2020, 1, 1), None])
def test_answers_that_no_text_is_are_refused_by_exact(answer):
    assert_readable({"answer": ["ok", 5, 2.5, True]}, exact_reward)
    with pytest.raises(InputError, match="row 1: expected a text as 'answer' for --reward"):
        assert_readable({"answer": ["ok", answer]}, exact_reward)


def test_choice_without_a_choices_column_and_exact():
    assert choice_reward(["", ""], ["The answer is C", "D"], ["C", "A"]) == [1.0, 0.0]
    assert exact_reward(["", ""], [" a  b ", "a"], ["a b", "b"]) == [1.0, 0.0]


@pytest.mark.parametrize("options", [CHOICES, {"text": CHOICES, "label": list("ABCD")}])
def test_a_whole_number_is_the_place_of_an_option(options):
    """As in MMLU, whose options may be numbers themselves; ARC's labels come first."""
    assert choice_reward([""] * 2, ["D", "B"], [3, 3], [options] * 2) == [1.0, 0.0]
    numbers = ["0", "4", "2", "6"]
    said = ["C", "B", "the answer is 2"]
    assert choice_reward([""] * 3, said, [2, 2, 2], [numbers] * 3) == [1.0, 0.0, 1.0]
    assert choice_reward([""] * 2, ["A", "B"], [7, 7], [[7, 8]] * 2) == [1.0, 0.0]
    numbered = {"text": CHOICES, "label": list("1234")}
    assert choice_reward([""] * 2, ["2", "C"], [2, 2], [numbered] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("answer", ["E", 4, -1, True, 2.0, None, "", "water and", ["A"]])
def test_a_data_set_whose_answers_are_no_options_is_refused_with_its_row(answer):
    """True is no place, nor is 2.0; nothing that says nothing is ever right."""
    good = ["A", "d", 0, 3, CHOICES[1], CHOICES[2].upper()]
    assert_readable({"answer": good, "choices": [CHOICES] * len(good)}, choice_reward)
    with pytest.raises(InputError, match="row 1: expected an option as 'answer'"):
        assert_readable({"answer": ["A", answer], "choices": [CHOICES] * 2}, choice_reward)
    assert choice_reward([""] * 2, ["", "A"], [answer] * 2, [CHOICES] * 2) == [0.0, 0.0]


def test_answers_without_options_are_letters():
    texts = {"text": CHOICES, "label": None}
    assert choice_reward([""] * 2, ["D", "B"], [3, "b"], [texts, {"text": CHOICES}]) == [1.0, 1.0]
    # A place among options that nobody knows: they may be numbered from 1.
    assert choice_reward([""] * 2, ["C", "2"], [2, 2], None) == [0.0, 0.0]
    for columns in ({}, {"choices": [None]}, {"choices": [[]]}):
        with pytest.raises(InputError, match="row 0: expected an option .* found 2 "):
            assert_readable({"answer": [2], **columns}, choice_reward)
    assert choice_reward([""] * 3, ["C"] * 3, ["C"] * 3, [{}, None, {"text": None}]) == [1.0] * 3
    assert_readable({"answer": ["A", "z"]}, choice_reward)
    # I is no option that is named beside it.
    assert chosen_letter("The answer is B, I think", ()) == "B"
    with pytest.raises(InputError, match="row 0: .* found 'slot'"):
        assert_readable({"answer": ["slot"]}, choice_reward)


@pytest.mark.parametrize("said", ["legal", "illegal", "It is not legal", "no"])
def test_an_option_that_holds_another_one_is_meant_by_its_whole_text(said):
    """Words, and the longer one of two; an empty option is never said."""
    options = ["legal", "illegal", "not legal", "", None]
    named = {"legal": "A", "illegal": "B", "It is not legal": "C", "no": None}
    assert chosen_letter(said, options) == named[said]
    assert chosen_letter("it is 10", ["1", "10", 0, 100]) == "B"
    assert chosen_letter("0", [0, 7]) == "A" and chosen_letter("nice day", ["ice", "cat"]) is None
    assert choice_reward([""], ["gibberish"], [""], [["", "red"]]) == [0.0]
    assert chosen_letter("red", ["red", "red"]) is None
    assert chosen_letter("so: 3.14", ["3", "2"]) is None and chosen_letter("-5", ["5", "2"]) is None
    assert chosen_letter("so it is.", ["x", "  "]) is None
    for missing in (None, float("nan")):
        with pytest.raises(InputError, match="row 0"):
            columns = {"answer": [missing], "choices": [["None", "nan"]]}
            assert_readable(columns, choice_reward)


@pytest.mark.parametrize(
    "text,wrong",
    [
        ("The answer is 2 plus 3.", "8"),
        ("It takes 2 to 3 days.", "8"),
        ("2 times 3", "8"),
        ("5 over 2", "25"),
    ],
)
def test_words_that_are_not_read_are_no_powers(text, wrong):
    """What is not read is read twice: a mark in the first reading was a power in the second."""
    assert math_reward([""], [text], [wrong]) == [0.0]


@pytest.mark.parametrize("text", ["It's $7.", "That's 7", "Tom's 7", "Tom\u2019s 7", "it's 7."])
def test_a_number_behind_an_apostrophe_is_read(text):
    assert math_reward([""], [text], ["7"]) == [1.0]


def test_an_option_in_brackets_that_is_denied_is_not_chosen():
    said = ["(A) is wrong because of ice, so (B)", "A) is not right; (B)"]
    assert choice_reward([""] * 2, said, ["B", "B"]) == [1.0] * 2


@pytest.mark.parametrize(
    "text,choices",
    [
        ("A) is not affected by heat", ["is not affected by heat.", "heat"]),
        ("A. is not a prime number", ["is not a  prime number", "a prime number"]),
        ("(A) is not liable, because he left", None),
        ("(A) is not only plausible but correct.", None),
        ("(A) is nothing but correct.", None),
    ],
)
def test_an_option_that_is_not_something_is_not_denied(text, choices):
    assert choice_reward([""], [text], ["A"], [choices]) == [1.0]


@pytest.mark.parametrize("text", ["between 5-7", "5\u20137 of them"])
def test_an_option_is_no_end_of_a_range(text):
    assert choice_reward([""], [text], ["A"], [["5", "9"]]) == [0.0]


@pytest.mark.parametrize(
    "text,wrong", [("2^0.5", "1.5"), ("10^3.5", "1000.5"), ("101\u2082", "101")]
)
def test_powers_with_a_point_and_bases_are_not_read(text, wrong):
    assert math_reward([""], [rf"\boxed{{{text}}}"], [wrong]) == [0.0]


def test_a_whole_number_beside_digit_labels_is_a_label():
    texts, letters = options_of({"text": list("wxyz"), "label": list("1234")})
    found = [right_letter(answer, texts, letters) for answer in range(5)]
    assert found == [None, "A", "B", "C", "D"]

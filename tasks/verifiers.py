"""Rewards that compare with an answer: readers of what a model wrote, then three verifiers."""

import re
from fractions import Fraction
from string import ascii_uppercase

WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
NUMBER = re.compile(r"(?<![0-9)])-?" + WHOLE + r"?(?:\.[0-9]+|(?<=[0-9]))(?:\s*/\s*[0-9]+)?")
UNIT = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?|\^\{?\\circ\}?|\\[%$]")
POWER = r"(?<![\w.,)}\]])([0-9]{1,4})\s*\^\s*(?:\{\s*([0-9]{1,2})\s*\}|([0-9]))(?!\s*[\w^!'])"
FRACTION = r"\\frac\s*\{\s*(-?[0-9]{1,50})\s*\}\s*\{\s*([0-9]{1,50})\s*\}"
MARKUP = r"\\(?:text|mbox|mathrm|left|right|displaystyle|,|;|:| )|[\s$]"
# What may not stand beside a number that is the whole answer: 2k, x/8, 5!, (1, 2), 8 -.
NOT_ALONE = r"[0-9\\(){}\[\]^_=+*<>!']|-$|^[A-Za-z]$|[-/]\s*[A-Za-z]$|^[A-Za-z]\s*/"
WORD = r"\b(?i:answer|option|choice)\b"
LETTER = r"(A(?!\s+(?!because|since|as\b|and\b)[a-z])|[B-Z])\b(?!['’])"  # `A plant`: an article
# How an answer names a letter, or a digit; tried in this order.
LETTERED = [
    r"\\boxed\{(?:\\text\{)?\(?" + LETTER,
    WORD + r"(?:\s*(?i:is|would\s+be|should\s+be|option|choice|:)){0,4}\W{0,4}" + LETTER,
    r"\b(?i:answer)\s*:\s*\(?([a-z])\)?\W*$",
    r"^\W*([A-Za-z])(?:\W*$|[.):,*]|\s*\n|\s+is\s+(?:the\s+)?(?:correct|right))",
    r"\(([A-Z])\)",
]
NUMBERED = [
    r"^\W*([0-9])\W*$",
    r"\\boxed\{\s*([0-9])\s*\}",
    WORD + r"(?:\s*(?i:is|:)){0,4}\W{0,4}([0-9])(?!\w|[.,/]\w|\s+\w|\s*[%$/])",
    r"\(([0-9])\)",
]


def text_of(completion):
    """A completion's text, whether a string or a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def boxed(text):
    """What stands in the last \\boxed{...} of text, braces balanced; None if there is none."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for end, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if found and depth == 0:
            return rest[:end]
    return None


def power(found):
    return str(int(found[1]) ** int(found[2] or found[3]))


def mixed_fraction(found):
    return f"{int(found[1]) * int(found[3]) + int(found[2])}/{found[3]}"


def plain_latex(text):
    """Powers as numbers, fractions as a/b, mixed ones too; one way to write a comma or a minus."""
    text = text.replace("\\!", "").replace("{,}", ",").replace("\u2212", "-").replace("\\$", "$")
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("\\\\", ";")
    text = re.sub(POWER, power, text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\b([0-9]{1,50})\s*" + FRACTION, mixed_fraction, text)
    return re.sub(FRACTION, r"\1/\2", text)


def last_number(text):
    """The last number in text, commas, decimals and fractions read, as a Fraction; or None."""
    for found in reversed(NUMBER.findall(plain_latex(text[-4000:]))):  # answers stand at the end
        whole, _, denominator = re.sub(r"[,\s]", "", found).partition("/")
        if len(whole) + len(denominator) <= 100 and int(denominator or 1) != 0:
            return Fraction(whole) / int(denominator or 1)
    return None


def plain_unit(found):
    return " " + re.sub(r"[^0-9.,]", " ", found[0].split("}")[0])


def one_number(text):
    """The number that text is, a unit or `x =` aside, as a Fraction; None for tuples, roots, 2x."""
    text = UNIT.sub(plain_unit, plain_latex(text))
    text = re.sub(r"^\s*(?:[A-Za-z]\s*=\s*)?\+?", "", text)
    rest = NUMBER.sub("", text, count=1).strip(" .$%")
    return None if re.search(NOT_ALONE, rest) else last_number(text)


def plain_answer(text):
    """A LaTeX answer as a bare string, to compare answers that are not numbers."""
    text = re.sub(MARKUP, "", plain_latex(text))
    return re.sub(r"\{(\w)\}", r"\1", text).rstrip(".").lower()


def math_reward(prompts, completions, answer, **columns):
    """1.0 where what is in \\boxed{}, else the last number, is the answer: as a number, or text."""
    scores = []
    for completion, expected in zip(completions, answer):
        text, expected = text_of(completion), str(expected).split("####")[-1]  # GSM8K: #### 72
        given, target = boxed(text), one_number(expected)
        if target is None:
            right = given is not None and plain_answer(given) == plain_answer(expected)
        else:
            right = target == (last_number(text) if given is None else one_number(given))
        scores.append(float(right))
    return scores


def first_found(patterns, text, allowed):
    """What the first pattern that finds something allowed finds, in capitals; or None."""
    for pattern in patterns:
        found = re.search(pattern, text)
        if found and found[1].upper() in allowed:
            return found[1].upper()
    return None


def chosen_letter(text, choices):
    """The option that text names, by letter or by its own text; None for none, or several."""
    text, letters = text.strip()[:10_000], ascii_uppercase[: len(choices) or 26]
    pairs = zip(letters, choices)
    named = [letter for letter, said in pairs if str(said).strip().lower() in text.lower()]
    return first_found(LETTERED, text, letters) or (named[0] if len(named) == 1 else None)


def option_texts(choices):
    """The texts to choose from, of choices as choice_reward takes them -> a list."""
    return choices["text"] if isinstance(choices, dict) else choices or []


def choice_reward(prompts, completions, answer, choices=None, **columns):
    """1.0 where the option named is the answer; choices: texts, or the hub's {text, label}."""
    scores = []
    for completion, expected, options in zip(completions, answer, choices or [None] * len(answer)):
        text, expected = text_of(completion).strip()[:10_000], str(expected).strip().upper()
        labels = [str(label) for label in (options["label"] if isinstance(options, dict) else [])]
        letters = dict(zip(labels, ascii_uppercase)) if "".join(labels).isdigit() else {}  # ARC
        number = first_found(NUMBERED, text, "0123456789") if letters else None
        letter = letters.get(number) if number else chosen_letter(text, option_texts(options))
        scores.append(float(letter is not None and letter == letters.get(expected, expected)))
    return scores


def exact_reward(prompts, completions, answer, **columns):
    """1.0 where the completion is the answer column's text, white space aside, else 0.0."""
    pairs = zip(completions, answer)
    return [float(text_of(said).split() == str(expected).split()) for said, expected in pairs]

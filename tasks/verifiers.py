"""Rewards that compare with an answer: readers of what a model wrote, then three verifiers."""

import re
from fractions import Fraction
from string import ascii_uppercase, digits

from tasks import InputError, naming

DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"
PART = rf" ?(?:\{{ ?([-+]?{DECIMAL}) ?\}}|([0-9]))"  # of a fraction
POWER = r"(?<![\w.,)}\]^])(?<![0-9] )([1-9][0-9]{0,3}) ?\^ ?([-+]?[0-9]{1,2})(?! ?[\^0-9]|\.[0-9])"
# In this order: one spelling for what has many; a unit becomes °.
PLAIN = [
    (r"<<[^<>]*>>|\\!\s*|\\(?:left|right)(?![a-z])|\\(?=[$%])|\{(?=,\})|(?<=\{,)\}", ""),
    (r"\\(?:text|math|mbox|f?box)[a-z]*\s*\{\s*((?:[-+0-9.]|\w*illio|thou|hund)[^{}]*)\}", r" \1 "),
    (r"(?:[^\S\n]|\\[,;:() \[\]]|\\q?quad\b|~|\\f?box(?:ed)?\s*\{?)+", " "),
    (r"\^ ?\{ ?([-+]?[0-9]+|\\circ) ?\}", r"^\1 "),
    (r"\\(?:text|mathrm|mbox)[a-z]* ?\{(?![^{}]* or )(?:[^{}0-9]|\^-?[0-9])*\}|\^ ?\\circ|%", "°"),
    (r"[\u2010-\u2013\u207b\u2212\ufe63\uff0d]", "-"),
    (r"(?<=[0-9])[\u00b9\u2044\u2070\u2074-\u2079\u2080-\u2089]", "^^"),  # not read
    (r"(?<=[0-9])(?<![0-9]{4})[, ](?=[0-9]{3}(?![0-9/]))", ""),  # 2,000
    (r"\\(?:times|cdot)(?![a-z])|[×·]|(?<=[0-9]) ?x ?(?=[0-9])", "*"),
    (r"(?<![\w.])([0-9.]+) ?\* ?10 ?\^ ?([-+]?[0-9]{1,3})(?![0-9])", r"\1e\2"),  # 2 * 10^3
    (POWER, lambda found: str(Fraction(found[1]) ** int(found[2]))),
    (rf"\\[dtc]?frac{PART}{PART}", r" \1\2/\3\4 "),  # also \frac12
    (r"\| ?-? ?([0-9.]+) ?\|", r"(\1)"),  # |-4|
    # No units, and no signs: not read.
    (r"(?<=[0-9]) (?=(?:hundred|thousand|lakh|dozen|[mbt]r?illion|halve|hundredth)s?\b)", "^^"),
    (r"(?<=[0-9]) (?:squared|cubed|(?:over|plus|minus|times|point|to)(?= [0-9]))\b ?", "^^"),
    (r"(?i)\b(?:minus|negative|twice|half of|at least|at most|sqrt|root of) ?(?=\(?[0-9])", "^^"),
]
# A whole answer: a name, sums that it equals, the number, its units.
SUMS = r"(?:([A-Za-z\\°](?:[\w\\|°'{} $]|\([^()]*\))*)=)?(?:[-+*/^()0-9.!°÷$\s]*=)*[\s$*([]*"
VALUE = rf"(?:([-+])[ $]*)?(?:([0-9]+) +(?=[0-9]+ ?/))?({DECIMAL})(?: ?/ ?(-?0*[1-9][0-9]*))?"
UNIT = r"°|(?!and\b|not\b)[A-Za-z]{3,}|[cdkmn]m|[km]g|m[Lls]|[kM]?Hz|eV|ft|in|(?<= )[mgsLCFJKNVW]"
UNITS = rf"(?:[ $]*[-/]?(?:{UNIT})(?![A-Za-z])(?:/ ?[A-Za-z]\b)?(?:\^-?\d|[²³])?)*[\s$*()\]]*\.?"
BOX = r"\\f?box(?:ed)?\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
LISTED = r"(?:[^a-z0-9\\]|\\(?!f?box)[a-z]*|\b(?:and|or|also|else|maybe|perhaps|possibly)\b)*"
CUE = r"(?i)(?:####|\banswer\b[^.0-9]{0,60}?(?:\bis\b|\bequals?\b|[:=]))(?=[^0-9]{0,50}[0-9])"
# What stands between two numbers: words, one that is denied, all but signs, ends of lines.
WORDS = r"(?ai)(?<![\\a-z])(?!(?:or|and)[ $*-]+[0-9])"
WORDS += r"(?:(?:not|than)[ $*-]+[0-9./]+|[a-z]{2,}(?:['’]s\b)?)"
BREAK = WORDS + r"|\b[ai] |\n(?:- )?"
BREAK += r"|(?!(?<=\d)(?:, |:)\d|\.\d|!\$)[^\w\s\\+*/^=(){}[\]|<>$°±√π²³½¼≥≤≠∛-]"
WORD = r"\b(?i:answer|option|choice)\b"
DENIED = r"(?! is (?:wrong|incorrect|false|not (?:right|correct|true))\b)"
MORE = r"[)}\s]*(?:[,;/&]|\((?=\w\))|\b(?:or|and)\b)[\s(]*(A(?! [a-z])|[B-HJ-Z0-9])\b" + DENIED
LETTER = r"(A(?!\s+(?!because|since|as\b|and\b)[a-z])|[B-Z])\b(?!['’])"  # `A plant`: an article
# How an answer names a digit, where options have one, or a letter; in this order; the last box.
NAMED = [
    r"^\W*([0-9])\W*$",
    r"(?s)^.*\\boxed\{\s*([0-9])\s*\}",
    WORD + r"(?:\s*(?i:is|:)){0,4}\W{0,4}([0-9])(?!\w|[.,/]\w|\s+\w|\s*[%$/])",
    r"\(([0-9])\)",
    r"(?s)^.*\\boxed\{(?:\\text\{)?\(?" + LETTER,
    WORD + r"(?:\s*(?i:is|would\s+be|should\s+be|option|choice|:)){0,4}\W{0,4}" + LETTER,
    r"\b(?i:answer)\s*:\s*\(?([a-z])\)?\W*$",
    r"^\W*([A-Za-z])(?:\W*$|[.):,*]" + DENIED + r"|\s*\n|\s+is\s+(?:the\s+)?(?:correct|right))",
    r"(?<!\bnot )\(([A-Z])\)" + DENIED,
]


def text_of(completion):
    """A completion's text, whether a string or a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def plain(text):
    for pattern, written in PLAIN:
        text = re.sub(pattern, written, text)
    return text.lstrip("\n $*")


def as_number(text):
    """The number that text is, with its name: `x = 2 \\cdot 3 = 6 cm` -> ("x", 6); or None."""
    found = re.fullmatch(SUMS + VALUE + UNITS, plain(text)) if len(text) < 1000 else None
    if not found:
        return None
    name, sign, whole, above, below = found.groups("")
    value = int(whole or 0) + Fraction(above) / int(below or 1)
    return re.sub("[ $]", "", name), -value if sign == "-" else value


def final_number(text):
    """The number that text answers with, as as_number has it; None for none, or for several."""
    *_, boxes = [None, *re.finditer(f"(?i)(?:{BOX}{LISTED})+", text[-10_000:])]
    if boxes:
        numbers = {as_number(box) for box in set(re.findall(BOX, boxes[0]))}
        return numbers.pop() if len(numbers) == 1 else None
    *others, said = re.split(CUE, plain(text[-2000:]))
    runs = [run for run in re.split(BREAK, said) if re.search("[0-9]", run)]
    return as_number(runs[0 if others else -1]) if runs else None


def math_reward(prompts, completions, answer, **columns):
    """1.0 where the number in \\boxed{}, after `answer is`, or else the last one, is the answer."""
    scores = [0.0] * len(completions)
    for row, (completion, expected) in enumerate(zip(completions, answer)):
        given = final_number(text_of(completion))
        target = as_number(str(expected).split("####")[-1])
        if given and target and given[0] in ("", target[0] or given[0]):
            # A float stands for the short decimal nearby.
            near = abs(target[1]) / 10**9 if isinstance(expected, float) and target[1] % 1 else 0
            scores[row] = float(abs(given[1] - target[1]) <= near)
    return scores


def chosen_letter(text, choices, labels=()):
    """The option that text names, by letter, label ({digit: letter}) or its own text; or None."""
    text = text.strip()[:10_000]
    known = ascii_uppercase[: len(choices) or 26] + (digits if labels else "")
    for pattern in NAMED:
        found = re.search(pattern, text)
        if found and (name := found[1].upper()) in known:
            other = re.match(MORE, text[found.end(1) :])  # "B or C" names two
            is_one = not (other and other[1] in known.replace(name, ""))
            return dict(labels).get(name, name) if is_one else None
    said = {a: str(own).strip().lower() for a, own in zip(known, choices) if own is not None}
    words = {a: rf"(?<![\w.-]){re.escape(own)}(?!\w|[-.–]\d)" for a, own in said.items() if own}
    whole = [a for a in words if re.search(words[a], text.lower())]
    # "not true" says "true", too.
    named = [a for a in whole if not any(said[a] in said[b] for b in whole if b != a)]
    return named[0] if len(named) == 1 else None


def options_of(choices):
    """Choices, texts or the hub's {text, label} -> texts, {label: letter} if labels are digits."""
    options = choices if isinstance(choices, dict) else {"text": choices}
    texts = options.get("text", options) or []
    if not isinstance(texts, list | tuple) or {*map(type, texts)} - {str, int, float, type(None)}:
        raise InputError(f"choices: expected texts or {{text, label}}, found {choices!r:.60}")
    labels = [str(label).strip().upper() for label in options.get("label") or []]
    in_order = labels == [*ascii_uppercase[: len(labels)]]
    if labels and len({*labels}) != len(texts) or not (in_order or {*labels} <= {*digits}):
        raise InputError(f"choices: expected a label A, B.. or a digit each, found {labels!r:.60}")
    return texts, {} if in_order else dict(zip(labels, ascii_uppercase))


def right_letter(answer, texts, letters):
    """The letter of the option that answer means: as letter, label, text or place; or None."""
    # A missing answer is no option, whatever its text is.
    given = "" if answer is None or answer != answer else str(answer).strip().upper()
    known = ascii_uppercase[: len(texts) or 26]
    upper = [str(said).strip().upper() for said in texts]
    if given in letters or (len(given) == 1 and given in known):
        return letters.get(given, given)
    if type(answer) is int and answer not in texts and not letters:  # MMLU's places
        return dict(enumerate(known[: len(texts)])).get(answer)
    return dict(zip(upper, known)).get(given) if upper.count(given) == 1 and given else None


def choice_reward(prompts, completions, answer, choices=None, **columns):
    """1.0 where the option named is the answer; choices: texts, or the hub's {text, label}."""
    scores = []
    for completion, expected, own in zip(completions, answer, choices or [None] * len(answer)):
        options = options_of(own)
        named = chosen_letter(text_of(completion), *options)
        scores.append(float(named is not None and named == right_letter(expected, *options)))
    return scores


def exact_reward(prompts, completions, answer, **columns):
    """1.0 where the completion is the answer column's text, white space aside, else 0.0."""
    return [float(text_of(a).split() == str(b).split()) for a, b in zip(completions, answer)]


VERIFIERS = {"math": math_reward, "choice": choice_reward, "exact": exact_reward}
READABLE = {math_reward: "a number", choice_reward: "an option", exact_reward: "a text"}


def meaning(reward, answer, choices=None):
    """What reward takes an answer for: a number, an option's letter, a text; None for nothing."""
    if reward is choice_reward:
        return right_letter(answer, *options_of(choices))
    if reward is math_reward:
        found = as_number(str(answer).split("####")[-1])
        return found and found[1]
    is_text = isinstance(answer, str | int | float) and answer == answer  # neither date nor NaN
    return " ".join(str(answer).split()) if is_text or reward is not exact_reward else None


def assert_readable(columns, reward):
    """Raises InputError at a data set's first answer that reward, if a verifier, cannot read."""
    answers = columns.get("answer", [None]) if reward in VERIFIERS.values() else []
    choices = columns.get("choices") or [None] * len(answers)
    for row, (answer, own) in enumerate(zip(answers, choices)):
        with naming(f"row {row}"):
            read = meaning(reward, answer, own)
        if read is None:
            expected = f"expected {READABLE[reward]} as 'answer' for --reward (docs/your-own.md)"
            found = f"found {answer!r:.60} in the columns {', '.join(columns)}"
            raise InputError(f"row {row}: {expected}, {found}")

"""tasks/rewards.py: what a reward gets and may give, where it is found, whose modules it sees."""

import inspect
import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy
import pytest
import torch
from common import tiny_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    RobertaConfig,
)

import rollout
import tasks.prompts
from tasks import InputError, one_line
from tasks.builtin import task_tokenizer
from tasks.noise import PSEUDO_LABEL
from tasks.prompts import PROMPT_IDS
from tasks.rewards import OURS, REPOSITORY, load_function, load_reward, score
from tasks.verifiers import exact_reward, math_reward


def gives(scores):
    """A reward that gives these, whatever it gets."""

    def reward(prompts, completions, **columns):
        return scores

    return reward


# ---- what a reward gets


def test_whole_conversations_reach_the_reward_as_they_are():
    roles = ("assistant", "user", "assistant")
    said = [{"role": role, "content": text} for role, text in zip(roles, "abc")]
    seen = []

    def reward(prompts, completions):
        seen.extend(completions)
        return [1.0] * len(completions)

    score(reward, {"prompt": [[{"role": "user", "content": "x"}]] * 2}, [said, "c"])
    assert seen == [said, said[-1:]]
    assert exact_reward(["x"], [said], ["c"]) == [1.0]  # the last turn is the answer


def test_columns_reach_the_reward_and_conversations_stay_conversations():
    seen = {}

    def reward(prompts, completions, level, **columns):
        seen.update(prompts=prompts, completions=completions, level=level, others=columns)
        return [True, 0]

    prompts = ["text", [{"role": "user", "content": "hi"}]]
    batch = {"prompt": prompts, "level": [1, 2], "more": ["x", "y"]}
    assert score(reward, batch, ["a", "b"]).tolist() == [1.0, 0.0]
    assert seen["prompts"] == prompts
    assert seen["completions"] == ["a", [{"role": "assistant", "content": "b"}]]
    assert seen["level"] == [1, 2] and seen["others"] == {"more": ["x", "y"]}


def test_columns_of_ours_stay_ours_and_pseudo_labels_are_called_answer():
    seen = []

    def reward(prompts, completions, **columns):
        seen.append(columns)
        return [0.0]

    batch = {"prompt": ["p"], "answer": ["a"], PROMPT_IDS: [[1]], PSEUDO_LABEL: ["b"], "id": [7]}
    score(reward, batch, ["c"])
    score(reward, batch, ["c"], answer=PSEUDO_LABEL)
    assert seen == [{"id": [7], "answer": ["a"]}, {"id": [7], "answer": ["b"]}]
    score(reward, {"prompt": ["p"], "completions": [1], "prompts": [2]}, ["c"])
    assert seen[-1] == {}


def test_a_reward_may_change_the_lists_it_gets():
    def reward(prompts, completions, level):
        prompts.clear()
        completions.pop()
        level[0] = 9
        return [1.0]

    batch, completions = {"prompt": ["p"], "level": [1]}, ["c"]
    score(reward, batch, completions)
    assert batch == {"prompt": ["p"], "level": [1]} and completions == ["c"]


def test_a_reward_is_called_once_also_when_it_fails():
    calls = []

    def reward(prompts, **columns):
        calls.append(len(prompts))
        raise KeyError("x")

    with pytest.raises(InputError):
        score(reward, {"prompt": ["p"] * 3}, ["a"] * 3)
    assert calls == [3]


def test_a_missing_column_is_named():
    with pytest.raises(InputError, match="^--reward: it raised .* argument: 'answer'\"\\)$"):
        score(math_reward, {"prompt": ["p"], "level": [1]}, ["a"])
    with pytest.raises(InputError, match="unexpected keyword argument 'level'"):
        score(lambda prompts, completions: [1.0], {"prompt": ["p"], "level": [1]}, ["a"])


# ---- what it may give

BAD_VALUES = [
    ([1.0], "2 numbers, found 1 values"),
    (1.0, "found float"),
    (None, "found NoneType"),
    ([1.0, float("nan")], "row 1.*nan"),
    ([float("inf"), 0], "row 0.*inf"),
    ([0, "1.0"], "row 1.*'1.0'"),
    ([0, None], "row 1.*None"),
    ([0, [1]], r"row 1.*\[1\]"),
    ([1e39, 0], "row 0.*1e.39"),
    ([0, 10**400], "row 1"),
    (torch.tensor(1.0), "found Tensor"),
    (torch.zeros(2, 1), "found Tensor"),
    (numpy.zeros((2, 2)), "found ndarray"),
    (torch.zeros(3), "2 numbers, found 3 values"),
    ("ab", "found str"),
    (b"ab", "found bytes"),
    (True, "found bool"),
    ({0: 1.0, 1: 1.0}, "found dict"),
    ([0, torch.zeros(2)], "row 1.*tensor"),
    ([0, b"1"], "row 1.*b'1'"),
    ([0, numpy.bytes_(b"1")], "row 1.*b'1'"),
    ([0, numpy.str_("1")], "row 1.*'1'"),
    ([0, 1 + 2j], "row 1.*2j"),
    ([0, numpy.complex64(1 + 2j)], "row 1.*2j"),
    (numpy.array([0, 1 + 2j]), "row 0.*0j"),
]


@pytest.mark.parametrize("returned,found", BAD_VALUES)
def test_bad_reward_values_are_one_line_with_the_row(returned, found):
    with pytest.raises(InputError, match=f"--reward: .*{found}"):
        score(gives(returned), {"prompt": ["p", "q"]}, ["a", "b"])


VALUES = [
    True,
    1,
    0.5,
    numpy.float32(0.25),
    numpy.int64(2),
    numpy.bool_(False),
    torch.tensor(3.0),
    torch.tensor([4]),
    numpy.array(5.0),
    Fraction(1, 2),
]
NUMBERS = [1, 1, 0.5, 0.25, 2, 0, 3, 4, 5, 0.5]


@pytest.mark.parametrize(
    "returned",
    [
        VALUES,
        tuple(VALUES),
        numpy.array(NUMBERS),
        numpy.array(NUMBERS, dtype=object),
        torch.tensor(NUMBERS, dtype=torch.float64),
    ],
)
def test_plain_numbers_of_any_kind_are_scores(returned):
    found = score(gives(returned), {"prompt": ["p"] * 10}, ["a"] * 10)
    assert found.tolist() == NUMBERS and found.dtype == torch.float32


@pytest.mark.parametrize("prompt", ["how many", [{"role": "user", "content": "how \n many"}]])
def test_a_score_that_is_no_number_is_named_with_its_prompt(prompt):
    found = "row 1 of the batch, 'how many': expected a finite number, found 'nan'"
    with pytest.raises(InputError, match=f"--reward: {found}"):
        score(gives([1, math.nan]), {"prompt": ["p", prompt]}, ["a", "b"])


def test_what_a_reward_raises_is_named_with_its_file_and_line():
    def reward(prompts, level, **columns):
        return [1 / value for value in level]

    line = reward.__code__.co_firstlineno + 1
    where = rf"\(test_rewards.py, line {line}\)$"
    with pytest.raises(InputError, match=f"--reward: it raised ZeroDivisionError.* {where}"):
        score(reward, {"prompt": ["p", "q"], "level": [1, 0]}, ["a"] * 2)


class OwnError(Exception):
    pass


class NoException(BaseException):
    """As a library's timeout may be, that nobody shall catch."""


class LongError(Exception):
    def __repr__(self):
        return "one\ntwo\r\n\nthree"


RAISED = [
    (NoException("slow"), r"it raised NoException\('slow'\) \("),
    (GeneratorExit(), r"it raised GeneratorExit\(\) \("),
    (StopIteration(), r"it raised StopIteration\(\) \("),
    (LongError(), r"it raised one two three \("),
    (ValueError(), r"it raised ValueError\(\) \("),
    (ValueError("two\nlines"), r"it raised ValueError\('two.*lines'\) \("),
    (KeyError("x"), r"it raised KeyError\('x'\) \("),
    (OwnError("late"), r"it raised OwnError\('late'\) \("),
    (SystemExit(3), r"it raised SystemExit\(3\) \("),
]


@pytest.mark.parametrize("error,found", RAISED)
def test_what_a_reward_raises_is_one_line(error, found):
    def reward(prompts, **columns):
        raise error

    with pytest.raises(InputError, match=f"^--reward: {found}") as caught:
        score(reward, {"prompt": ["p"]}, ["a"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error,text",
    [
        (StopIteration(), "StopIteration without a message"),
        (ValueError("a\n b"), "a b"),
        (ValueError("a" * 300 + " use this"), "a" * 300 + " use this"),
        (ValueError("b" * 999 + " use this"), "b" * 200 + " ... " + "b" * 191 + " use this"),
    ],
)
def test_an_error_that_says_nothing_is_named(error, text):
    assert one_line(error) == text


def test_ctrl_c_in_a_reward_is_no_fault_of_its():
    def reward(prompts, **columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(reward, {"prompt": ["p"]}, ["a"])


def odd_value(**methods):
    return type("Odd", (), methods)()


def leave(value):
    sys.exit(1)


def fail(value):
    raise ValueError("not\nyet")


@pytest.mark.parametrize(
    "returned,found",
    [
        ([odd_value(__float__=leave)], r"it raised SystemExit\(1\)"),
        ([odd_value(__str__=fail)], r"it raised ValueError\('not.*yet'\)"),
        ([odd_value(__float__=fail)], r"row 0 of the batch, 'p': expected a finite number"),
        (odd_value(ndim=1, __len__=fail), r"it raised ValueError\('not.*yet'\)"),
        (odd_value(ndim=property(fail)), r"it raised ValueError\('not.*yet'\)"),
        (odd_value(ndim=1, __len__=lambda value: 1, __iter__=fail), r"it raised ValueError\("),
    ],
)
def test_what_a_score_raises_when_it_is_read_is_one_line(returned, found):
    place = r" \(test_rewards.py, line " if "raised" in found else ""
    with pytest.raises(InputError, match=f"^--reward: {found}.*{place}") as caught:
        score(gives(returned), {"prompt": ["p"]}, ["a"])
    assert "\n" not in str(caught.value)


# ---- where it is found

WRONG = [
    "maths",
    "my_reward:long",
    "broken:f",
    "my_reward:__name__",
    "no_such_module:f",
    "leaves:f",
    "silent:f",
    ":f",
    "model:",
    "model:/no/such/folder",
]


def test_load_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = (
        "def short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    (tmp_path / "my_reward.py").write_text(code)
    assert load_reward("my_reward:short")(["p"], ["abc"]) == [-3]
    assert load_reward("math") is math_reward
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "silent.py").write_text("raise ValueError\n")
    for wrong in WRONG:
        with pytest.raises(InputError, match="--reward: .*[^: ]$"):
            load_reward(wrong)


def test_a_module_that_fails_is_named_with_the_line_and_ours_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needs.py").write_text("import json\nimport no_such_package\n")
    (tmp_path / "outer.py").write_text("\n\nimport inner\n")
    (tmp_path / "inner.py").write_text("x = 1\n1 / 0\n")
    (tmp_path / "torn.py").write_text("def f(:\n")
    (tmp_path / "stops.py").write_text("class Own(BaseException): pass\nraise Own\n")
    for spec, found in {
        "needs:f": r"ModuleNotFoundError.*no_such_package.*\) \(needs.py, line 2\)",
        "outer:f": r"ZeroDivisionError.*\) \(inner.py, line 2\)",
        "torn:f": r"SyntaxError.*torn.py",
        "stops:f": r"Own\(\) \(stops.py, line 2\)",
        "nowhere:f": r"ModuleNotFoundError\(\"No module named 'nowhere'\"\)$",
        "json:nosuch": r"AttributeError\(\"module 'json' has no attribute 'nosuch'\"\)$",
    }.items():
        expected = f"^--reward: cannot load '{spec}': it raised {found}"
        with pytest.raises(InputError, match=expected):
            load_reward(spec)


def test_a_loaded_function_keeps_its_parameters_and_the_place_of_its_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "def strict(prompts, completions, level):\n    return 1 / level\n"
    (tmp_path / "with_level.py").write_text(code)
    strict = load_reward("with_level:strict")
    assert [*inspect.signature(strict).parameters] == ["prompts", "completions", "level"]
    with pytest.raises(InputError, match=r"TypeError.* \(with_level.py, line 2\)"):
        score(strict, {"prompt": ["p"], "level": [1]}, ["a"])


# ---- whose modules it sees

THEIR_REWARD = """
import critic, rollout
from tasks.letters import vowels
from harness import strict
from experiments import numbers

def reward(prompts, completions, **columns):
    import their_helper  # found when it is called
    assert their_helper.number == 5
    names = [critic.name, rollout.name, strict.name, numbers.name]
    assert names == ["theirs"] * 4, names
    return [vowels(text) for text in completions]
"""


def their_folder(folder, package):
    """A user's folder with modules named as ours are; package: whether folders have __init__.py."""
    for path, text in {
        "their_reward.py": THEIR_REWARD,
        "their_helper.py": "number = 5",
        "critic.py": "name = 'theirs'",
        "rollout.py": "name = 'theirs'",
        "tasks/letters.py": "def vowels(text):\n    return sum(c in 'aeiou' for c in text)",
        "harness/strict.py": "name = 'theirs'",
        "experiments/numbers.py": "name = 'theirs'",
    }.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text + "\n")
        if package and "/" in path:
            (folder / path).with_name("__init__.py").touch()
    return folder


@pytest.fixture
def unloaded(monkeypatch):
    """The user's other modules stay in sys.modules, and every test has a folder of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("their_reward", "their_helper", "talk"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("package", [False, True])
def test_a_users_modules_may_have_our_names(package, tmp_path, monkeypatch, unloaded):
    monkeypatch.chdir(their_folder(tmp_path, package))
    modules, places = dict(sys.modules), [*sys.path]
    reward = load_reward("their_reward:reward")
    assert score(reward, {"prompt": ["p"]}, ["area"]).tolist() == [3.0]
    # Ours are what they were, and what is imported from now on is ours.
    assert sys.path == [*places, str(tmp_path)]
    for name, module in modules.items():
        assert sys.modules[name] is module
    for name in sys.modules.keys() - modules.keys():
        assert name.partition(".")[0] not in OURS, name
    import critic

    assert critic.__file__ == str(REPOSITORY / "critic.py")
    assert sys.modules["tasks.prompts"] is tasks.prompts and rollout.Rollout


def test_two_functions_of_one_module_share_it(tmp_path, monkeypatch, unloaded):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk.py").write_text(
        "seen = []\ndef user(text):\n    seen.append(text)\ndef reward():\n    return seen\n"
    )
    load_function("--user", "talk:user")("hi")
    assert load_function("--reward", "talk:reward")() == ["hi"]


def test_two_folders_do_not_share_their_modules(tmp_path, monkeypatch):
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "critic.py").write_text(f"def reward():\n    return {number}\n")
    functions = []
    for number in (1, 2):
        monkeypatch.chdir(tmp_path / str(number))
        functions.append(load_function("--reward", "critic:reward"))
    assert [function() for function in functions] == [1, 2]


def test_a_users_module_may_use_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "risk.py").write_text("name = 'theirs'\n")
    (tmp_path / "tasks.jsonl").touch()  # data hide nothing
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.jsonl").touch()
    (tmp_path / "uses_ours.py").write_text(
        "import risk\nfrom tasks.verifiers import math_reward as reward\nname = risk.name\n"
    )
    assert load_function("--reward", "uses_ours:reward") is math_reward
    assert sys.modules["uses_ours"].name == "theirs"


def test_the_working_folder_may_be_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    modules = dict(sys.modules)
    assert load_reward("tasks.verifiers:exact_reward") is exact_reward
    assert load_function("--user", "tasks.builtin:scripted_user")([{"content": "book"}], "") is None
    assert dict(sys.modules) == modules


def test_ours_are_found_whatever_else_is_on_the_path(tmp_path):
    """Packages of a user's: one would win over a folder of ours without an __init__.py."""
    for name in OURS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    code = "import sys; from importlib.util import find_spec; sys.path.insert(0, sys.argv.pop(1))\n"
    code += "print(*[find_spec(name).origin for name in sys.argv[1:]], sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code, str(REPOSITORY), *OURS]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    found = run.stdout.splitlines()
    assert len(found) == len(OURS) and all(str(REPOSITORY) in path for path in found), run


def test_scripts_do_not_put_their_folder_on_the_path():
    """Or experiments/evaluate.py would stand before a package that is named evaluate."""
    scripts = [path.read_text() for path in (REPOSITORY / "experiments").glob("*.py")]
    first = "    sys.path[0] = str(Path(__file__).parent.parent)\n"
    assert all(("sys.path" in text) == (first in text) for text in scripts)
    assert sum(first in text for text in scripts) >= 12


def test_our_names_are_all_there_are():
    """Every module and package of the repository's folder, and whatever is yet to come."""
    here = {path.stem for path in REPOSITORY.glob("*.py")}
    here |= {path.parent.name for path in REPOSITORY.glob("*/*.py")} - {"tests"}
    assert here <= set(OURS)


@pytest.mark.slow
def test_a_process_started_elsewhere_keeps_ours_and_theirs_apart(tmp_path):
    """As a run does it: our folder is first on the path, the user's is the working folder."""
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import rollout, tasks.warm_start
from tasks.rewards import load_reward, score
reward = load_reward("their_reward:reward")
print(score(reward, {{"prompt": ["p"]}}, ["area"]).item())
import critic, dvpo, tasks.builtin
print(all({str(REPOSITORY)!r} in module.__file__ for module in (critic, rollout, tasks.builtin)))
"""
    their_folder(tmp_path, package=False)
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    run = subprocess.run([sys.executable, "-c", code], **options)
    assert run.stdout.split() == ["3.0", "True"], run.stderr


# ---- models as rewards


@pytest.mark.parametrize("num_labels", [1, 2])
def test_model_reward_reads_the_last_real_token_whatever_the_batch(tmp_path, num_labels):
    torch.manual_seed(0)
    tokenizer = task_tokenizer("dialogue")
    tokenizer.chat_template = None
    settings = tiny_config("llama", len(tokenizer)).to_dict()
    settings |= {"num_labels": num_labels, "pad_token_id": 0}
    config = LlamaConfig(**settings)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(f"model:{tmp_path}")
    prompts = ["area north", [{"role": "user", "content": "food thai food greek"}]]
    completions = ["ok", [{"role": "assistant", "content": "book book book"}]]
    together = score(reward, {"prompt": prompts}, ["ok", "book book book"])
    alone = [reward([prompt], [said])[0] for prompt, said in zip(prompts, completions)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert together[0] != together[1]
    assert num_labels == 1 or all(0 < value < 1 for value in alone)
    # Longer than the model's context: its start is cut.
    assert len(reward(["area north"], ["food " * 200])) == 1


def test_a_causal_lm_is_no_reward_model(model_folder):
    found = "expected a sequence classifier, found .*GPT2LMHeadModel.* without score.weight"
    with pytest.raises(InputError, match=f"--reward: .*{found}"):
        load_reward(f"model:{model_folder}")


def classifier(folder, config):
    """A tiny encoder with a classification head, and a tokenizer that knows no length."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 24, "num_labels": 1}
    tokenizer = task_tokenizer("dialogue")
    tokenizer.chat_template = None
    config = config(**sizes, vocab_size=len(tokenizer), pad_token_id=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"model:{folder}"


@pytest.mark.parametrize("config,room", [(RobertaConfig, 20), (BertConfig, 24)])
def test_a_text_is_cut_to_what_the_reward_model_takes(config, room, tmp_path):
    """RoBERTa's positions begin behind its padding's id, here 3: of 24 it uses 20."""
    reward = load_reward(classifier(tmp_path, config))
    assert reward.args[0].tokenizer.model_max_length == room
    for length in (room - 2, room - 1, room, 200):
        assert len(reward(["area"], ["food " * length])) == 1


def test_a_reward_model_without_its_head_is_refused(tmp_path):
    """Its scores would be chance."""
    spec = classifier(tmp_path, RobertaConfig)
    some = load_file(tmp_path / "model.safetensors")
    del some["classifier.out_proj.weight"]
    save_file(some, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = "a sequence classifier, found .*RobertaForSeq.* without classifier.out_proj.weight"
    with pytest.raises(InputError, match=f"--reward: .*{found}"):
        load_reward(spec)

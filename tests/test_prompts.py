"""tasks/prompts.py: templates, BOS tokens, files, and prompts that cannot be used."""

import json

import pytest
from common import bos_tokenizer
from datasets import Dataset
from tokenizers import processors

from tasks import InputError, as_messages
from tasks.builtin import task_rows, task_tokenizer
from tasks.noise import PSEUDO_LABEL
from tasks.prompts import (
    PROMPT_IDS,
    batch_rows,
    encode_prompts,
    load_data,
    load_prompts,
    render_chat,
)
from tasks.verifiers import exact_reward

TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
)


def test_one_bos_with_and_without_a_template():
    messages = [{"role": "user", "content": "hello there"}]
    templated = bos_tokenizer(TEMPLATE)
    assert encode_prompts(["hello there"], bos_tokenizer()) == [[1, 2, 3]]
    assert encode_prompts(["hello there", messages], templated) == [[1, 4, 2, 3]] * 2
    assert encode_prompts(["hello there"], templated, use_chat_template=False) == [[1, 2, 3]]
    # A text is plain in either order, and a conversation is none.
    for rows in (["hello there", messages], [messages, "hello there"]):
        ids = [[1, 2, 3] if isinstance(row, str) else [1, 4, 2, 3] for row in rows]
        assert encode_prompts(rows, templated, use_chat_template=False) == ids


@pytest.mark.parametrize("name", ["eos_token", "sep_token", "additional"])
def test_an_end_that_the_tokenizer_appends_is_taken_off(name):
    """Whatever it is called; one that the text itself ends in stays."""
    tokenizer, end = bos_tokenizer(), ("there", 3)
    pair = {"single": "<bos> $A there", "special_tokens": [("<bos>", 1), end]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**pair)
    if name != "additional":
        tokenizer.add_special_tokens({name: "there"})
    assert tokenizer("hello")["input_ids"] == [1, 2, 3]
    assert encode_prompts(["hello", "hello there"], tokenizer) == [[1, 2], [1, 2, 3]]


MALFORMED = [
    [],
    "",
    None,
    7,
    {"role": "user", "content": "hello"},
    [{"role": "user"}],
    [{"role": "user", "content": 3}],
    ["hello"],
]


@pytest.mark.parametrize("prompt", MALFORMED)
def test_malformed_prompts_are_refused_with_their_row(prompt):
    with pytest.raises(InputError, match="row 1: prompt"):
        encode_prompts(["hello", prompt], bos_tokenizer(TEMPLATE))


def test_messages_without_a_template_and_templates_that_raise_are_one_line():
    messages = [{"role": "user", "content": "hello"}]
    assert as_messages("hello") == messages == as_messages(messages)
    with pytest.raises(InputError, match="row 0: .*chat_template is not set"):
        encode_prompts([messages], bos_tokenizer())
    with pytest.raises(InputError, match="row 0: .*as a chat: only two roles"):
        encode_prompts([messages], bos_tokenizer("{{ raise_exception('only two\n roles') }}"))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_overlong_prompts_are_left_out_and_counted(tmp_path, capsys):
    """Whatever stood beside them stays with its row."""
    rows = [{"prompt": "hello " * length, "answer": length} for length in (2, 9, 3, 8, 4)]
    name = write_rows(tmp_path / "data.jsonl", rows)
    data = load_prompts("--dataset-name", name, "train", bos_tokenizer(), 5)  # with BOS
    assert data["answer"] == [2, 3, 4] and [len(ids) for ids in data[PROMPT_IDS]] == [3, 4, 5]
    assert "--dataset-name: 2 of 5 prompts left out, expected at most 5" in capsys.readouterr().out
    assert len(load_prompts("--dataset-name", name, "train", bos_tokenizer(), 10)) == 5
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="--dataset-name: row 0: .*3 tokens.*at most 2"):
        load_prompts("--dataset-name", name, "train", bos_tokenizer(), 2)


def test_what_is_wrong_with_a_prompt_names_the_flag(tmp_path):
    name = write_rows(tmp_path / "data.jsonl", [{"prompt": "hello"}, {"prompt": ""}])
    with pytest.raises(InputError, match="--dataset-name: .*row 1: prompt"):
        load_prompts("--dataset-name", name, "train", bos_tokenizer(), 99)


def test_prompts_of_a_column_of_another_name_replace_those_of_ours(tmp_path):
    name = write_rows(tmp_path / "data.jsonl", [{"question": "hello", "prompt": 3, "id": 4}])
    data = load_data(name, "train", prompt_column="question")
    assert data.to_dict() == {"prompt": ["hello"], "id": [4]}
    for column in ("query", "answer"):
        with pytest.raises(InputError, match=f"column '{column}'.*found 1 rows of question, "):
            load_data(name, "train", prompt_column=column)


def test_built_in_rows_are_data_without_their_examples():
    data = load_data("booking", ("test", 5, 3))
    assert data.column_names == ["prompt", "replies"]
    assert data["prompt"] == [row["prompt"] for row in task_rows("booking", "test", 5, 3)]
    tokenizer = task_tokenizer("booking")
    data = load_prompts("--task", "booking", ("test", 5, 3), tokenizer, 99)
    assert data[PROMPT_IDS] == encode_prompts(data["prompt"], tokenizer)


BROKEN = [
    (b'{"prompt": "a"}\n\n{"prompt": "a",}\n', "JSON parse error: .* row 1"),
    (b'{"prompt": "a"}\n[1, 2]\n', "JSON parse error: "),
    (b'{"prompt": "a"}\n""\n', "JSON parse error: "),
    (b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n', "'utf-8' codec"),
    (b'{"prompt": "a", "answer": "\xff\xfe"}\n', "'utf-8' codec"),
    (b"", "expected rows, found an empty file"),
    (b"\n \n", "Instruction"),
    (b'{"prompt": "a\\ud800"}\n', "JSON parse error: .* surrogate"),
]


@pytest.mark.parametrize("written,found", BROKEN)
def test_what_is_wrong_with_a_file_is_one_line(written, found, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(written)
    with pytest.raises(InputError, match=f"--dataset-name: cannot load '.*data.jsonl': {found}"):
        load_prompts("--dataset-name", str(path), "train", bos_tokenizer(), 9)


def test_byte_order_marks_empty_lines_and_objects_on_many_lines(tmp_path):
    files = {
        "bom.jsonl": b'\xef\xbb\xbf{"prompt": "a"}\n\n',
        "data.json": b'[\n{"prompt":\n"a"}\n]\n',
    }
    for name, written in files.items():
        (tmp_path / name).write_bytes(written)
        assert load_data(str(tmp_path / name), "train")["prompt"] == ["a"]


@pytest.mark.parametrize(
    "name,config,found",
    [
        ("nowhere.jsonl", None, ".*No such file"),
        ("data.csv", None, "expected a json, jsonl or parquet file"),
        ("data.jsonl", "main", "a file has no config, found 'main'"),
    ],
)
def test_files_that_cannot_be_are_one_line(name, config, found, tmp_path):
    for there in ("data.csv", "data.jsonl"):
        (tmp_path / there).write_text('{"prompt": "a"}\n')
    where = ("data", str(tmp_path / name), "train", bos_tokenizer(), 9)
    with pytest.raises(InputError, match=f"data: cannot load '.*{name}': {found}"):
        load_prompts(*where, config=config)


def test_tokens_that_the_model_has_no_embedding_for_are_named(tmp_path):
    assert encode_prompts(["hello", "hello there"], bos_tokenizer(), limit=4) == [[1, 2], [1, 2, 3]]
    found = r"row 1: expected token ids below 3 \(--model.*, found 3 in 'hello there'"
    with pytest.raises(InputError, match=f"^{found}"):
        encode_prompts(["hello", "hello there"], bos_tokenizer(), limit=3)
    name = write_rows(tmp_path / "data.jsonl", [{"prompt": "hello"}, {"prompt": "hello there"}])
    with pytest.raises(InputError, match=f"--dataset-name: .*{found}"):
        load_prompts("--dataset-name", name, "train", bos_tokenizer(), 9, limit=3)


@pytest.mark.parametrize("prompt", [" ", "\n\t"])
def test_a_prompt_without_tokens_is_refused(prompt):
    """A BOS is none of its own."""
    for template in (None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        with pytest.raises(InputError, match="row 1: expected token ids .*, found none in ' |n"):
            encode_prompts(["hello", prompt], bos_tokenizer(template))


NAMES = ["brack[1]", "st*r", "wh?t", "[a-z]", "[!x]", "sp ace#%20{a,b}"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_no_pattern(name, ending, tmp_path, monkeypatch):
    """The file that was named is read, and no other that a pattern would match."""
    folder = tmp_path / "work[1]"
    for place in (folder, tmp_path / "work1"):
        place.mkdir()
        for stem in ("brack1", "star", "what", "b", name):
            right = place == folder and stem == name
            row = {"prompt": "right" if right else "wrong"}
            if ending == "parquet":
                Dataset.from_list([row]).to_parquet(place / f"{stem}.parquet")
            else:
                write_rows(place / f"{stem}.jsonl", [row])
    monkeypatch.chdir(folder)
    for path in (f"{name}.{ending}", str(folder / f"{name}.{ending}")):
        assert load_data(path, "train")["prompt"] == ["right"]
    with pytest.raises(InputError, match="cannot load 'no.*': .*No such file"):
        load_prompts("--dataset-name", f"no[1].{ending}", "train", bos_tokenizer(), 9)


def test_a_folder_that_would_be_taken_for_a_pattern_is_refused(tmp_path):
    for name in ("data[1]", "data1"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", [{"prompt": name}])
    assert load_data(str(tmp_path / "data1"), "train")["prompt"] == ["data1"]
    with pytest.raises(InputError, match="a folder without"):
        load_data(str(tmp_path / "data[1]"), "train")


@pytest.mark.parametrize("name", [PROMPT_IDS, PSEUDO_LABEL])
def test_columns_with_our_names_are_refused(name, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "hello", name: 1}])
    found = f"other columns than {PROMPT_IDS} and {PSEUDO_LABEL}, found 1 rows of prompt, {name}"
    with pytest.raises(InputError, match=f"--dataset-name: .*{found}"):
        load_prompts("--dataset-name", path, "train", bos_tokenizer(), 9)


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_a_row_without_an_answer_is_named_where_answers_are_needed(value, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "answer": 1.5}\n{"prompt": "b", "answer": ' + value + "}\n")
    where = ("--dataset-name", str(path), "train", bos_tokenizer(), 9)
    assert len(load_prompts(*where)) == 2
    with pytest.raises(
        InputError, match="--dataset-name: .*row 1: expected a text as 'answer'.*--reward"
    ):
        load_prompts(*where, rewards=[exact_reward])
    # As datasets reads it: a date, which no response is.
    path.write_text('{"prompt": "a", "answer": "1969-07-20"}\n')
    with pytest.raises(
        InputError, match=r"row 0: expected a text as 'answer'.* datetime.datetime\(1969"
    ):
        load_prompts(*where, rewards=[exact_reward])
    path.write_text('{"prompt": "a", "text": 1.5}\n')
    with pytest.raises(
        InputError, match="row 0: expected a text as 'answer'.* columns prompt, text"
    ):
        load_prompts(*where, rewards=[exact_reward])


def test_an_answer_of_classes_is_their_names(tmp_path):
    """A parquet file of the hub may count them: the names, sorted, are not the options' order."""
    rows = [{"prompt": "p", "answer": own, "x": own} for own in ("yes", "no", "yes")]
    data = Dataset.from_list(rows).class_encode_column("answer").class_encode_column("x")
    data.to_parquet(tmp_path / "rows.parquet")
    found = load_data(str(tmp_path / "rows.parquet"), "train")
    assert found["answer"][:] == ["yes", "no", "yes"] and found["x"][:] == [1, 0, 1]
    # -1 is how a test set says that it has no labels.
    hidden = data.map(lambda row: {"answer": -1}, features=data.features)
    hidden.to_parquet(tmp_path / "hidden.parquet")
    assert load_data(str(tmp_path / "hidden.parquet"), "train")["answer"][:] == [None] * 3


def test_batches_walk_through_seeded_permutations_of_the_rows():
    """Five rows in batches of three: every five in a row are a permutation, others by the seed."""
    rows = [row for first in range(0, 30, 3) for row in batch_rows(5, first, 3, seed=1)]
    epochs = [tuple(rows[start : start + 5]) for start in range(0, 30, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len(set(epochs)) > 1
    assert batch_rows(5, 3, 12, seed=1) == rows[3:15]
    assert any(batch_rows(5, 0, 5, seed) != rows[:5] for seed in range(2, 5))


def test_keys_of_none_as_parquet_has_them_are_no_keys():
    tokenizer = bos_tokenizer()
    marked = "{% if 'name' in m %}!{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + marked + "{% endfor %}"
    for names in ({}, {"name": None}):
        said = [{"role": "user", "content": "hi", **names}]
        assert render_chat(said, tokenizer) == "hi"

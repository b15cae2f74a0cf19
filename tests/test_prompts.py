"""tasks/prompts.py: templates, BOS tokens, files, and prompts that cannot be used."""

import json

import pytest
from conftest import bos_tokenizer
from datasets import Dataset

from tasks import InputError
from tasks.builtin import task_rows, task_tokenizer
from tasks.prompts import (
    PROMPT_IDS,
    as_messages,
    assert_known_ids,
    broken_line,
    encode_prompts,
    load_data,
    load_prompts,
)

TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
)


def test_one_bos_with_and_without_a_template():
    messages = [{"role": "user", "content": "hello there"}]
    templated = bos_tokenizer(TEMPLATE)
    assert encode_prompts(["hello there"], bos_tokenizer()) == [[1, 2, 3]]
    assert encode_prompts(["hello there", messages], templated) == [[1, 4, 2, 3]] * 2
    assert encode_prompts(["hello there"], templated, use_chat_template=False) == [[1, 2, 3]]


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
    with pytest.raises(InputError, match="row 0: .*no chat template"):
        encode_prompts([messages], bos_tokenizer())
    with pytest.raises(InputError, match="row 0: .*refuses it: only two roles"):
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
    with pytest.raises(InputError, match="--dataset-name: row 1: prompt"):
        load_prompts("--dataset-name", name, "train", bos_tokenizer(), 99)


def test_prompts_of_a_column_of_another_name_replace_those_of_ours(tmp_path):
    name = write_rows(tmp_path / "data.jsonl", [{"question": "hello", "prompt": 3, "id": 4}])
    data = load_data("data", name, "train", prompt_column="question")
    assert data.to_dict() == {"prompt": ["hello"], "id": [4]}
    for column in ("query", "answer"):
        with pytest.raises(InputError, match=f"data: .*column '{column}'.*found 1 rows of"):
            load_data("data", name, "train", prompt_column=column)


def test_built_in_rows_are_data_without_their_examples():
    data = load_data("--task", "booking", ("test", 5, 3))
    assert data.column_names == ["prompt", "replies"]
    assert data["prompt"] == [row["prompt"] for row in task_rows("booking", "test", 5, 3)]
    tokenizer = task_tokenizer("booking")
    data = load_prompts("--task", "booking", ("test", 5, 3), tokenizer, 99)
    assert data[PROMPT_IDS] == encode_prompts(data["prompt"], tokenizer)


BROKEN = [
    (b'{"prompt": "a"}\n\n{"prompt": "a",}\n', "line 3: "),
    (b'{"prompt": "a"}\n[1, 2]\n', "line 2: expected an object, found '[1, 2]'"),
    (b'{"prompt": "a"}\n""\n', "line 2: expected an object, found"),
    (b'{"prompt": "a"}\n"\xff\xfe"\n', "line 2: 'utf-8'"),
    (b'\xef\xbb\xbf{"prompt": "a"}\n\n', None),  # a byte order mark, and an empty line
]


@pytest.mark.parametrize("written,found", BROKEN)
def test_broken_lines_of_a_file_are_named(written, found, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(written)
    if found is None:
        assert broken_line(path) is None
        assert load_data("data", str(path), "train")["prompt"] == ["a"]
        return
    assert broken_line(path).startswith(found)
    with pytest.raises(InputError, match="data: cannot load .*line "):
        load_data("data", str(path), "train")


def test_a_json_file_may_have_its_objects_on_many_lines(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n{"prompt":\n"a"}\n]\n')
    assert load_data("data", str(path), "train")["prompt"] == ["a"]


@pytest.mark.parametrize(
    "name,config,found",
    [
        ("nowhere.jsonl", None, "no such file"),
        ("data.csv", None, "expected a json, jsonl or parquet file"),
        ("data.jsonl", "main", "a file has no config, found 'main'"),
    ],
)
def test_files_that_cannot_be_are_one_line(name, config, found, tmp_path):
    for there in ("data.csv", "data.jsonl"):
        (tmp_path / there).write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match=f"data: cannot load '.*{name}': {found}"):
        load_data("data", str(tmp_path / name), "train", config)


def test_tokens_that_the_model_has_no_embedding_for_are_named():
    data = Dataset.from_dict({"prompt": ["a", "b c"], PROMPT_IDS: [[1, 2], [3, 40]]})
    assert_known_ids(data, 41)
    with pytest.raises(InputError, match="expected token ids below 40, .*found 40 .*'b c'"):
        assert_known_ids(data, 40)

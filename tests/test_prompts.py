"""tasks/prompts.py: templates, BOS tokens, prompts that cannot be used or are too long."""

import json

import pytest
from conftest import bos_tokenizer

from tasks import InputError
from tasks.builtin import task_rows, task_tokenizer
from tasks.prompts import PROMPT_IDS, assert_known_ids, encode_prompts, load_data, load_prompts


TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
)


def test_one_bos_with_and_without_a_template():
    messages = [{"role": "user", "content": "hello there"}]
    assert encode_prompts(["hello there"], bos_tokenizer()) == [[1, 2, 3]]
    assert encode_prompts(["hello there", messages], bos_tokenizer(TEMPLATE)) == [[1, 4, 2, 3]] * 2
    assert encode_prompts(["hello there"], bos_tokenizer(TEMPLATE), use_chat_template=False) == [
        [1, 2, 3]
    ]


@pytest.mark.parametrize(
    "prompt", [[], "", None, 7, [{"role": "user"}], [{"role": "user", "content": 3}], ["hello"]]
)
def test_malformed_prompts_are_refused_with_their_row(prompt):
    with pytest.raises(InputError, match="row 1: prompt"):
        encode_prompts(["hello", prompt], bos_tokenizer(TEMPLATE))


def test_messages_without_a_template_and_templates_that_raise_are_one_line():
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(InputError, match="row 0: .*no chat template"):
        encode_prompts([messages], bos_tokenizer())
    with pytest.raises(InputError, match="row 0: .*refuses it: only two roles"):
        encode_prompts([messages], bos_tokenizer("{{ raise_exception('only two\n roles') }}"))

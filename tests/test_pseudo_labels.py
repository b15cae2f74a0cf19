"""experiments/pseudo_labels.py: votes by hand, and a file that a second call goes on with."""

import sys

import pytest
from common import write_rows

from experiments import pseudo_labels
from experiments.tables import read_rows
from tasks import InputError


def test_final_answers_and_votes():
    """Equal numbers vote together however written; no answer counts in the share, not the vote."""
    texts = ("so 1,234.", "\\boxed{\\frac{1}{2}}", "0.5", "\\boxed{x + 1}", "none")
    found = [pseudo_labels.final_answer(text) for text in texts]
    assert found == ["1234", "1/2", "1/2", None, None]
    assert pseudo_labels.final_answer("The answer is B.", ["a", "b"]) == "B"
    label = lambda *texts: pseudo_labels.labelled({"prompt": "a", "answer": "7"}, texts, 3)
    written = {"prompt": "a", "true_answer": "7", "answer": "1", "agreement": 0.5, "row": 3}
    assert label("2", "1", "none", "1") == written
    assert label("2", "1") == written | {"answer": "2"}
    assert label("none") is None


def test_pseudo_labels_are_written_resumed_and_compared_with_the_truth(
    model_folder, tmp_path, monkeypatch, capsys
):
    """7, 7, 8 -> 7; nothing -> left out; 5, 6, 6 -> 6 (wrong); a torn last line is made again."""
    rows = [{"prompt": "book a table", "answer": answer} for answer in ("7", "1", "5")]
    data, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    texts = iter([["7", "it is 7", "8"], ["no", "", "idea"], ["5", "6", "6.0"]])
    monkeypatch.setattr(pseudo_labels.rollout, "completion_texts", lambda *_: next(texts))
    flags = ["--samples", "3", "--response-length", "2"]
    monkeypatch.setattr(sys, "argv", ["", model_folder, data, str(out), *flags])
    pseudo_labels.main()
    written, seen = out.read_text(), []
    for row in read_rows(out):
        seen.append((row["row"], row["answer"], row["true_answer"], round(row["agreement"], 2)))
    assert seen == [(0, "7", "7", 0.67), (2, "6", "5", 0.67)]
    said = capsys.readouterr().out
    assert "2 of 3 problems" in said and "right: 0.500" in said
    out.write_text(written[:-5])
    texts = iter([["no", "", "idea"], ["5", "6", "6.0"]])
    pseudo_labels.main()
    assert out.read_text() == written
    capsys.readouterr()
    others = ['{"a": 1}', '{"a": 1}\n', "text\n", '{"prompt": "a"}\n{"prompt": "b"}']
    others += [written + '{"row": 9}\n{"row": 10}', '{"row": 1, "answer": "2"}\n{"row": 2}']
    others += [written.replace('"prompt": "', '"prompt": "of other data '), written + "{}\n"]
    for other in others:
        out.write_text(other)
        with pytest.raises(SystemExit) as ended:
            pseudo_labels.main()
        assert ended.value.code == 2 and out.read_text() == other
        assert "expected rows of an earlier call" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["row", "agreement", "true_answer"])
def test_pseudo_labels_take_the_place_of_no_column(
    name, model_folder, tmp_path, monkeypatch, capsys
):
    data, out = write_rows(tmp_path / "in.jsonl", [{"prompt": "a", name: 1}]), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["", model_folder, data, str(out), "--response-length", "2"])
    with pytest.raises(SystemExit) as ended:
        pseudo_labels.main()
    assert ended.value.code == 2 and not out.exists()
    assert f"data: expected no column {name!r}" in capsys.readouterr().err.splitlines()[-1]


def test_choices_that_cannot_be_read_are_one_line():
    with pytest.raises(InputError, match="data: row 3: choices: expected texts or"):
        pseudo_labels.labelled({"prompt": "a", "choices": [["a"], ["b"]]}, ["a"], 3)


def test_digit_labels_are_voted_for_as_the_verifier_reads_them():
    choices = {"text": ["2", "3"], "label": ["1", "2"]}
    found = pseudo_labels.labelled({"prompt": "x", "choices": choices}, ["2"] * 3, 0)
    assert found["answer"] == "B"

"""experiments/evaluate.py: policies of models and of runs, under several rewards."""

import shutil

import pytest
from common import write_rows
from transformers import AutoTokenizer

from experiments import evaluate, pseudo_labels, sft
from tasks.builtin import SLOTS


def test_evaluation_of_a_model_and_of_a_run(model_folder, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"area {value}", "answer": value} for value in SLOTS["area"]]
    write_rows(tmp_path / "data.jsonl", rows)
    code = "def longer(prompts, **columns):\n    return [float(len(p)) for p in prompts]\n"
    (tmp_path / "ours.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run" / "checkpoint-000001"
    shutil.copytree(model_folder, run / "policy")
    (run / "state.pt").touch()
    (tmp_path / "run" / "args.json").write_text('{"flags": {}}')
    sets = "--set data.jsonl exact --set data.jsonl ours:longer --rows 3".split()
    sets += "--response-length 4".split()
    monkeypatch.setattr("sys.argv", ["evaluate.py", model_folder, "run", *sets])
    respond, answered = evaluate.respond, []
    monkeypatch.setattr(evaluate, "respond", lambda *own: answered.append(1) or respond(*own))
    evaluate.main()
    assert len(answered) == 2  # two rewards of a file read the same responses
    policies, files, rewards, scores, *sizes = zip(
        *map(str.split, capsys.readouterr().out.splitlines())
    )
    assert policies == (model_folder, model_folder, "run", "run")
    assert files == ("data.jsonl",) * 4 and rewards == ("exact", "ours:longer") * 2
    assert scores[1] == f"{(10 + 10 + 9) / 3:.3f}" and sizes[0] == ("(3",) * 4
    assert all(column[:2] == column[2:] for column in (scores, *sizes))
    words = ["evaluate.py", model_folder, *sets, "--set", "data.jsonl", "math"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "expected a number" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "nowhere", *sets])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "cannot load 'nowhere'" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["evaluate.py", "run", *sets])
    (tmp_path / "run" / "args.json").write_text('{"flags": {"stop_token": [1]}}')
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "'[1]' is not one token" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "run" / "args.json").write_text('{"flags": {}}')
    shutil.rmtree(run)
    with pytest.raises(SystemExit):
        evaluate.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "evaluate.py: error: policy: expected a checkpoint in 'run', found none"
    for damaged in ("{", "[]", '{"flags": 1}', "{}", '"'):
        (tmp_path / "run" / "args.json").write_text(damaged)
        with pytest.raises(SystemExit) as ended:
            evaluate.main()
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and "policy: run/args.json: expected a run's" in said[-1]


def test_tokens_that_the_model_does_not_know_are_one_line(
    model_folder, tmp_path, monkeypatch, capsys
):
    """Its tokenizer may: with what was added to that one alone."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": "area", "answer": "north"}, {"prompt": "zebra", "answer": "north"}]
    said = [rows[0], {"prompt": "area", "answer": "zebra"}]
    data, other = write_rows(tmp_path / "d.jsonl", rows), write_rows(tmp_path / "o.jsonl", said)
    below = f"row 1: expected token ids below {len(tokenizer) - 1}"
    for script, *words in (
        (evaluate, folder, "--set", data, "exact", "--response-length", 2),
        (pseudo_labels, folder, data, tmp_path / "votes", "--response-length", 2),
        (sft, folder, data, tmp_path / "out"),
        (sft, folder, other, tmp_path / "out"),
    ):
        monkeypatch.setattr("sys.argv", ["", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == 2 and below in capsys.readouterr().err.splitlines()[-1]

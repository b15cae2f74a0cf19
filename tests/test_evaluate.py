"""experiments/evaluate.py: policies of models and of runs, under several rewards."""

import shutil
import sys

import pytest
from common import write_rows

from experiments import evaluate
from experiments.tables import read_rows
from tasks.booking import SLOTS


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
    words = ["evaluate.py", model_folder, "run", *sets, "--output", "out.jsonl"]
    monkeypatch.setattr("sys.argv", words)
    evaluate.main()
    found = read_rows(tmp_path / "out.jsonl")
    assert [row["policy"] for row in found] == [model_folder] * 2 + ["run"] * 2
    assert [row["reward"] for row in found] == ["exact", "ours:longer"] * 2
    assert found[1]["score"] == pytest.approx((10 + 10 + 9) / 3)
    assert all(row["rows"] == 3 for row in found)
    assert {**found[0], "policy": ""} == {**found[2], "policy": ""}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[5].startswith("data.jsonl, ours:longer: ")
    assert lines[5].endswith("run 9.667")
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


def test_what_is_evaluated_twice_counts_once_and_no_data_is_added_to(tmp_path, monkeypatch, capsys):
    asked = []

    def evaluated(policy, rewards, args):
        asked.append((policy, [*args.set]))
        found = {"policy": policy, "set": "d", "reward": "math", "rows": 1, "words": 1.0}
        return [found | {"score": 0.5}]

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    out, data = tmp_path / "out.jsonl", tmp_path / "d.jsonl"
    words = ["evaluate.py", "a", "a", "--set", "d", "math", "--set", "d", "math", "--output"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*words, str(out)])
        evaluate.main()
        assert capsys.readouterr().out.splitlines()[-1] == "d, math: a 0.500"
    assert asked == [("a", [("d", "math")])] * 2 and len(read_rows(out)) == 2
    written = data.write_text('{"prompt": "1 + 1 =", "answer": 2}\n') and data.read_text()
    monkeypatch.setattr(sys, "argv", [*words, str(data)])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 2 and data.read_text() == written and len(asked) == 2
    found = f"{data}, line 1: expected a JSON object with policy, found"
    assert found in capsys.readouterr().err.splitlines()[-1]


def test_evaluations_of_seeds_are_one_mean(capsys):
    results = []
    for i in range(3):
        result = {"policy": f"runs/a-seed{i}", "set": "x", "reward": "y", "score": float(i)}
        results.append(result)
    results += [result | {"set": "z/x"}, result | {"policy": "other/a-seed2"}]
    evaluate.print_means(results)
    said = ["x, y: runs/a 1.000 ±2.483, other/a 2.000", "z/x, y: runs/a 2.000"]
    assert capsys.readouterr().out.splitlines() == said

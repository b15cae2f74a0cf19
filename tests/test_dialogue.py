"""experiments/dialogue.py: success by hand, and parts that share no dialogue."""

import datetime

import pytest
from common import write_rows
from datasets import Dataset

from experiments import dialogue
from experiments.tables import read_rows

SAID = {
    "reference": "Shall I book Luigi's for two at 7 pm?",
    "acts": ["CONFIRM"],
    "values": ["Luigi's", "two", "7 pm"],
}


@pytest.mark.parametrize(
    "text,other,expected",
    [
        (SAID["reference"], {}, 1.0),
        ("LUIGI'S, two?", {}, 1.0),  # 7 pm is nothing that the dialogue has named
        ("Luigi's it is.", {}, (1 / 2 + 0) / 2),
        ("Which place?", {}, (0 + 1) / 2),
        ("Sorry?", {"values": []}, 1.0),
        ("Sorry.", {"values": []}, 0.0),
        ("Bye.", {"values": [], "acts": ["GOODBYE"]}, 1.0),
        (" ", {"values": [], "acts": ["GOODBYE"]}, 0.0),  # silence is no answer
        # A number within another is not it.
        ("For 12?", {"values": ["two", "1"], "reference": "1 for two?"}, (0 + 1) / 2),
        ("8 pm?", {"values": ["8 pm"]}, 1.0),  # nor what the reference does not say
    ],
)
def test_success_by_hand(text, other, expected):
    prompt = [{"role": "user", "content": "A table for Two at Luigi's"}]
    columns = {name: [value] for name, value in {**SAID, **other}.items()}
    completion = [{"role": "assistant", "content": text}]
    assert dialogue.success([prompt], [completion], **columns) == [expected]


def test_the_dialogues_parts_share_no_dialogue_and_the_policys_is_short(
    model_folder, tmp_path, monkeypatch, capsys
):
    rows, parts = [], {}
    for i in range(60):
        row = {"prompt": "area " * (1 + i % 4), "reference": "north", "acts": [], "values": []}
        rows.append({**row, "dialogue_id": i // 2})
    data, out = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "parts"
    words = ["dialogue.py", model_folder, data, str(out), "--max-tokens", "4"]
    monkeypatch.setattr("sys.argv", words)
    dialogue.main()
    for name in dialogue.PARTS:
        parts[name] = read_rows(out / f"{name}.jsonl")
    ids = [{row["dialogue_id"] for row in part} for part in parts.values()]
    assert all(ids) and not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    lengths = [{len(row["prompt"].split()) for row in part} for part in parts.values()]
    assert lengths[0] <= {1, 2} and lengths[1] == {1, 2, 3, 4}
    assert len(parts["judge"]) + len(parts["strict"]) < 60
    assert parts["judge"][0].keys() == rows[0].keys()
    # Its own data are not overwritten.
    before = (out / "judge.jsonl").read_text()
    monkeypatch.setattr("sys.argv", [*words[:2], str(out / "judge.jsonl"), str(out)])
    with pytest.raises(SystemExit):
        dialogue.main()
    assert "output: expected a folder without the data's file" in capsys.readouterr().err
    assert (out / "judge.jsonl").read_text() == before
    write_rows(tmp_path / "data.jsonl", [{"prompt": "area"}])
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        dialogue.main()
    assert "found no acts, dialogue_id, reference, values" in capsys.readouterr().err


def test_dates_are_written_as_texts(model_folder, tmp_path, monkeypatch):
    """Which JSON has not; a parquet file may."""
    row = {"prompt": "area", "reference": "a", "acts": ["X"], "values": ["b"], "dialogue_id": 1}
    day = datetime.datetime(2020, 1, 2)
    Dataset.from_list([row | {"day": day}]).to_parquet(tmp_path / "d.parquet")
    words = ["dialogue.py", model_folder, str(tmp_path / "d.parquet"), str(tmp_path / "parts")]
    monkeypatch.setattr("sys.argv", words)
    dialogue.main()
    (found,) = (
        row for part in dialogue.PARTS for row in read_rows(tmp_path / "parts" / f"{part}.jsonl")
    )
    assert found == row | {"day": str(day)}
